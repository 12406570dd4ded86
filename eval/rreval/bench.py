"""What a run costs beside the model: `python -m rreval.bench world` and `memory`.

`world` answers the set of `rreval.world` and says how much dearer three questions of a video are than one, and how much
of the time is spent neither watching nor answering. `memory` answers 900 tiny videos and says how much memory the last
800 of them add. The last line that is printed is one JSON document.
"""

# ruff: noqa: T201 (a benchmark prints)
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from rreval.data import VideoItem, load_set
from rreval.journal import Journal, Record
from rreval.runner import run
from rreval.settings import DEFAULTS, RunSettings
from rreval.world import Length, make_set
from rrvideo.pipeline import Video, VideoQA

TINY = Length((4, 4), (1, 2), fps=2)
VIDEOS = 900
WARM = 100  # videos, after which memory should grow no more


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rreval.bench", description="What a run costs beside the model.")
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world", help="three questions against one, and the runner's own time")
    world.add_argument("--folder", type=Path, help="where the set is, or is to be made")
    world.add_argument("--limit", type=int, metavar="N", help="the first N videos of each duration")
    commands.add_parser("memory", help=f"memory over {VIDEOS} tiny videos")
    for command in commands.choices.values():
        command.add_argument("--model", default="tiny")
    arguments = parser.parse_args()
    qa = VideoQA.load(arguments.model)
    print(f"{arguments.model} on {platform.machine()}, {os.cpu_count()} cores")
    result = bench_world(qa, arguments.folder, arguments.limit) if arguments.command == "world" else bench_memory(qa)
    print(json.dumps({"benchmark": f"eval {arguments.command}", **result}))


def bench_world(qa: VideoQA, folder: Path | None, limit: int | None) -> dict[str, float]:
    """Answer the set once, with a stopwatch around every watch and every answer."""
    items = load_set(make_set(folder))
    if limit:
        items = [item for item in items if int(item.videoID.rpartition("-")[2]) <= limit]
    watches: list[float] = []
    answers: list[float] = []
    with _timed(VideoQA, "watch", watches), _timed(Video, "ask", answers):
        started = time.perf_counter()
        records = list(_answered(qa, items))
        total = time.perf_counter() - started
    per_video = len(records) // len(items)
    one, all_of_them = sum(watches) + sum(answers[::per_video]), sum(watches) + sum(answers)
    right = sum(record.prediction == record.answer for record in records)
    print(f"{len(records)} questions about {len(items)} videos in {total:.1f} s; {right} right")
    print(f"one question a video {one:.1f} s, {per_video} questions {all_of_them:.1f} s: {all_of_them / one:.3f} times")
    print(f"neither watching nor answering: {total - all_of_them:.2f} s, {1 - all_of_them / total:.2%} of the run")
    return {
        "seconds": round(total, 2),
        "three_over_one": round(all_of_them / one, 4),
        "overhead": round(1 - all_of_them / total, 5),
    }


def bench_memory(qa: VideoQA) -> dict[str, float]:
    """Answer many videos, and look at the process's peak memory on the way."""
    peaks: dict[int, float] = {}
    with TemporaryDirectory() as scratch:
        items = load_set(make_set(Path(scratch, "set"), videos=VIDEOS, lengths={"short": TINY}))
        for number, record in enumerate(_answered(qa, items), start=1):
            if record.error:
                sys.exit(f"{record.question_id}: {record.error}")
            done, rest = divmod(number, len(items[0].rows))
            if not rest and done % WARM == 0:
                peaks[done] = _peak_mb()
                print(f"{done:4} videos: {peaks[done]:6.1f} MB peak", flush=True)
    growth = peaks[VIDEOS] - peaks[WARM]
    print(f"the last {VIDEOS - WARM} videos added {growth:.1f} MB")
    return {"videos": VIDEOS, "peak_mb": round(peaks[VIDEOS], 1), "growth_mb": round(growth, 1)}


def _answered(qa: VideoQA, items: Sequence[VideoItem]) -> Iterator[Record]:
    """What the runner does, into a folder that is not kept."""
    settings = RunSettings.of(qa, DEFAULTS, items, dataset="bench", model="bench")
    with TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        yield from run(qa, items, settings, journal)


@contextmanager
def _timed(owner: type, name: str, seconds: list[float]) -> Iterator[None]:
    """Note how long each call of a method takes."""
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    with patch.object(owner, name, timed):
        yield


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
