"""The `rrvideo eval` command: it reads arguments and prints, and leaves the rest to the other rooms."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rreval import drawn
from rreval.options import add_set, add_settings
from rrvideo import options
from rrvideo.errors import RRVideoError
from rrvideo.terminal import Status, hush_transformers

if TYPE_CHECKING:
    from rreval.data import VideoItem
    from rreval.journal import Run
    from rreval.processes import Processes
    from rreval.settings import RunSettings
    from rrvideo.pipeline import VideoQA

__all__ = ["main"]

SOME = 10  # problems that are listed before a run
ONE_PROCESS = (
    "rrvideo: accelerate launch --cpu starts one process, whatever --num_processes says; with --multi_gpu in its place "
    "it starts several, also where there is no GPU"
)


def main() -> int:
    """Run the command line in `sys.argv` and return the exit code."""
    arguments = _parser().parse_args(sys.argv[1:])
    return int(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rrvideo eval", description="Measure a model on Video-MME, or on a set in its form."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_videomme(commands)
    _add_check(commands)
    _add_merge(commands)
    _add_report(commands)
    drawn.add_needle(commands).set_defaults(run=_needle)
    drawn.add_world(commands).set_defaults(run=_world)
    return parser


def _add_videomme(commands: Any) -> None:
    videomme = commands.add_parser(
        "videomme",
        help="answer the questions of Video-MME",
        description="Answer the questions of Video-MME, or of a set in its form. Each answer is on the disk before the "
        "next question; stopped in any way, the same command goes on where it was.",
        epilog="On 8 GPUs: accelerate launch --multi_gpu --num_processes 8 -m rrvideo eval videomme SET --out RUN. "
        "Without a GPU that starts as many processes too (accelerate's --cpu starts one).",
    )
    add_set(videomme)
    videomme.add_argument("--out", metavar="RUN", type=Path, required=True, help="the folder that the answers go to")
    videomme.add_argument("--retry-failed", action="store_true", help="ask again what could not be asked before")
    options.add_model(videomme)
    videomme.add_argument("--device-map", metavar="MAP", help="auto: spread a large model over all GPUs of the machine")
    videomme.add_argument("--cache", choices=("device", "offload"), default="device", help="where the KV cache is kept")
    videomme.add_argument("--quiet", action="store_true", help="no progress on stderr")
    videomme.set_defaults(run=_videomme)
    add_settings(videomme)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="say what of Video-MME is missing or cannot be read",
        description="Read all files of the set, and say what is missing or damaged. Nothing is decoded or asked.",
    )
    add_set(check)
    check.set_defaults(run=_check)


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="put all answers of a run into one file",
        description="Put all answers of a run into its answers.jsonl, with those that other machines have for it. "
        "It may be done at any time and again.",
    )
    merge.add_argument("run_folder", metavar="RUN", type=Path)
    merge.add_argument("others", metavar="OTHER", type=Path, nargs="*", help="a folder of the same run")
    merge.set_defaults(run=_merge)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="say what runs have answered right",
        description="Say what runs, finished or not, have answered right, by every group of questions and with "
        "intervals, and what that took. Several runs are compared with one of them, question by question.",
    )
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="the folder of a run")
    report.add_argument(
        "--baseline", metavar="RUN", type=Path, help="what the others are compared with (default: full attention)"
    )
    form = report.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON document")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    report.add_argument("--html", metavar="FILE", type=Path, help="also write a page with plots, which needs no other")
    report.add_argument(
        "--official", metavar="FILE", type=Path, help="also write the result file for the official scorer, of one run"
    )
    report.set_defaults(run=_report)


def _videomme(arguments: argparse.Namespace) -> int:
    from rreval.processes import Processes, launched_for_cpu

    processes = Processes.join()
    if processes.count == 1 and launched_for_cpu():
        print(ONE_PROCESS, file=sys.stderr)
    status = Status(quiet=arguments.quiet or not processes.is_first)
    try:
        return _answer(arguments, processes, status)
    finally:
        status.clear()
        processes.leave()


def _answer(arguments: argparse.Namespace, processes: Processes, status: Status) -> int:
    from rreval import data, journal, runner
    from rreval.settings import LABELS, RunSettings, choices_of

    choices = choices_of(arguments.preset, vars(arguments))
    whole = processes.first(lambda: data.load_set(_source(arguments), videos=arguments.videos))
    chosen = data.select(whole, **_filters(arguments))
    processes.first(lambda: _look_over(whole, chosen, subtitles=choices["subtitles"]))
    qa = _load(arguments, choices, processes, status)
    names = {"model": _model(arguments), "dataset": arguments.source, "preset": arguments.preset}
    settings = RunSettings.of(qa, choices, whole, **names)

    def left(items: Sequence[VideoItem]) -> list[VideoItem]:
        """What of these is to be asked. Every machine has to have the run's folder, if not the same disk."""
        journal.begin_run(arguments.out, settings.to_dict(), labels=LABELS)
        records = journal.read_run(arguments.out).records
        runner.check_same(items, records, subtitles=settings.subtitles)
        return runner.unanswered(items, records, retry_failed=arguments.retry_failed)

    hands = processes.first(lambda: runner.deal(left(chosen), processes.count))
    mine = left(hands[processes.rank])
    status.clear()
    if processes.is_first and not arguments.quiet:
        _print_settings(settings)
    numbers = {item.video_id: f"{number} of {len(mine)}" for number, item in enumerate(mine, start=1)}
    told: set[tuple[str, str]] = set()
    with journal.Journal(arguments.out, processes.rank) as answers:
        for record in runner.run(
            qa,
            mine,
            settings,
            answers,
            cache=arguments.cache,
            watching=lambda item: status.watching(f"{item.path.name}, {numbers[item.video_id]}"),
        ):
            if record.error and (record.video_id, record.error) not in told:  # once for all questions of a video
                told.add((record.video_id, record.error))
                status.clear()
                print(f"rrvideo: {record.question_id}: {record.error}", file=sys.stderr)
        status.clear()
        processes.wait()
    processes.first(lambda: _sum_up(arguments.out, chosen))
    return 0


