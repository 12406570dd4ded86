"""The `rrvideo` command: it reads arguments and prints, and leaves the rest to the other rooms.

stdout carries the answer, or one JSON document; stderr carries progress. Exit codes: 0 done; 1 a known failure, told in
one line with a hint; 2 wrong usage; 130 interrupted. RRVIDEO_DEBUG=1 adds the traceback to a known failure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from rrvideo.clock import format_time, parse_clip
from rrvideo.errors import RRVideoError

if TYPE_CHECKING:
    from rrvideo.pipeline import Answer, Video

__all__ = ["main"]

SAMPLE = Path(__file__).parent / "tiny" / "sample.mp4"
EMBEDDED_MODEL = (
    "rrvideo: this is the embedded model: it knows only coloured shapes that move over coloured backgrounds, and shows "
    "that this machine works. For real videos add --model Qwen/Qwen2-VL-7B-Instruct"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _run(argv)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
    except RRVideoError as error:
        if os.environ.get("RRVIDEO_DEBUG") == "1":
            traceback.print_exc()
        print(f"rrvideo: {error.message}", *([f"  {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    return code


def _run(argv: Sequence[str]) -> int:
    commands = _other_commands()
    if argv and argv[0] in commands:
        sys.argv = [f"rrvideo {argv[0]}", *argv[1:]]
        return commands[argv[0]]()() or 0
    arguments = _parser(sorted(commands)).parse_args(argv)
    return arguments.run(arguments)


def _other_commands() -> dict[str, Callable[[], Callable[[], int | None]]]:
    """How to load each command that parses its own arguments: a function that reads `sys.argv`, as scripts' do.

    Other packages add theirs as entry points of the group `rrvideo.commands`; nothing is imported before it is called.
    """
    plugins = {entry.name: entry.load for entry in metadata.entry_points(group="rrvideo.commands")}
    return {"bench": lambda: import_module("rrvideo.bench").main, **plugins}


def _parser(others: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rrvideo",
        description="Watch a long video once, ask it many questions.",
        epilog=f"Further commands, each with its own --help: {', '.join(others)}.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_ask(commands)
    info = commands.add_parser("info", help="say what is in a video file", description="Say what is in a video file.")
    info.add_argument("video", metavar="VIDEO", help="a file, or the word 'sample'")
    info.set_defaults(run=_info)
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine can run, and what is missing",
        description="Say what this machine can run, and what to do about what is missing.",
    )
    doctor.set_defaults(run=_doctor)
    for command in (info, doctor):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _add_ask(commands: Any) -> None:
    ask = commands.add_parser(
        "ask",
        help="ask questions about a video",
        description="Watch a video once and answer questions about it, each on its own.",
        epilog="Try: rrvideo ask sample 'What appears first?'",
    )
    ask.add_argument("video", metavar="VIDEO", help="a file, or the word 'sample' for the one that comes with rrvideo")
    ask.add_argument("questions", metavar="QUESTION", nargs="+", type=_question)
    ask.add_argument(
        "--model",
        metavar="M",
        help="a folder in Hugging Face format, or a hub id such as Qwen/Qwen2-VL-7B-Instruct "
        "(default: $RRVIDEO_MODEL, else the small embedded model)",
    )
    ask.add_argument("--clip", metavar="START-END", type=_clip, default=(None, None), help="such as 1:30-2:45 or 90-")
    ask.add_argument("--fps", metavar="F", type=_positive, default=1.0, help="frames a second to look at (default: 1)")
    ask.add_argument(
        "--max-frames", metavar="N", type=_count, default=768, help="frames to look at, at most (default: 768)"
    )
    ask.add_argument(
        "--sampling",
        choices=("uniform", "keyframes"),
        default="uniform",
        help="evenly spread frames, or the nearest keyframes, which are decoded many times faster (default: uniform)",
    )
    ask.add_argument("--reader", choices=("pyav", "decord"), default="pyav", help="what decodes (default: pyav)")
    ask.add_argument(
        "--attention", choices=("rr", "full"), default="rr", help="RRAttention, or full attention (default: rr)"
    )
    ask.add_argument(
        "--tau",
        metavar="SHARE",
        type=_share,
        default=0.95,
        help="the share of the attention that RRAttention keeps, up to 1 (default: 0.95)",
    )
    ask.add_argument(
        "--max-new-tokens", metavar="N", type=_count, default=256, help="how long an answer may get (default: 256)"
    )
    ask.add_argument("--json", action="store_true", help="print one JSON document")
    ask.add_argument("--quiet", action="store_true", help="no progress on stderr")
    ask.set_defaults(run=_ask)


def _ask(arguments: argparse.Namespace) -> int:
    from rrvideo.video import probe

    path = _path(arguments.video)
    probe(path)  # a file that is no video should not have to wait for the model
    model = arguments.model or os.environ.get("RRVIDEO_MODEL")
    if not model:
        print(EMBEDDED_MODEL, file=sys.stderr)
    status = _Status(quiet=arguments.quiet)
    try:
        with _watch(arguments, path, model or "tiny", status) as video:
            status.clear()
            for warning in video.warnings:
                print(f"rrvideo: {warning}", file=sys.stderr)
            if arguments.json:
                _print_answers_as_json(arguments, video, model or "tiny", status)
            else:
                _print_answers(arguments, video, status)
    finally:
        status.clear()
    return 0


def _watch(arguments: argparse.Namespace, path: Path, model: str, status: _Status) -> Video:
    status.show(f"loading {model}")
    from rrattention import RRConfig
    from rrvideo.pipeline import VideoQA

    _hush_transformers(keep_downloads=not arguments.quiet)
    qa = VideoQA.load(model, attention=arguments.attention, config=RRConfig(tau=arguments.tau))
    stages = {"frames": f"watching {path.name}", "tokens": "reading what was seen"}
    start, end = arguments.clip
    return qa.watch(
        path,
        fps=arguments.fps,
        start=start,
        end=end,
        max_frames=arguments.max_frames,
        sampling=arguments.sampling,
        reader=arguments.reader,
        progress=lambda stage, done, total: status.show(stages[stage], f"{done:,} of {total:,} {stage}"),
    )


def _print_answers(arguments: argparse.Namespace, video: Video, status: _Status) -> None:
    for number, question in enumerate(arguments.questions):
        if len(arguments.questions) > 1:
            status.clear()
            print(*[""] * bool(number), f"> {question}", sep="\n", flush=True)
        stream = video.stream(question, max_new_tokens=arguments.max_new_tokens)
        for piece in stream:
            status.clear()
            print(piece, end="", flush=True)
        status.clear()
        print()
        answer = stream.finish()
        for moment in answer.evidence:
            print(f"  {format_time(moment.start)}-{format_time(moment.end)}  {100 * moment.weight:.0f} %")
        sys.stdout.flush()
        status.remark(_statistics(answer))


def _print_answers_as_json(arguments: argparse.Namespace, video: Video, model: str, status: _Status) -> None:
    answers = []
    for number, question in enumerate(arguments.questions, start=1):
        status.show("answering", f"{number} of {len(arguments.questions)}")
        answer = video.ask(question, max_new_tokens=arguments.max_new_tokens)
        answers.append({"question": question, **answer.to_dict()})
    status.clear()
    _print_json({"model": model, "attention": arguments.attention, "video": video.to_dict(), "answers": answers})


def _statistics(answer: Answer) -> str:
    usage, seconds = answer.usage, answer.timings
    return (
        f"{usage.frames} frames, {usage.prompt_tokens:,} tokens; decode {seconds.decode:.1f} s, encode "
        f"{seconds.encode:.1f} s, prefill {seconds.prefill:.1f} s, answer {seconds.generate:.1f} s; "
        f"density {answer.density:.2f}"
    )


def _info(arguments: argparse.Namespace) -> int:
    from rrvideo.video import probe

    info = probe(_path(arguments.video))
    if arguments.json:
        _print_json(info.to_dict())
        return 0
    rotated = f", rotated by {info.rotation} degrees" if info.rotation else ""
    print(f"file       {info.path}")
    print(f"format     {info.codec} in {info.container}")
    print(f"size       {info.width} x {info.height}{rotated}")
    print(f"length     {format_time(info.duration)} ({info.duration:.2f} s)")
    print(f"frames     {info.frame_count:,} at {info.fps:.5g} a second, {info.keyframe_count:,} of them keyframes")
    for warning in info.warnings:
        print(f"warning    {warning}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from rrvideo.doctor import examine

    checks = examine()
    if arguments.json:
        _print_json({"checks": [check.to_dict() for check in checks]})
    else:
        for check in checks:
            print(f"{check.status:8} {check.name:16} {check.found}")
            if check.advice:
                print(f"{'':25} {check.advice}")
    return int(any(check.status == "missing" for check in checks))


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _path(name: str) -> Path:
    path = Path(name)
    return SAMPLE if name == "sample" and not path.exists() else path


def _hush_transformers(*, keep_downloads: bool) -> None:
    """Keep its loading bars off the screen, but not those of a download, which takes long."""
    from rrvideo.compat import mend_torchvision

    mend_torchvision()
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging

    downloads = keep_downloads and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


class _Status:
    """What is going on, on stderr: one line that is written anew on a terminal, one for each stage elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._stage = ""

    def show(self, stage: str, detail: str = "") -> None:
        if self._quiet:
            return
        if self._live:
            line = f"{stage} {detail}"[: get_terminal_size().columns - 1]
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif stage != self._stage:
            print(stage, file=sys.stderr, flush=True)
        self._stage = stage

    def clear(self) -> None:
        if self._live and self._stage:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._stage = ""

    def remark(self, text: str) -> None:
        if not self._quiet:
            print(f"\033[2m{text}\033[0m" if self._live else text, file=sys.stderr, flush=True)


def _question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a question must not be empty")
    return text


def _clip(text: str) -> tuple[float | None, float | None]:
    try:
        return parse_clip(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> float:
    return _number(text, lambda value: 0 < value < math.inf, "a number above 0")


def _share(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "a number above 0, and 1 at most")


def _count(text: str) -> int:
    return int(_number(text, lambda value: value >= 1 and value.is_integer(), "a whole number above 0"))


def _number(text: str, valid: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not valid(value):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value
