"""The `rrvideo` command: it reads arguments and prints, and leaves the rest to the other rooms.

stdout carries the answer, or JSON; stderr carries progress. Exit codes: 0 done; 1 a known failure, told in
one line with a hint; 2 wrong usage; 130 interrupted. RRVIDEO_DEBUG=1 adds the traceback to a known failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrvideo import options
from rrvideo.clock import format_time
from rrvideo.errors import BudgetError, RRVideoError, VideoError
from rrvideo.terminal import Status, hush_transformers

if TYPE_CHECKING:
    from rrvideo.budget import Budget
    from rrvideo.pipeline import Answer, Video, VideoQA
    from rrvideo.video import SamplePlan, VideoInfo

__all__ = ["main", "video_path"]

SAMPLE = Path(__file__).parent / "tiny" / "sample.mp4"
EMBEDDED_MODEL = (
    "rrvideo: this is the embedded model: it knows only coloured shapes that move over coloured backgrounds, and shows "
    "that this machine works. For real videos add --model Qwen/Qwen2-VL-7B-Instruct"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        code = _run(argv)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
    except RRVideoError as error:
        if os.environ.get("RRVIDEO_DEBUG") == "1":
            traceback.print_exc()
        _tell(error)
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
    _add_scan(commands)
    _add_info(commands)
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine can run, and what is missing",
        description="Say what this machine can run, and what to do about what is missing.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_ask(commands: Any) -> None:
    ask = commands.add_parser(
        "ask",
        help="ask questions about a video",
        description="Watch a video once and answer questions about it, each on its own.",
        epilog="Try: rrvideo ask sample 'What appears first?'",
    )
    ask.add_argument("video", metavar="VIDEO", help="a file, or the word 'sample' for the one that comes with rrvideo")
    ask.add_argument("questions", metavar="QUESTION", nargs="+", type=options.question)
    _add_watching(ask)
    ask.add_argument("--json", action="store_true", help="print one JSON document")
    ask.set_defaults(run=_ask)


def _add_scan(commands: Any) -> None:
    scan = commands.add_parser(
        "scan",
        help="ask each minute of long videos the same questions",
        description="Slide a window over videos, ask each window the same questions, and write a row of answers for "
        "each. A scan that was stopped goes on where it was when the same command is given again.",
        epilog="Try: rrvideo scan sample --every 10 --window 10 --ask 'red=yes/no: Is there a red circle?' "
        "--ask 'first=text: What appears first?'",
    )
    scan.add_argument("videos", metavar="VIDEO", nargs="+", help="files, or the word 'sample'")
    scan.add_argument(
        "--ask",
        metavar="NAME=KIND: QUESTION",
        dest="queries",
        action=options.AppendQuery,
        required=True,
        help="a question, the name of its column, and what its answers are: yes/no and choices such as left|right with "
        "their probability, number, or text; give it once for each question",
    )
    for name, what in (("--every", "from one window to the next"), ("--window", "that a window lasts")):
        scan.add_argument(name, metavar="S", type=options.positive, default=60.0, help=f"seconds {what} (default: 60)")
    scan.add_argument(
        "--out", metavar="FILE", type=options.table, help="a .jsonl or .csv file (default: JSON lines on stdout)"
    )
    _add_watching(scan)
    scan.set_defaults(run=_scan)


def _add_info(commands: Any) -> None:
    info = commands.add_parser(
        "info",
        help="say what is in a video file, and what watching it would take",
        description="Say what is in a video file and, with --plan, what a model would see of it and need for that. "
        "No weights are loaded.",
    )
    info.add_argument("video", metavar="VIDEO", help="a file, or the word 'sample'")
    info.add_argument("--plan", action="store_true", help="say which frames, how many tokens and how much memory")
    options.add_model(info)
    options.add_sampling(info)
    info.add_argument("--json", action="store_true", help="print one JSON document")
    info.set_defaults(run=_info)


def _add_watching(command: argparse.ArgumentParser) -> None:
    options.add_model(command)
    options.add_attention(command)
    options.add_sampling(command)
    options.add_reading(command)
    command.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=options.count,
        default=256,
        help="how long an answer may get (default: 256)",
    )
    command.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _ask(arguments: argparse.Namespace) -> int:
    from rrvideo.video import probe

    path = video_path(arguments.video)
    probe(path)  # a file that is no video should not have to wait for the model
    status = Status(quiet=arguments.quiet)
    try:
        qa = _load(arguments, status)
        with qa.watch(path, **options.watch_options(arguments), progress=status.watching(path.name)) as video:
            status.clear()
            for warning in video.warnings:
                print(f"rrvideo: {warning}", file=sys.stderr)
            if arguments.json:
                _print_answers_as_json(arguments, video, status)
            else:
                _print_answers(arguments, video, status)
    finally:
        status.clear()
    return 0


def _load(arguments: argparse.Namespace, status: Status) -> VideoQA:
    model = _model(arguments)
    if model is None:
        print(EMBEDDED_MODEL, file=sys.stderr)
    status.show(f"loading {model or 'tiny'}")
    from rrvideo.pipeline import VideoQA

    hush_transformers(keep_downloads=not arguments.quiet)
    return VideoQA.load(
        model or "tiny",
        attention=arguments.attention,
        config=options.rr_config(arguments.rule, arguments.tau, arguments.head_weights),
        device=arguments.device,
        dtype=arguments.dtype,
    )


def _print_answers(arguments: argparse.Namespace, video: Video, status: Status) -> None:
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


def _print_answers_as_json(arguments: argparse.Namespace, video: Video, status: Status) -> None:
    answers = []
    for number, question in enumerate(arguments.questions, start=1):
        status.show("answering", f"{number} of {len(arguments.questions)}")
        answer = video.ask(question, max_new_tokens=arguments.max_new_tokens)
        answers.append({"question": question, **answer.to_dict()})
    status.clear()
    model = _model(arguments) or "tiny"
    _print_json({"model": model, "attention": arguments.attention, "video": video.to_dict(), "answers": answers})


def _statistics(answer: Answer) -> str:
    usage, seconds = answer.usage, answer.timings
    return (
        f"{usage.frames} frames, {usage.prompt_tokens:,} tokens; decode {seconds.decode:.1f} s, encode "
        f"{seconds.encode:.1f} s, prefill {seconds.prefill:.1f} s, answer {seconds.generate:.1f} s; "
        f"density {answer.density:.2f}"
    )


def _scan(arguments: argparse.Namespace) -> int:
    from rrvideo.events import json_line, record

    questions = {query.name: query.text for query in arguments.queries}
    schema = {query.name: query.kind for query in arguments.queries}
    status = Status(quiet=arguments.quiet)
    failed = False
    try:
        qa = _load(arguments, status)
        for path in map(video_path, arguments.videos):
            status.show(f"scanning {path.name}")
            try:
                scan = qa.scan(
                    path,
                    questions,
                    every=arguments.every,
                    window=arguments.window,
                    schema=schema,
                    max_new_tokens=arguments.max_new_tokens,
                    **options.watch_options(arguments),
                )
                for window in record(scan, arguments.out) if arguments.out else scan:
                    if not arguments.out:
                        status.clear()
                        print(json_line(window, scan), end="", flush=True)
                    if window.error:
                        status.clear()
                        times = f"{format_time(window.start)}-{format_time(window.end)}"
                        print(f"rrvideo: {path.name} {times}: {window.error}", file=sys.stderr)
                    status.show(f"scanning {path.name}", f"{len(scan.windows) - len(scan)} of {len(scan.windows)}")
            except (VideoError, BudgetError) as error:  # of this video: the others may be better
                status.clear()
                _tell(error)
                failed = True
    finally:
        status.clear()
    return int(failed)


def _info(arguments: argparse.Namespace) -> int:
    from rrvideo.video import probe

    path = video_path(arguments.video)
    info = probe(path)
    plan, budget = _plan(arguments, path) if arguments.plan else (None, None)
    if arguments.json:
        planned = {"plan": {"model": _model(arguments) or "tiny", **budget.to_dict()}} if budget else {}
        _print_json({**info.to_dict(), **planned})
        return 0
    _print_info(info)
    if plan and budget:
        _print_plan(plan, budget)
    for warning in plan.warnings if plan else info.warnings:
        print(f"warning    {warning}")
    return 0


def _plan(arguments: argparse.Namespace, path: Path) -> tuple[SamplePlan, Budget]:
    from rrvideo import budget
    from rrvideo.model import load
    from rrvideo.pipeline import EMBEDDED
    from rrvideo.video import plan_samples

    hush_transformers(keep_downloads=True)
    model = _model(arguments) or "tiny"
    checkpoint = load(EMBEDDED.get(model, model), device=arguments.device, dtype=arguments.dtype, weights=False)
    sampling = {name: getattr(arguments, name) for name in ("fps", "max_frames", "sampling")}
    sampling["start"], sampling["end"] = arguments.clip
    if arguments.fit:
        plan = budget.plan(checkpoint, path, timestamps=None, fit=True, **sampling)
    else:
        plan = plan_samples(path, limits=checkpoint.limits, **sampling)
    return plan, budget.estimate(checkpoint, plan)


def _print_info(info: VideoInfo) -> None:
    rotated = f", rotated by {info.rotation} degrees" if info.rotation else ""
    print(f"file       {info.path}")
    print(f"format     {info.codec} in {info.container}")
    print(f"size       {info.width} x {info.height}{rotated}")
    print(f"length     {format_time(info.duration)} ({info.duration:.2f} s)")
    print(f"frames     {info.frame_count:,} at {info.fps:.5g} a second, {info.keyframe_count:,} of them keyframes")


def _print_plan(plan: SamplePlan, budget: Budget) -> None:
    apart = (plan.end - plan.start) / budget.frames
    cut, needed = budget.wanted_frames - budget.frames, f"{budget.positions:,} of {budget.context:,}"
    sizes = budget.weight_bytes, budget.kv_bytes, budget.activation_bytes
    weights, cache, activations = (f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" for size in sizes)
    print(f"plan       {budget.frames:,} frames of {budget.width} x {budget.height}, one every {apart:.3g} s")
    if cut:
        print(f"cut        {cut:,} of the {budget.wanted_frames:,} frames that {plan.fps:g} a second would be")
    print(f"tokens     {budget.prompt_tokens:,}, of which {budget.visual_tokens:,} are the video's")
    print(f"positions  {needed}, where a question and its answer need {budget.room:,}")
    print(f"memory     weights {weights}, KV cache {cache}, activations at most {activations}")
    fewer = f"{budget.largest_frames:,} frames would: --fit or --max-frames {budget.largest_frames} takes them"
    print(
        f"fits       {'yes' if budget.fits else f'no: {fewer}' if budget.largest_frames else 'no, not even one frame'}"
    )


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


def _tell(error: RRVideoError) -> None:
    print(f"rrvideo: {error.message}", *([f"  {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)


def _model(arguments: argparse.Namespace) -> str | None:
    return arguments.model or os.environ.get("RRVIDEO_MODEL") or None


def video_path(name: str) -> Path:
    """The file of that name, or the sample where there is none that is called so."""
    path = Path(name)
    return SAMPLE if name == "sample" and not path.exists() else path
