"""What a watch costs, measured on this machine: `rrvideo bench engine`.

questions     the second question about a video, as a share of the first one with its watch; evidence's share of an ask
memory        peak memory beyond weights and KV cache, for videos of two lengths and for smaller and larger chunks
first-answer  the time to a first answer, against the longest of decode, encode and prefill run alone
attention     RRAttention against full attention: whole watches, and whether the answers are the same

The embedded model watches videos of its own world, which are drawn once and kept. Medians come with the lowest and the
highest value of all turns; a goal that is missed is said; the last line is one JSON document.
"""

# ruff: noqa: T201 (a benchmark prints)
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

from rrvideo import options
from rrvideo.cli import SAMPLE
from rrvideo.measuring import Spread, apart, meets, ratio, repeated_video, resident, timed, world_video
from rrvideo.terminal import hush_transformers
from rrvideo.video import Frame, SamplePlan, plan_samples, read_frames

if TYPE_CHECKING:
    import torch

    from rrvideo import Video, VideoQA
    from rrvideo.model import Checkpoint

QUESTION = "What appears first?"
ASKED = 30  # questions that are answered with both kinds of attention
TIMELESS = ("colour", "shape", "background", "direction", "first", "last", "after", "before", "count", "presence")
LENGTHS = (6, 60)  # minutes, of the videos that are to take the same memory
CHUNKS = (0.25, 0.5, 1.0, 2.0)  # times the engine's own chunks of frames and of tokens
TOKENS = (8192, 16384, 32768)  # visual ones
LOOP = 60  # seconds that are drawn of a video of which only the costs count; the file repeats them
# The project's goals: at most so much, and a video for the third is one of which each stage has at least such a share.
SECOND_QUESTION, EVIDENCE, SAME_MEMORY, FIRST_ANSWER, LEAST_STAGE = 0.05, 0.05, 0.10, 1.15, 0.20
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # all that glibc frees, at once
TOLD = 20  # questions of each turn that are answered with evidence and without

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that `argv` asks for, by default all of them, and print what they find; returns the exit code."""
    arguments = _parser().parse_args(argv)
    import torch

    hush_transformers(keep_downloads=False)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    print(f"embedded model, {machine}, {threads} threads for an operation; median of {arguments.repeats}")
    if arguments.scale != 1:
        print(f"videos are {arguments.scale:g} times as long as they should be: these figures only try the benchmark")
    parts: dict[str, dict[str, Any]] = {}
    for name in arguments.part or PARTS:
        print(f"\n{name}", flush=True)
        parts[name] = PARTS[name](arguments)
    missed = [name for name, found in parts.items() if found["met"] is False]
    print(f"\ngoals missed: {', '.join(missed) or 'none'}")
    summary = {"benchmark": "engine", "machine": machine, "threads": threads, "scale": arguments.scale}
    line = json.dumps(summary | {"repeats": arguments.repeats, "missed": missed, "parts": parts}, default=asdict)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


def bench_questions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Watch ten minutes anew in each turn, and ask two of all the questions that can be asked about them."""
    from rrvideo.tiny.world import questions

    seconds = round(600 * arguments.scale)
    world, path = world_video(arguments.cache, seconds, width=160, height=120, fps=10)
    qa, rng = _model(path), Random(0)
    firsts, seconds_asked, tokens, evidence = [], [], [], list[float]()
    for _ in range(arguments.repeats):
        video, watching = timed(partial(qa.watch, path))
        possible = questions(world, rng, video.plan.times)
        first, second = rng.sample(possible, 2)
        _, asking = timed(partial(video.ask, first.text))
        answer, asking_again = timed(partial(video.ask, second.text))
        firsts.append(watching + asking)
        seconds_asked.append(asking_again)
        tokens.append(answer.usage.answer_tokens)
        evidence += _evidence_shares(video, [question.text for question in rng.choices(possible, k=TOLD)])
        video.close()
    first_time, second_time = Spread.of(firsts), Spread.of(seconds_asked)
    share, telling = ratio(seconds_asked, firsts), Spread.of(evidence)
    print(f"{seconds} s of video, {answer.usage.frames} frames, {answer.usage.prompt_tokens} tokens")
    print(f"watch and first question  {first_time:.2f} s")
    print(f"second question           {second_time:.3f} s, {share:.1%} of it; {min(tokens)} to {max(tokens)} tokens")
    print(f"evidence                  {telling:.1%} of an ask on one core; {len(evidence)} asks")
    answered = meets("second over first", share.median, SECOND_QUESTION, ".1%")
    told = meets("evidence, of an ask,", telling.median, EVIDENCE, ".1%")
    return {
        "frames": answer.usage.frames,
        "prompt_tokens": answer.usage.prompt_tokens,
        "answer_tokens": tokens,
        "first_seconds": first_time,
        "second_seconds": second_time,
        "share": share,
        "evidence": telling,
        "met": answered and told,
    }


