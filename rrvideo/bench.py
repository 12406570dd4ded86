"""Benchmarks on this machine: `rrvideo bench sampling`, `ask`, `engine`, `prefill`, `quality` or `watch`.

`sampling` takes 256 frames from a 720p H.264 file in every way there is; `ask` answers a question about the embedded
sample from a cold start. Each run is a process of its own, so that its time and its peak memory are its own too.
`engine` is what a watch costs; see `rrvideo.bench_engine`. `prefill` (speed), `quality` (error against density) and
`watch` (a whole model) are RRAttention's own benchmarks, in kernels/benchmarks. The last line that is printed is one
JSON document.
"""

# ruff: noqa: T201 (a benchmark prints)
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np

from rrvideo.measuring import repeat_packets
from rrvideo.video import plan_samples, read_frames

FRAMES = 256
MINUTES = (2, 20)
RATE = 25  # frames per second
GOP = 250  # frames
LOOP = 40  # seconds that are encoded; the files repeat them


class Result(NamedTuple):
    """One line of the table."""

    minutes: int
    way: str
    seconds: list[float]
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="rrvideo bench", description="Benchmarks on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    sampling = commands.add_parser("sampling", help="seconds and memory to sample a long video")
    sampling.add_argument("--repeats", type=int, default=3)
    sampling.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "rrvideo-bench")
    ask = commands.add_parser("ask", help="seconds from the command to the embedded model's answer")
    ask.add_argument("--repeats", type=int, default=5)
    for name, about in (
        ("engine", "seconds and memory of watching a video"),
        ("prefill", "speed of RRAttention's kernels"),
        ("quality", "its error against its density"),
        ("calibrate", "what each attention head of a model weighs, for RRConfig.head_weights"),
        ("watch", "a prefill of generated frames by a whole model with random weights"),
    ):
        commands.add_parser(name, help=f"{about}; --help tells its options", add_help=False)
    once = commands.add_parser("run-once", help="one run of a benchmark, in a process of its own")
    once.add_argument("way", choices=WAYS)
    once.add_argument("path", type=Path)
    arguments, rest = parser.parse_known_args()
    if arguments.command == "engine":
        from rrvideo.bench_engine import main as bench_engine

        sys.exit(bench_engine(rest))
    if arguments.command in ("prefill", "quality", "calibrate", "watch"):
        script = kernel_benchmark(arguments.command)
        sys.exit(subprocess.run([sys.executable, script, *rest], check=False).returncode)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "sampling":
        bench_sampling(arguments.repeats, arguments.cache)
    elif arguments.command == "ask":
        bench_ask(arguments.repeats)
    else:
        print(json.dumps(_run(WAYS[arguments.way], arguments.path)))


def kernel_benchmark(name: str) -> Path:
    """The script of that name: in the repository around this package, or else where one stands; a wheel holds none."""
    for folder in (Path(__file__).parent.parent, Path.cwd()):
        if (script := folder / "kernels" / "benchmarks" / f"{name}.py").exists():
            return script
    sys.exit(f"{name} comes with the repository and not with the package: run this in a checkout")


def bench_sampling(repeats: int, cache: Path) -> None:
    """Compare the ways of sampling with decoding the whole file, on videos of `MINUTES` minutes kept in `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    paths = {minutes: cache / f"{minutes}-minutes-720p.mp4" for minutes in MINUTES}
    for path in paths.values():
        if not path.exists():
            _run_apart("make", path)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, PyAV {av.__version__}"
    print(f"{FRAMES} frames of 1280x720 H.264, GOP {GOP}, on {machine}; median of {repeats}")
    runs: dict[tuple[int, str], list[dict[str, float]]] = {
        (minutes, way): [] for minutes in MINUTES for way in ("sequential", "uniform", "keyframes")
    }
    for _ in range(repeats):  # by turns, so that a busy moment of the machine does not fall on one way alone
        for (minutes, way), measured in runs.items():
            measured.append(_run_apart(way, paths[minutes]))
    results = [
        Result(minutes, way, [run["seconds"] for run in measured], max(run["peak_mb"] for run in measured))
        for (minutes, way), measured in runs.items()
    ]
    for minutes, way, seconds, peak in results:
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"{minutes:3} min  {way:10} {statistics.median(seconds):7.2f} s {spread:17} {peak:4.0f} MB peak")
    longest = {way: statistics.median(seconds) for minutes, way, seconds, _ in results if minutes == max(MINUTES)}
    summary = {
        "benchmark": "sampling",
        "machine": machine,
        "uniform_over_sequential": round(longest["uniform"] / longest["sequential"], 3),
        "uniform_over_keyframes": round(longest["uniform"] / longest["keyframes"], 2),
        "results": [result._asdict() for result in results],
    }
    print(json.dumps(summary))


def bench_ask(repeats: int) -> None:
    """Time whole processes: importing rrvideo, and asking the embedded model about the 60-second sample."""
    commands = {
        "python": ["-c", ""],
        "import rrvideo": ["-c", "import rrvideo"],
        "rrvideo ask": ["-m", "rrvideo", "ask", "sample", "What appears first?", "--quiet"],
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"whole processes on {machine}; median of {repeats}")
    measured: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            measured[name].append(round(time.perf_counter() - started, 3))
    for name, seconds in measured.items():
        print(f"{name:15} {statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    print(json.dumps({"benchmark": "ask", "machine": machine, "seconds": measured}))


def _run_apart(way: str, path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "rrvideo.bench", "run-once", way, str(path)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _run(work: Callable[[Path], None], path: Path) -> dict[str, float]:
    started = time.perf_counter()
    work(path)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(seconds, 3), "peak_mb": round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)}


def _decode_all(path: Path) -> None:
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for _ in container.decode(video=0):
            pass


def _sample(path: Path, sampling: Literal["uniform", "keyframes"]) -> None:
    for _ in read_frames(plan_samples(path, fps=RATE, max_frames=FRAMES, sampling=sampling)):
        pass


def _make_video(path: Path) -> None:
    """Write a file of the length that its name says: the packets of a short one, again and again, ever later."""
    loop = path.with_name("loop-720p.mp4")
    with av.open(str(loop), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "sc_threshold": "0"})
        stream.width, stream.height, stream.codec_context.gop_size = 1280, 720, GOP
        for image in _drifting_texture(LOOP * RATE):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    repeat_packets(loop, path, seconds=LOOP, turns=int(path.name.split("-")[0]) * 60 // LOOP)


def _drifting_texture(count: int) -> Iterator[np.ndarray]:
    """Frames of a smooth texture that drifts under film grain, RGB uint8 [720, 1280, 3]."""
    random = np.random.default_rng(0)
    coarse = av.VideoFrame.from_ndarray(random.integers(0, 256, (45, 80, 3), dtype=np.uint8), format="rgb24")
    texture = coarse.reformat(2560, 1440, interpolation="BICUBIC").to_ndarray().astype(np.int16)
    grain = random.normal(0, 3, (8, 720, 1280, 1)).astype(np.int16)
    for number in range(count):
        top, left = number % 720, number * 5 // 4 % 1280
        yield np.clip(texture[top : top + 720, left : left + 1280] + grain[number % 8], 0, 255).astype(np.uint8)


WAYS: dict[str, Callable[[Path], None]] = {
    "make": _make_video,
    "sequential": _decode_all,  # the baseline, which keeps nothing
    "uniform": lambda path: _sample(path, "uniform"),
    "keyframes": lambda path: _sample(path, "keyframes"),
}


if __name__ == "__main__":
    main()
