"""What benchmarks measure with: clocks, memory, the spread of some turns, and videos that are drawn once and kept."""

# ruff: noqa: T201 (a benchmark prints)
from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import av

from rrvideo.frameindex import packets_of

if TYPE_CHECKING:
    from rrvideo.tiny.world import World

__all__ = ["Spread", "apart", "meets", "ratio", "repeat_packets", "repeated_video", "resident", "timed", "world_video"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some turns, and the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*(round(value, 4) for value in (statistics.median(values), min(values), max(values))))

    def __format__(self, form: str) -> str:
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def resident(what: Literal["VmRSS", "VmHWM"]) -> float:
    """MB of memory that this process has now, or has had at most; where no /proc tells both, the latter."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
        return int(fields[what].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def apart(work: Callable[..., T], *arguments: Any) -> T:
    """What `work` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and the seconds that it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def ratio(seconds: Sequence[float], others: Sequence[float]) -> Spread:
    """What the times of the same turns are to each other."""
    return Spread.of([one / other for one, other in zip(seconds, others, strict=True)])


def meets(what: str, value: float, limit: float, form: str) -> bool:
    """Whether a goal is met; it is printed, too."""
    print(f"goal: {what} at most {limit:{form}}: {'met' if value <= limit else 'MISSED'} with {value:{form}}")
    return value <= limit


def world_video(cache: Path, seconds: int, *, width: int, height: int, fps: int) -> tuple[World, Path]:
    """A world of up to eight scenes, and the file in `cache` that shows it."""
    from rrvideo.tiny.drawing import write_video
    from rrvideo.tiny.world import draw_world

    drawn = draw_world(Random(f"bench {seconds}"), seconds, min(8, max(1, seconds // 4)), shortest=min(4, seconds))
    path = cache / f"world-{seconds}s-{width}x{height}-{fps}fps.mp4"
    if not path.exists():
        print(f"drawing {path.name}", flush=True)
        unfinished = path.with_name("unfinished.mp4")
        write_video(drawn, unfinished, width=width, height=height, fps=fps)
        unfinished.rename(path)
    return drawn, path


def repeated_video(cache: Path, seconds: int, turns: int, *, width: int, height: int) -> Path:
    """A file in `cache` that shows a world of so many seconds, at 25 frames per second, `turns` times."""
    _, loop = world_video(cache, seconds, width=width, height=height, fps=25)
    path = loop.with_name(f"{turns}-times-{loop.name}")
    if not path.exists():
        repeat_packets(loop, path, seconds=seconds, turns=turns)
    return path


def repeat_packets(loop: Path, path: Path, *, seconds: float, turns: int) -> None:
    """Write the packets of `loop`, which lasts `seconds`, to `path` again and again, ever later."""
    unfinished = path.with_name("unfinished.mp4")
    with av.open(str(unfinished), "w") as output:
        stream = None
        for turn in range(turns):
            with av.open(str(loop)) as source:
                stream = stream or output.add_stream_from_template(source.streams.video[0])
                later = turn * int(seconds / source.streams.video[0].time_base)
                for packet in packets_of(source):
                    packet.stream, packet.pts, packet.dts = stream, packet.pts + later, packet.dts + later
                    output.mux(packet)
    unfinished.rename(path)