def _filters(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("duration", "domain", "limit", "ids")}


def _look_over(whole: Sequence[VideoItem], items: Sequence[VideoItem], *, subtitles: bool) -> None:
    """Say what of a set's `items` is missing or cannot be read.

    Raises `RRVideoError` if that is every video, or if there are to be `subtitles` and the `whole` set has none.
    """
    from rreval.data import check_set

    if subtitles and not any(item.subtitle for item in whole):
        raise RRVideoError(
            "the set has no subtitles", "put them beside data/ as subtitle/<videoID>.srt, or leave --subtitles out"
        )
    if subtitles and (silent := sum(item.subtitle is None for item in items)):
        print(f"rrvideo: {silent} of {len(items)} videos have no subtitles: asked without", file=sys.stderr)
    problems = check_set(items)
    for problem in problems[:SOME]:
        print(f"rrvideo: {problem.item.video_id}: {problem.message}", file=sys.stderr)
    if len(problems) > SOME:
        print(f"rrvideo: and {len(problems) - SOME} more: rrvideo eval check lists all", file=sys.stderr)
    if sum(problem.fatal for problem in problems) == len(items):
        raise RRVideoError(
            f"none of the {len(items)} videos is in {items[0].path.parent}, or none can be read",
            "put them there as <videoID>.mp4 (unpack videos_chunked_*.zip), or name their folder with --videos",
        )


def _check(arguments: argparse.Namespace) -> int:
    from rreval.data import check_set, load_set

    items = load_set(_source(arguments), videos=arguments.videos, **_filters(arguments))
    problems = check_set(items, thorough=True)
    for problem in problems:
        print(f"{problem.item.video_id}: {problem.message}")
    questions = sum(len(item.rows) for item in items)
    spoken = sum(item.subtitle is not None for item in items)
    print(f"{len(items)} videos, {questions} questions, {spoken} with subtitles; problems: {len(problems)}")
    return int(bool(problems))


def _load(arguments: argparse.Namespace, choices: Mapping[str, Any], processes: Processes, status: Status) -> VideoQA:
    from rreval.settings import config_of
    from rrvideo.cli import EMBEDDED_MODEL
    from rrvideo.pipeline import VideoQA

    if arguments.device_map and processes.local_count > 1:
        raise RRVideoError(
            f"--device-map spreads a model over all GPUs, and {processes.local_count} processes would each do that",
            "launch one process on each machine, or leave --device-map out",
        )
    model = _model(arguments)
    if model == "tiny" and processes.is_first:
        print(EMBEDDED_MODEL, file=sys.stderr)
    status.show(f"loading {model}")
    hush_transformers(keep_downloads=not arguments.quiet)
    return VideoQA.load(
        model,
        attention=choices["attention"],
        config=config_of(choices),
        device=processes.device if arguments.device == "auto" else arguments.device,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
    )