def _evidence_shares(video: Video, asked: Sequence[str]) -> list[float]:
    """What share of each ask's time goes into finding its evidence, on one core: what others do there counts less."""
    import torch

    from rrvideo import pipeline
    from rrvideo.evidence import Gaze

    def look_away(*_: object) -> None:
        """The model attends by itself, and no interval is found."""

    shares, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for question in asked:
        start = time.process_time()
        video.ask(question)
        between = time.process_time()
        with patch.object(Gaze, "__call__", look_away), patch.object(pipeline, "intervals", look_away):
            video.ask(question)
        shares.append(1 - (time.process_time() - between) / (between - start))
    torch.set_num_threads(threads)
    return shares


def bench_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Watch the same number of frames of a short and a long video, and with other chunks, each in its own process.

    glibc keeps some of what threads free, and how much differs by a third between turns that do the same. So the goals
    are for processes in which it gives all back at once: those hold what the engine holds. The others are told beside.
    """
    loop, frames = max(1, round(LOOP * arguments.scale)), max(8, round(720 * arguments.scale))
    paths = {minutes: repeated_video(arguments.cache, loop, minutes, width=320, height=240) for minutes in LENGTHS}
    shortest, longest = min(LENGTHS), max(LENGTHS)
    jobs = [(minutes, 1.0, "gives back") for minutes in LENGTHS]
    jobs += [(shortest, chunk, "gives back") for chunk in CHUNKS if chunk != 1]
    jobs += [(minutes, 1.0, "keeps") for minutes in LENGTHS]
    peaks: dict[tuple[int, float, str], list[float]] = {job: [] for job in jobs}
    for _ in range(arguments.repeats):
        for (minutes, chunk, allocator), measured in peaks.items():
            with patch.dict(os.environ, GIVES_BACK if allocator == "gives back" else {}):
                measured.append(apart(_peak_of_watch, paths[minutes], frames, loop * minutes, chunk))
    found = {job: Spread.of(measured) for job, measured in peaks.items()}
    print(f"{frames} frames; MB beyond weights and KV cache")
    for (minutes, chunk, allocator), peak in found.items():
        print(
            f"{minutes * loop:5} s of video, chunks of {chunk:4g} times the usual size  {peak:6.1f}, malloc {allocator}"
        )
    short, long = (found[minutes, 1.0, "gives back"].median for minutes in (shortest, longest))
    by_chunk = [found[shortest, chunk, "gives back"].median for chunk in CHUNKS]
    slope, constant = statistics.linear_regression(CHUNKS, by_chunk)
    off = max(abs(peak - constant - slope * chunk) for peak, chunk in zip(by_chunk, CHUNKS, strict=True))
    print(f"about {constant:.1f} MB and {slope:.1f} MB for the size of a chunk")
    same = meets("difference between the two lengths", abs(long / short - 1), SAME_MEMORY, ".1%")
    linear = meets("distance from that line, over the largest,", off / max(by_chunk), SAME_MEMORY, ".1%")
    return {
        "frames": frames,
        "rows": [
            {"seconds": minutes * loop, "chunk": chunk, "malloc": allocator, "mb": peak}
            for (minutes, chunk, allocator), peak in found.items()
        ],
        "difference": round(long / short - 1, 4),
        "constant_mb": round(constant, 2),
        "chunk_mb": round(slope, 2),
        "off_line": round(off / max(by_chunk), 4),
        "met": same and linear,
    }


def bench_first_answer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Watch a video of which each stage of the embedded model has its share; see `first_answer`."""
    loop = max(1, round(LOOP * arguments.scale))
    path = repeated_video(arguments.cache, loop, 6, width=384, height=288)
    sampling: dict[str, Any] = {"fps": 4.5, "max_frames": 27 * loop, "timestamps": False}
    return first_answer(_model(path), path, sampling, arguments.repeats)


