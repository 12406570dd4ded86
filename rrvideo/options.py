"""What several commands take on the command line, and how it is read: model, sampling, and numbers within bounds."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrvideo.clock import parse_clip

if TYPE_CHECKING:
    from rrattention import RRConfig

__all__ = [
    "HEAD_WEIGHTS",
    "RULE",
    "RULES",
    "AppendQuery",
    "add_attention",
    "add_model",
    "add_reading",
    "add_sampling",
    "clip",
    "count",
    "head_weights",
    "positive",
    "question",
    "rr_config",
    "share",
    "table",
    "watch_options",
]

RULES = ("default", "paper", "fine")  # those of rrattention, which would import torch
RULE = "which blocks RRAttention keeps: by its own default rule, the paper's, or a finer one (default: default)"
HEAD_WEIGHTS = "how much each head of the model matters: what `rrvideo bench calibrate` has written"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that say which model, where it runs and in which type."""
    parser.add_argument(
        "--model",
        metavar="M",
        help="a folder in Hugging Face format, or a hub id such as Qwen/Qwen2-VL-7B-Instruct "
        "(default: $RRVIDEO_MODEL, else the small embedded model)",
    )
    parser.add_argument("--device", metavar="D", default="auto", help="such as cpu or cuda:1 (default: a GPU, if any)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="the type of the weights (default: the checkpoint's own; float32 on a CPU)",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options that say which frames are looked at."""
    parser.add_argument(
        "--clip",
        metavar="START-END",
        type=clip,
        default=(None, None),
        help="such as 1:30-2:45, 90-, or --clip=-0:45 with an equals sign",
    )
    parser.add_argument("--fps", metavar="F", type=positive, default=1.0, help="frames a second (default: 1)")
    parser.add_argument("--max-frames", metavar="N", type=count, default=768, help="frames at most (default: 768)")
    parser.add_argument(
        "--sampling",
        choices=("uniform", "keyframes"),
        default="uniform",
        help="evenly spread frames, or the nearest keyframes, which are decoded many times faster (default: uniform)",
    )
    parser.add_argument("--fit", action="store_true", help="take fewer frames where the model has no room for so many")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options that say how frames are decoded and where what was seen is kept."""
    parser.add_argument("--reader", choices=("pyav", "decord"), default="pyav", help="what decodes (default: pyav)")
    parser.add_argument(
        "--cache",
        choices=("device", "offload"),
        default="device",
        help="keep the KV cache on the model's device, or offload it to the CPU's memory (default: device)",
    )


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Options that say how the model attends."""
    parser.add_argument(
        "--attention", choices=("rr", "full"), default="rr", help="RRAttention, or full attention (default: rr)"
    )
    parser.add_argument(
        "--tau",
        metavar="SHARE",
        type=share,
        default=0.95,
        help="the share of the attention that RRAttention keeps, up to 1 (default: 0.95)",
    )
    parser.add_argument("--rule", choices=RULES, default="default", help=RULE)
    parser.add_argument("--head-weights", metavar="FILE", type=head_weights, help=HEAD_WEIGHTS)


class AppendQuery(argparse.Action):
    """Collects each `NAME=KIND: QUESTION` of a scan."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        """Add one; what is wrong with it is wrong usage."""
        from rrvideo.scan import check_columns, parse_query

        try:
            queries = [*(getattr(namespace, self.dest) or []), parse_query(value)]
            check_columns(queries)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        setattr(namespace, self.dest, queries)


def watch_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `VideoQA.watch` takes of what `add_sampling` and `add_reading` have read."""
    start, end = arguments.clip
    names = ("fps", "max_frames", "sampling", "fit", "reader", "cache")
    return {"start": start, "end": end, **{name: getattr(arguments, name) for name in names}}


def rr_config(rule: str, tau: float, head_weights: tuple[tuple[float, ...], ...] | None) -> RRConfig:
    """What RRAttention is to do by what `add_attention` has read."""
    from rrattention.config import RULES

    return replace(RULES[rule](tau=tau), head_weights=head_weights)


def question(text: str) -> str:
    """A question that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a question must not be empty")
    return text


def table(name: str) -> Path:
    """The file of a scan, whose suffix says its format."""
    from rrvideo.events import SUFFIXES

    if Path(name).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end with {' or '.join(SUFFIXES)}, got {name!r}")
    return Path(name)


def clip(text: str) -> tuple[float | None, float | None]:
    """`1:30-2:45` as seconds."""
    try:
        return parse_clip(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, lambda value: 0 < value < math.inf, "a number above 0")


def share(text: str) -> float:
    """A number above 0, and 1 at most."""
    return _number(text, lambda value: 0 < value <= 1, "a number above 0, and 1 at most")


def count(text: str) -> int:
    """A whole number above 0."""
    return int(_number(text, lambda value: value >= 1 and value.is_integer(), "a whole number above 0"))


def head_weights(name: str) -> tuple[tuple[float, ...], ...] | None:
    """The weights in a file that `rrvideo bench calibrate` has written."""
    from rrattention import RRConfig

    try:
        weights = json.loads(Path(name).read_text(encoding="utf-8"))
        return RRConfig(head_weights=weights or ()).head_weights
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no text, no JSON, or other JSON
        raise argparse.ArgumentTypeError(f"{name} is not what rrvideo bench calibrate writes: {error}") from error


def _number(text: str, valid: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not valid(value):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value
