"""What `rrvideo eval` takes on the command line: which questions of a set, and what their answers depend on."""

from __future__ import annotations

import argparse
from typing import Any

from rreval.settings import PRESETS
from rrvideo import options

__all__ = ["add_set", "add_settings"]


def add_set(parser: argparse.ArgumentParser) -> None:
    """Options that say where a set is, and which of its questions are meant."""
    parser.add_argument(
        "source",
        metavar="SET",
        help="the set's folder or table, its id on the hub, or the word 'world' for a small one that is drawn here",
    )
    parser.add_argument("--videos", metavar="FOLDER", help="where data/ and subtitle/ are (default: beside the table)")
    for name, metavar, what in (
        ("--duration", "D,...", "short, medium or long"),
        ("--domain", "D,...", "such as Knowledge"),
        ("--ids", "ID,...", "videos by video_id or videoID, or questions; --ids=ID for one that begins with -"),
    ):
        parser.add_argument(name, type=_names, default=(), metavar=metavar, help=f"only these: {what}")
    parser.add_argument("--limit", metavar="N", type=options.count, help="only the first N videos of these")


def _names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Options for what answers depend on. They have no defaults: what is not given, `settings.choices_of` says."""
    group = parser.add_argument_group("settings", "A run has one set of these; what is given overrides the preset.")
    group.add_argument("--preset", choices=sorted(PRESETS), help="a published configuration")

    def add(name: str, help: str, **rest: Any) -> None:
        group.add_argument(name, default=argparse.SUPPRESS, help=help, **rest)

    add("--attention", "RRAttention, or full attention (default: rr)", choices=("rr", "full"))
    add("--tau", "the share of attention that RRAttention keeps (default: 0.95)", metavar="SHARE", type=options.share)
    add("--rule", options.RULE, choices=options.RULES)
    add("--head-weights", options.HEAD_WEIGHTS, metavar="FILE", type=options.head_weights)
    add("--fps", "frames a second (default: 1)", metavar="F", type=options.positive)
    add("--max-frames", "frames at most (default: 768)", metavar="N", type=options.count)
    add("--sampling", "evenly spread frames, or keyframes (default: uniform)", choices=("uniform", "keyframes"))
    add("--fit", "take fewer frames where the model has no room for so many", action=argparse.BooleanOptionalAction)
    add("--reader", "what decodes (default: pyav)", choices=("pyav", "decord"))
    add("--timestamps", "write the frames' times into the prompt", action=argparse.BooleanOptionalAction)
    for name, what in (("min", "a frame, at least"), ("max", "a frame, at most"), ("total", "all pairs of frames")):
        add(f"--{name}-pixels", f"pixels of {what} (default: the model's)", metavar="N", type=options.count)
    add("--subtitles", "put subtitles into the prompt", action=argparse.BooleanOptionalAction)
    add("--max-new-tokens", "how long an answer may get (default: 128)", metavar="N", type=options.count)
