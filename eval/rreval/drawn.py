"""What `rrvideo eval needle` and `rrvideo eval world` take on the command line: they draw their own videos."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rrvideo import options

__all__ = ["add_needle", "add_world"]


def add_needle(commands: Any) -> argparse.ArgumentParser:
    """The visual needle test."""
    needle: argparse.ArgumentParser = commands.add_parser(
        "needle",
        help="find one odd scene at each depth of videos of each length",
        description="Hide one odd scene at each depth of videos of each length, and see whether the model finds it: "
        "with full attention and with RRAttention, as a table and a heatmap. Stopped in any way, the same command goes "
        "on where it was, and other lengths, depths or shares of attention add to what is there.",
        epilog="The embedded model has room for up to 32K.",
    )
    needle.add_argument("--out", metavar="RUN", type=Path, required=True, help="the folder that the results go to")
    for name, kind, metavar, what in (
        ("--lengths", _length, "N", "visual tokens, such as 1024 or 32K (default: 1K 2K 4K 8K)"),
        ("--depths", _depth, "PERCENT", "0 is a video's beginning, 100 its end (default: 0 25 50 75 100)"),
        ("--taus", options.share, "SHARE", "shares of attention that RRAttention keeps (default: 0.95)"),
    ):
        needle.add_argument(name, nargs="+", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=what)
    needle.add_argument(
        "--videos",
        metavar="N",
        type=options.count,
        default=argparse.SUPPRESS,
        help="for each length and depth (default: 2)",
    )
    needle.add_argument("--rule", choices=options.RULES, default="default", help=options.RULE)
    needle.add_argument("--head-weights", metavar="FILE", type=options.head_weights, help=options.HEAD_WEIGHTS)
    options.add_model(needle)
    needle.add_argument("--device-map", metavar="MAP", help="auto: spread a large model over all GPUs of the machine")
    needle.add_argument("--json", action="store_true", help="print one JSON document")
    needle.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return needle


def _length(text: str) -> int:
    """1024 or 1K."""
    number, thousands = text.upper().removesuffix("K"), text.upper().endswith("K")
    return options.count(number) * (1024 if thousands else 1)


def _depth(text: str) -> float:
    """A depth in per cent as a share."""
    try:
        depth = float(text) / 100
    except ValueError:
        depth = -1.0
    if not 0 <= depth <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 100, got {text!r}")
    return depth


def add_world(commands: Any) -> argparse.ArgumentParser:
    """A set in Video-MME's form."""
    world: argparse.ArgumentParser = commands.add_parser(
        "world",
        help="make a small set in Video-MME's form",
        description="Draw 30 videos with 90 questions from the embedded model's world, in Video-MME's form and layout. "
        "Without FOLDER it is the set that `rrvideo eval videomme world` answers, which draws it too where it is not "
        "there yet.",
    )
    world.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        nargs="?",
        help="where to (default: a place of its own, which is printed)",
    )
    world.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return world