def first_answer(qa: VideoQA, path: Path, sampling: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Run each stage alone over all frames, all at once without waiting for one another, and a watch with an answer."""
    from rrvideo import budget

    plan = budget.plan(qa.checkpoint, path, **sampling)
    alone = _Alone(qa.checkpoint, plan)
    stages: dict[str, Callable[[], object]] = {name: getattr(alone, name) for name in ("decode", "encode", "prefill")}

    def answer() -> None:
        with qa.watch(path, **sampling) as video:
            video.ask(QUESTION, max_new_tokens=8)

    works = stages | {"at once": alone.at_once, "answer": answer}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + repeats):
        for name, run in works.items():
            taken[name].append(timed(run)[1])
    taken = {name: measured[1:] for name, measured in taken.items()}  # the first turn may compile kernels
    times = {name: Spread.of(measured) for name, measured in taken.items()}
    longest = [max(turn) for turn in zip(*(taken[name] for name in stages), strict=True)]
    ratios = {name: ratio(taken[name], longest) for name in ("at once", "answer")}
    total = sum(times[name].median for name in stages)
    least = min(times[name].median for name in stages) / total
    print(f"{len(plan.indices)} frames of {plan.width}x{plan.height}, {len(alone.prefix)} tokens")
    for name, spread in times.items():
        share = f"{spread.median / total:.0%} of the three"
        print(f"{name:8} {spread:.2f} s, {share if name in stages else f'{ratios[name]:.2f} times the longest'}")
    met = meets("answer over the longest stage", ratios["answer"].median, FIRST_ANSWER, ".2f")
    if ratios["at once"].median > FIRST_ANSWER:
        print("(out of reach on this machine: the stages at once, with nothing to wait for, take longer than that)")
    if least < LEAST_STAGE:
        print(f"(the goal is for videos of which each stage has {LEAST_STAGE:.0%}, and one has {least:.1%} here)")
    return {
        "frames": len(plan.indices),
        "tokens": len(alone.prefix),
        "seconds": times,
        "over_longest": ratios,
        "least_share": round(least, 4),
        "met": met if least >= LEAST_STAGE else None,
    }


def bench_attention(arguments: argparse.Namespace) -> dict[str, Any]:
    """Watch one video at several numbers of tokens with both kinds of attention, by turns, and ask the same of both."""
    from rrvideo.tiny.evaluate import is_right
    from rrvideo.tiny.world import questions

    world, path = world_video(arguments.cache, math.ceil(1140 * arguments.scale), width=112, height=84, fps=5)
    sparse = _model(path)
    ways = {"rr": sparse, "full": sparse.attending("full")}
    plan = plan_samples(path, max_frames=4, limits=sparse.checkpoint.limits)
    frame_tokens = plan.width * plan.height / 28**2 / 2  # a token sees 28x28 pixels of two frames
    rows = []
    for tokens in TOKENS:
        frames = 2 * math.ceil(tokens * arguments.scale / frame_tokens / 2)
        sampling: dict[str, Any] = {"fps": 5.0, "max_frames": frames, "timestamps": False}
        taken: dict[str, list[float]] = {way: [] for way in ways}
        videos: dict[str, Video] = {}
        for _ in range(arguments.repeats):
            for way, qa in ways.items():
                videos[way], seconds = timed(partial(qa.watch, path, **sampling))
                taken[way].append(seconds)
        possible = questions(world, Random(0), videos["rr"].plan.times, TIMELESS)
        asked = Random(0).sample(possible, min(ASKED, len(possible)))
        said = {way: [video.ask(question.text).text for question in asked] for way, video in videos.items()}
        right = {way: sum(map(is_right, asked, texts, [0.0] * len(asked))) for way, texts in said.items()}
        usage = videos["rr"].ask(QUESTION).usage
        row = {
            "visual_tokens": usage.visual_tokens,
            "frames": usage.frames,
            "seconds": {way: Spread.of(measured) for way, measured in taken.items()},
            "full_over_rr": ratio(taken["full"], taken["rr"]),
            "density": round(videos["rr"].density, 4),
            "asked": len(asked),
            "same_answers": sum(one == other for one, other in zip(*said.values(), strict=True)),
            "right": right,
        }
        print(f"{usage.visual_tokens} visual tokens, density {row['density']:.3f}, {usage.frames} frames")
        for way, spread in row["seconds"].items():
            print(f"  {way:4} watch {spread:.2f} s, {right[way]} of {len(asked)} answers right")
        print(f"  full over rr {row['full_over_rr']:.2f}, {row['same_answers']} answers the same", flush=True)
        rows.append(row)
    return {"rows": rows, "met": None}  # no goal is set: the ratio is to be reported


class _Alone:
    """The stages of a watch one after the other, each over all of what the one before it has made."""

    def __init__(self, checkpoint: Checkpoint, plan: SamplePlan) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        self.prefix = checkpoint.prefix(plan.times, (plan.height, plan.width), timestamps=False)
        self.frames: list[Frame] = []
        self.features: list[torch.Tensor] = []

    def decode(self) -> None:
        self.frames = list(read_frames(self.plan))

    def encode(self) -> None:
        from rrvideo import engine

        chunks = engine._encoded(self.checkpoint, iter(self.frames), self.plan, engine._Stopwatch())
        self.features = [features for _, features in chunks]  # the stopwatch waits for the device

    def prefill(self) -> None:
        from rrvideo import engine

        cache, tokens = engine.new_cache(self.checkpoint, len(self.prefix)), len(self.prefix)
        prefill = engine._Prefill(self.checkpoint, cache, tokens, engine.Cancel(), engine._Stopwatch())
        for features in self.features:
            prefill.extend(self.prefix, features)
        prefill.finish(self.prefix)

    def at_once(self) -> None:
        """Run all in threads that have what they need: about the least that overlapping them could take here."""
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda work: work(), (self.decode, self.encode, self.prefill)))


def _peak_of_watch(path: Path, frames: int, seconds: float, chunk: float) -> float:
    """MB that watching `frames` frames of `seconds` takes at most, beyond weights and KV cache, on a CPU.

    Chunks are `chunk` times as large as the engine would make them. Changes this process: to be run in one of its own.
    """
    from rrvideo import VideoQA, budget

    hush_transformers(keep_downloads=False)
    qa = VideoQA.load("tiny", device="cpu")
    qa.watch(SAMPLE, max_frames=4).ask(QUESTION)  # what is loaded once; of `path` nothing is to be left over
    budget.CHUNK_FRAMES = round(budget.CHUNK_FRAMES * chunk)
    budget.CHUNK_TOKENS = round(budget.CHUNK_TOKENS * chunk)
    before = resident("VmRSS")
    video = qa.watch(path, fps=2 * frames / seconds, max_frames=frames)
    peak = resident("VmHWM")
    tokens = video.ask(QUESTION).usage.prompt_tokens
    return peak - before - budget.kv_bytes(qa.checkpoint, tokens) / 1e6


def _model(path: Path) -> VideoQA:
    """The embedded model, once it has watched a little and answered: so what is prepared only once is not measured."""
    from rrvideo import VideoQA

    qa = VideoQA.load("tiny")
    qa.watch(path, max_frames=32).ask(QUESTION)
    return qa


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "questions": bench_questions,
    "memory": bench_memory,
    "first-answer": bench_first_answer,
    "attention": bench_attention,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rrvideo bench engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="run this one only; may be given again")
    parser.add_argument("--repeats", metavar="N", type=options.count, default=5, help="turns of each run (default: 5)")
    parser.add_argument(
        "--scale", metavar="X", type=options.positive, default=1.0, help="times the length of all videos, to try it"
    )
    folder = Path(tempfile.gettempdir()) / "rrvideo-bench"
    parser.add_argument("--cache", metavar="FOLDER", type=Path, default=folder, help="where the videos are kept")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the last line there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