def _model(arguments: argparse.Namespace) -> str:
    return arguments.model or os.environ.get("RRVIDEO_MODEL") or "tiny"


def _print_settings(settings: RunSettings) -> None:
    from rreval.settings import PRESETS

    for name, value in settings.to_dict().items():
        print(f"{name:16} {value}", file=sys.stderr)
    if settings.preset:
        print(f"{settings.preset}: {PRESETS[settings.preset].source}", file=sys.stderr)


def _sum_up(folder: Path, items: Sequence[VideoItem]) -> None:
    from rreval.journal import merge

    asked = {row.question_id for item in items for row in item.rows}
    records = [record for record in merge(folder).records if record.question_id in asked]
    answered = [record for record in records if record.error is None]
    right = sum(record.prediction == record.answer for record in answered)
    print(f"{len(answered)} of {len(asked)} questions answered, {right} right. More: rrvideo eval report {folder}")
    if failed := len(records) - len(answered):
        print(f"{failed} failed: --retry-failed asks them again", file=sys.stderr)


def _merge(arguments: argparse.Namespace) -> int:
    from rreval.journal import merge
    from rreval.settings import LABELS

    run = merge(arguments.run_folder, arguments.others, labels=LABELS)
    print(f"{run.folder} has {len(run.records)} of {run.settings['questions']} questions")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from rreval.page import as_page
    from rreval.render import as_json, as_markdown, as_text, write
    from rreval.report import Report, read_runs

    baseline = [arguments.baseline] if arguments.baseline else []
    runs = read_runs([*baseline, *arguments.runs])
    if arguments.official:
        _write_official(runs, arguments.official)
    report = Report.of(runs, baseline=next(iter(runs)) if baseline else None)
    if arguments.html:
        write(arguments.html, as_page(report))
    print(as_json(report) if arguments.json else as_markdown(report) if arguments.markdown else as_text(report))
    return 0


def _write_official(runs: Mapping[str, Run], path: Path) -> None:
    from rreval.official import objections, official_results
    from rreval.render import write

    if len(runs) > 1:
        raise RRVideoError("--official writes one run", f"name one of {', '.join(runs)} alone")
    (run,) = runs.values()
    results = official_results(run.records)
    write(path, json.dumps(results, indent=2) + "\n")
    if reasons := objections(results):
        print(f"the official scorer will not take {path} as it is: {', '.join(reasons)}", file=sys.stderr)


def _needle(arguments: argparse.Namespace) -> int:
    from rreval import heatmap
    from rreval.needle import NeedleTest, measure, read_trials
    from rreval.processes import Processes
    from rreval.settings import DEFAULTS

    heatmap.check_installed()
    status = Status(quiet=arguments.quiet)

    def progress(done: int, total: int) -> None:
        status.show("hiding needles", f"{done} of {total} videos watched")

    try:
        choices = {**DEFAULTS, "attention": "rr", "rule": arguments.rule, "head_weights": arguments.head_weights}
        qa = _load(arguments, choices, Processes(), status)
        given = {field.name: getattr(arguments, field.name) for field in fields(NeedleTest) if field.name in arguments}
        for _ in measure(qa, NeedleTest(**given), arguments.out, progress=progress):
            pass
    finally:
        status.clear()
    grids = heatmap.grids(read_trials(arguments.out))
    print(json.dumps(heatmap.document(grids), indent=2) if arguments.json else heatmap.markdown(grids))
    heatmap.draw(grids, arguments.out / "heatmap.png")
    print(f"rrvideo: the heatmap is {arguments.out / 'heatmap.png'}", file=sys.stderr)
    return 0


def _world(arguments: argparse.Namespace) -> int:
    print(_drawn_set(arguments.folder, Status(quiet=arguments.quiet)))
    return 0


def _source(arguments: argparse.Namespace) -> str | Path:
    """Where the set is that the word `world` stands for, drawn if need be; any other set is where it says."""
    if arguments.source != "world" or Path(arguments.source).exists():
        return arguments.source
    return _drawn_set(None, Status(quiet=getattr(arguments, "quiet", False)))


def _drawn_set(folder: Path | None, status: Status) -> Path:
    from rreval.world import make_set

    try:
        return make_set(folder, progress=lambda done, total: status.show("drawing videos", f"{done} of {total}"))
    finally:
        status.clear()
