"""A report as titled tables of words and figures, which the terminal, Markdown and the page all show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rreval.comparison import Comparison
from rreval.report import STAGES, Cost, Report, RunReport, Score, Spread
from rreval.statistics import Estimate
from rreval.tally import GROUPS

__all__ = ["Table", "difference", "legend", "percent", "summary", "tables"]

Kind = Literal["figures", "list", "settings"]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text below a title. The first `words` columns hold words and the others figures.

    A "list" has a row for each question or video concerned, and may be long.
    """

    kind: Kind
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


def tables(report: Report) -> Iterator[Table]:
    """All of a report; lists that would be empty are left out."""
    yield _runs(report)
    yield _by_group(report, "Accuracy in %, all questions", lambda score: score.accuracy)
    yield _by_group(report, "Accuracy in %, as the official scorer counts", lambda score: score.official)
    for comparison in report.comparisons:
        yield _changes(comparison)
    yield _costs(report)
    for table in (*map(_flips, report.comparisons), _unparsed(report), _failures(report), _warnings(report)):
        if table.rows:
            yield table
    yield _settings(report)


def summary(comparison: Comparison) -> str:
    """What came out of a comparison, in sentences."""
    change = comparison.overall
    sentences = [
        f"On {change.questions:,} questions {comparison.other} has {_plain(comparison.other_accuracy)} % right and "
        f"{comparison.baseline} {_plain(comparison.baseline_accuracy)} %: a difference of "
        f"{difference(change.difference)} points.",
        f"Questions gained: {change.gained:,}; lost: {change.lost:,} (McNemar's exact test: p {_p(comparison.p)}); "
        f"with the same letter in both: {comparison.agreeing:,}.",
    ]
    if comparison.kept.value is not None:
        sentences.insert(1, f"It keeps {percent(comparison.kept)} % of the score.")
    if comparison.left_out:
        sentences.append(f"Left out, as one run alone holds them: {comparison.left_out:,}.")
    if comparison.settings:
        sentences.append(f"The runs differ in: {', '.join(comparison.settings)}.")
    return " ".join(sentences)


def legend(report: Report) -> str:
    """How the figures are to be read."""
    return (
        "Accuracy is over all questions: an answer without a letter is wrong, and so is a question that could not be "
        "asked. The official scorer leaves out answers that it cannot read, and takes the first capital letter from "
        f"A to D for the answer. In brackets: {100 * report.level:g} % intervals from {report.resamples:,} resamples "
        "of the videos, whose questions are kept together; none where there is one video, or where all agree."
    )


def percent(estimate: Estimate) -> str:
    """Such as "63.3 (60.1 to 66.4)"."""
    return _interval(estimate, "{:.1f}")


def difference(estimate: Estimate) -> str:
    """Such as "+0.4 (-0.5 to +1.3)", in points."""
    return _interval(estimate, "{:+.1f}")


def _interval(estimate: Estimate, form: str) -> str:
    value, low, high = (None if each is None else form.format(100 * each) for each in _bounds(estimate))
    if value is None:
        return "-"
    return value if low is None else f"{value} ({low} to {high})"


def _bounds(estimate: Estimate) -> tuple[float | None, ...]:
    return estimate.value, estimate.low, estimate.high


def _plain(estimate: Estimate) -> str:
    return percent(Estimate(estimate.value))


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def _runs(report: Report) -> Table:
    return Table(
        "figures",
        "Runs",
        ("run", "videos", "questions", "right", "accuracy, %", "official, %", "of", "unparsed", "failed", "density"),
        tuple(
            (
                run.name,
                f"{run.overall.videos:,}",
                f"{run.overall.questions:,}" + (f" of {run.overall.questions + run.left:,}" if run.left else ""),
                f"{run.overall.correct:,}",
                percent(run.overall.accuracy),
                percent(run.overall.official),
                f"{run.overall.official_answered:,}",
                f"{run.overall.unparsed:,}",
                f"{run.overall.failed:,}",
                f"{run.costs[0].density:.3f}" if run.costs else "-",
            )
            for run in report.runs
        ),
    )


