"""Measure the embedded model on held-out videos: `python -m rrvideo.tiny.evaluate`, `--card` to write its model card.

Each video is drawn from a seed that training never uses, encoded as H.264, and goes through the whole pipeline: file,
sampling, tokens, prefill, greedy decoding. An answer counts when it is exact; a time, when it lies within one temporal
step (two sampled frames) of the moment. The evidence for an answer about one of several scenes counts when its
strongest interval meets that scene.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rrattention import RRConfig
from rrvideo.pipeline import EMBEDDED, VideoQA

from .drawing import write_video
from .world import (
    CHOICE_KINDS,
    KINDS,
    MAX_SCENES,
    SHORT_KINDS,
    Question,
    draw_world,
    multiple_choice,
    questions,
    scene_of,
)

CARD = EMBEDDED["tiny"] / "README.md"
CHAT = 3  # questions


@dataclass(frozen=True, slots=True)
class Clip:
    """A held-out video: its length, its file, and how it is sampled."""

    seed: int
    seconds: float
    width: int
    height: int
    file_fps: int
    fps: float


@dataclass(frozen=True, slots=True)
class Result:
    """One question that was asked, and what came back."""

    group: str
    kind: str
    question: str
    expected: str
    answer: str
    right: bool
    density: float


SIZES = ((320, 240), (384, 216), (240, 320), (256, 256), (480, 270))


def short_clips(count: int) -> Iterator[Clip]:
    """Videos of 5 seconds to a minute, at several sizes and frame rates."""
    for seed in range(count):
        seconds = (5, 10, 20, 40, 60)[seed % 5]
        fps = (4.0, 2.0, 1.0, 1.0, 0.5)[seed % 5] if seed // 5 % 2 else (2.0, 1.0, 1.0, 0.5, 1.0)[seed % 5]
        width, height = SIZES[(seed + seed // 5) % len(SIZES)]
        yield Clip(seed, seconds, width, height, file_fps=(8, 12, 10)[seed % 3], fps=fps)


def long_clips(count: int) -> Iterator[Clip]:
    """Videos of 10 minutes."""
    for seed in range(count):
        width, height = ((192, 144), (256, 144), (144, 192))[seed % 3]
        yield Clip(1000 + seed, 600, width, height, file_fps=2, fps=1.0)


def measure(qa: VideoQA, clips: Iterable[Clip], group: str, cache: Path) -> Iterator[Result]:
    """Ask one question of each kind about each clip, open and as multiple choice, and then chat about it."""
    for clip in clips:
        rng = Random(f"held-out {clip.seed}")
        step = 2 / clip.fps
        most = min(MAX_SCENES, int(clip.seconds / (2 * step)))
        world = draw_world(rng, clip.seconds, rng.randint(1, max(1, most)), shortest=min(clip.seconds, 2 * step))
        path = cache / f"{clip.seed}.mp4"
        if not path.exists():
            write_video(world, path, width=clip.width, height=clip.height, fps=clip.file_fps)
        with qa.watch(path, fps=clip.fps) as video:
            times = video.plan.times
            for kind in KINDS:
                possible = questions(world, rng, times, [kind])
                if not possible:
                    continue
                question = rng.choice(possible)
                forms = [(kind, question)]
                if kind in CHOICE_KINDS:
                    forms.append(("choice", multiple_choice(question, world, rng, times)))
                for name, form in forms:
                    answer = video.ask(form.text)
                    right = is_right(form, answer.text, step)
                    yield Result(group, name, form.text, form.answer, answer.text, right, answer.density)
                    scene = scene_of(question, world)
                    if form is question and scene and len(world.scenes) > 1:
                        seen = answer.evidence[0]
                        where = f"{seen.start:.1f}-{seen.end:.1f}", f"{scene.start:.1f}-{scene.end:.1f}"
                        meets = seen.start < scene.end and scene.start < seen.end
                        yield Result(group, "evidence", form.text, where[1], where[0], meets, answer.density)
            chat = video.chat()
            for question in rng.sample(questions(world, rng, times, SHORT_KINDS), CHAT):
                answer = chat.ask(question.text)
                right = is_right(question, answer.text, step)
                yield Result(group, "chat", question.text, question.answer, answer.text, right, answer.density)


def is_right(question: Question, answer: str, step: float) -> bool:
    """Whether an answer is exact, but for times that are no more than a temporal step (seconds) away."""
    if question.options:
        return answer == question.answer
    said, meant = (text.replace(",", " ").split() for text in (answer, question.answer))
    return len(said) == len(meant) and all(a == b or _near(a, b, step) for a, b in zip(said, meant, strict=True))


def _near(a: str, b: str, step: float) -> bool:
    seconds, others = _seconds(a), _seconds(b)
    return seconds is not None and others is not None and abs(seconds - others) <= step


def _seconds(text: str) -> int | None:
    minutes, colon, seconds = text.partition(":")
    return int(minutes) * 60 + int(seconds) if colon and minutes.isdigit() and seconds.isdigit() else None


def table(results: list[Result]) -> str:
    """Right answers by kind and group, as Markdown."""
    groups = list(dict.fromkeys(result.group for result in results))
    scores: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for result in results:
        scores[result.kind, result.group].append(result.right)
        if result.kind in KINDS:
            scores["open, all kinds", result.group].append(result.right)
    rows = ["open, all kinds", "choice", "chat", *KINDS, "evidence"]
    named = {
        "choice": "multiple choice",
        "chat": f"one of {CHAT} in a chat",
        "evidence": "evidence meets the scene",
    }
    lines = ["| | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups)]
    for row in rows:
        cells = [scores[row, group] for group in groups]
        shown = " | ".join(f"{sum(cell)}/{len(cell)} = {sum(cell) / max(1, len(cell)):.0%}" for cell in cells)
        lines.append(f"| {named.get(row, row)} | {shown} |")
    density = [
        [result.density for result in results if result.group == group and result.density == result.density]
        for group in groups
    ]
    lines.append("| density | " + " | ".join(f"{sum(d) / max(1, len(d)):.3f}" for d in density) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a checkpoint of this world")
    parser.add_argument("--short", type=int, default=60, help="videos of up to a minute")
    parser.add_argument("--long", type=int, default=20, help="videos of ten minutes")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "rrvideo-held-out")
    parser.add_argument("--card", action="store_true", help=f"write the figures into {CARD.name} beside the weights")
    parser.add_argument("--wrong", action="store_true", help="show the questions that were answered wrong")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)

    results: list[Result] = []
    sparse = VideoQA.load(args.model, config=RRConfig(min_tokens=0))  # on a CPU ten minutes would be too short for it
    full = VideoQA.load(args.model, attention="full")
    results += measure(full, short_clips(args.short), "up to 1 minute", args.cache)
    results += measure(sparse, long_clips(args.long), "10 minutes, RRAttention", args.cache)
    results += measure(full, long_clips(args.long), "10 minutes, full attention", args.cache)
    shown = table(results)
    print(f"{platform.machine()}, {os.cpu_count()} cores\n{shown}")
    if args.wrong:
        for result in results:
            if not result.right:
                print(f"{result.group}  {result.question!r}  expected {result.expected!r}, got {result.answer!r}")
    if args.card:
        head, marker, _ = CARD.read_text(encoding="utf-8").partition("<!-- measured -->")
        CARD.write_text(f"{head}{marker}\n\n{shown}\n", encoding="utf-8")
    print(json.dumps({"benchmark": "tiny", "right": sum(r.right for r in results), "asked": len(results)}))


if __name__ == "__main__":
    main()