def _by_group(report: Report, title: str, figure: Callable[[Score], Estimate]) -> Table:
    scores = [dict(_keyed(run)) for run in report.runs]
    rows = []
    for key in dict.fromkeys(key for each in scores for key in each):
        found = [each.get(key) for each in scores]
        questions = max(score.questions for score in found if score)
        rows.append((*key, f"{questions:,}", *(percent(figure(score)) if score else "-" for score in found)))
    return Table(
        "figures", title, ("by", "group", "questions", *(run.name for run in report.runs)), tuple(rows), words=2
    )


def _keyed(run: RunReport) -> Iterator[tuple[tuple[str, str], Score]]:
    yield ("", "all"), run.overall
    for field, scores in run.groups.items():
        for score in scores:
            yield (GROUPS[field], score.name), score


def _changes(comparison: Comparison) -> Table:
    changes = [("", comparison.overall)]
    changes += [(GROUPS[field], change) for field, found in comparison.groups.items() for change in found]
    return Table(
        "figures",
        f"{comparison.other} against {comparison.baseline}",
        ("by", "group", "questions", "gained", "lost", "difference, points"),
        tuple(
            (
                by,
                change.name,
                f"{change.questions:,}",
                f"{change.gained:,}",
                f"{change.lost:,}",
                difference(change.difference),
            )
            for by, change in changes
        ),
        words=2,
    )


def _costs(report: Report) -> Table:
    return Table(
        "figures",
        "What it took: medians (and what one in twenty exceeds)",
        (
            *("run", "videos of", "videos", "density", "frames", "visual tokens", "prompt tokens", "answer tokens"),
            *(f"{stage}, s" for stage in STAGES),
        ),
        tuple((run.name, *_cost(cost)) for run in report.runs for cost in run.costs),
        words=2,
    )


def _cost(cost: Cost) -> Iterable[str]:
    spreads = (cost.frames, cost.visual_tokens, cost.prompt_tokens, cost.answer_tokens)
    seconds = (cost.seconds[stage] for stage in STAGES)
    return (
        cost.name,
        f"{cost.videos:,}",
        f"{cost.density:.3f}",
        *(_spread(each, "{:,.0f}") for each in spreads),
        *(_spread(each, "{:.2f}") for each in seconds),
    )


def _spread(spread: Spread, form: str) -> str:
    return f"{form.format(spread.median)} ({form.format(spread.p95)})"


def _flips(comparison: Comparison) -> Table:
    return Table(
        "list",
        f"Questions that {comparison.other} gains or loses against {comparison.baseline}",
        ("question", "duration", "task type", "right", comparison.baseline, comparison.other, "change", "text"),
        tuple(
            (
                flip.question_id,
                flip.duration,
                flip.task_type,
                flip.answer,
                flip.baseline or "none",
                flip.other or "none",
                "gained" if flip.gained else "lost",
                flip.question,
            )
            for flip in comparison.flips
        ),
        words=8,
    )


def _unparsed(report: Report) -> Table:
    rows = (
        (run.name, each.question_id, each.answer, each.official or "none", each.response or "(empty)")
        for run in report.runs
        for each in run.unparsed
    )
    header = ("run", "question", "right", "official reads", "response")
    return Table("list", "Answers without a letter", header, tuple(rows), words=5)


def _failures(report: Report) -> Table:
    rows = (
        (run.name, each.video_id, ", ".join(each.questions), each.reason)
        for run in report.runs
        for each in run.failures
    )
    return Table(
        "list", "Questions that could not be asked", ("run", "video", "questions", "why"), tuple(rows), words=4
    )


def _warnings(report: Report) -> Table:
    rows = (
        (run.name, watch.video_id, warning)
        for run in report.runs
        for watch in run.watches
        for warning in watch.warnings
    )
    return Table("list", "Videos with warnings", ("run", "video", "warning"), tuple(rows), words=3)


def _settings(report: Report) -> Table:
    names = dict.fromkeys(name for run in report.runs for name in run.settings)
    rows = ((name, *(_setting(run.settings.get(name)) for run in report.runs)) for name in names)
    header = ("setting", *(run.name for run in report.runs))
    return Table("settings", "Settings", header, tuple(rows), words=1 + len(report.runs))


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return "-" if value is None else str(value)
