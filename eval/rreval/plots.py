"""A report's plots: what lies where, in per cent of a plot's width and height. The page draws them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rreval.report import STAGES, Report, Watch
from rreval.statistics import Estimate
from rreval.tables import difference, percent
from rreval.tally import GROUPS

__all__ = ["Axis", "Mark", "Plot", "Row", "Scatter", "accuracies", "differences", "scatters", "stages"]

CHANCE = 0.25  # of four options
Figures = Mapping[str, Mapping[str, Estimate]]  # of each row, of each run


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` along one side of a plot; `ticks` are positions and their labels."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    @classmethod
    def of(cls, low: float, high: float, form: Callable[[float], str]) -> Axis:
        """An axis that holds both values, with a tick at each multiple of a round step."""
        step = _round_step((high - low) / 4)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple((100 * (n - first) / (last - first), form(n * step)) for n in range(first, last + 1))
        return cls(first * step, last * step, ticks)

    def at(self, value: float) -> float:
        """Where a value lies, from 0 to 100."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


@dataclass(frozen=True, slots=True)
class Mark:
    """One run's figure in a row: its position, those of its bounds, and the figure in words."""

    run: str
    at: float
    low: float
    high: float
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a plot; `note` says how much is in it."""

    name: str
    note: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """Rows of marks of these `runs` along one axis; `line` is the position of what they are to be compared with."""

    title: str
    runs: tuple[str, ...]
    caption: str
    alt: str
    axis: Axis
    rows: tuple[Row, ...]
    line: float | None = None


@dataclass(frozen=True, slots=True)
class Scatter:
    """A point for each video: its run, its positions from the left and from the top, and what it says of itself."""

    title: str
    runs: tuple[str, ...]
    caption: str
    alt: str
    across: Axis
    up: Axis
    points: tuple[tuple[str, float, float, str], ...]


def accuracies(report: Report) -> Iterator[Plot]:
    """Accuracy by each kind of group."""
    for field, kind in GROUPS.items():
        figures: dict[str, dict[str, Estimate]] = defaultdict(dict)
        counts: dict[str, int] = {}
        for run in report.runs:
            for score in run.groups[field]:
                figures[score.name][run.name] = score.accuracy
                counts[score.name] = max(score.questions, counts.get(score.name, 0))
        yield _plot(
            f"Accuracy by {kind}",
            f"Of all questions, whose number is in grey. Lines are {100 * report.level:g} % intervals; the dashed one "
            "is at a quarter, where guessing would be.",
            figures,
            axis=Axis.of(0, 1, lambda share: f"{100 * share:.0f} %"),
            told=percent,
            notes={name: f"{count:,}" for name, count in counts.items()},
            line=CHANCE,
        )


def differences(report: Report) -> Iterator[Plot]:
    """How much better or worse than the baseline the other runs are."""
    figures: dict[str, dict[str, Estimate]] = defaultdict(dict)
    counts: dict[str, int] = {}
    for comparison in report.comparisons:
        parts = (change for field in ("duration", "domain", "task_type") for change in comparison.groups[field])
        for change in (comparison.overall, *parts):
            figures[change.name][comparison.other] = change.difference
            counts[change.name] = change.questions
    if figures:
        widest = max(
            0.01, *(abs(bound) for row in figures.values() for each in row.values() for bound in _bounds(each))
        )
        yield _plot(
            f"Difference from {report.baseline}",
            "In points of accuracy, over the questions that both runs hold; right of the middle is better than "
            f"{report.baseline}. Lines are {100 * report.level:g} % intervals of the paired difference; where there is "
            "none, no resample differs.",
            figures,
            axis=Axis.of(-widest, widest, lambda share: f"{100 * share:+g}" if share else "0"),
            told=difference,
            notes={name: f"{count:,}" for name, count in counts.items()},
            line=0.0,
        )


def stages(report: Report) -> Iterator[Plot]:
    """What each stage took."""
    costs = {run.name: run.costs[0] for run in report.runs if run.costs}
    figures = {
        stage: {
            name: Estimate(spread.median, spread.median, spread.p95)
            for name, cost in costs.items()
            for spread in (cost.seconds[stage],)
        }
        for stage in STAGES
    }
    if costs:
        longest = max(0.01, *(bound for row in figures.values() for each in row.values() for bound in _bounds(each)))
        yield _plot(
            "Seconds in each stage",
            "Decode, encode and prefill run side by side, once for each video; generate is for each question. Marks "
            "are medians, and lines reach to what one in twenty exceeds.",
            figures,
            axis=Axis.of(0, longest, lambda seconds: f"{seconds:g} s"),
            told=lambda each: f"{each.value:.2f} s (to {each.high:.2f})",
            notes={stage: "a question" if stage == "generate" else "a video" for stage in STAGES},
        )


def scatters(report: Report) -> Iterator[Scatter]:
    """What attention left out, and what prefill took, over the length of the videos."""
    if any(watch.density < 1 for run in report.runs for watch in run.watches):
        yield _scatter(
            report,
            "Density",
            "The share of the visible blocks that prefill attended to, over the visual tokens of each video.",
            lambda watch: watch.density,
            lambda share: f"{share:g}",
            top=1.0,
        )
    if any(run.watches for run in report.runs):
        yield _scatter(
            report,
            "Prefill",
            "Seconds of prefill over the visual tokens of each video.",
            lambda watch: watch.prefill,
            lambda seconds: f"{seconds:g} s",
        )


def _plot(
    title: str,
    caption: str,
    figures: Figures,
    *,
    axis: Axis,
    told: Callable[[Estimate], str],
    notes: Mapping[str, str],
    line: float | None = None,
) -> Plot:
    rows = []
    spoken: dict[str, list[str]] = defaultdict(list)
    for name, row in figures.items():
        marks = []
        for run, each in row.items():
            spoken[run].append(f"{name} {told(each)}")
            if bounds := [axis.at(bound) for bound in _bounds(each)]:
                marks.append(Mark(run, bounds[0], min(bounds), max(bounds), told(each)))
        rows.append(Row(name, notes[name], tuple(marks)))
    alt = "; ".join(f"{run}: {', '.join(parts)}" for run, parts in spoken.items())
    return Plot(
        title=title,
        runs=tuple(spoken),
        caption=caption,
        alt=f"{title}. {alt}.",
        axis=axis,
        rows=tuple(rows),
        line=None if line is None else axis.at(line),
    )


def _scatter(
    report: Report,
    title: str,
    caption: str,
    figure: Callable[[Watch], float],
    form: Callable[[float], str],
    *,
    top: float = 0.01,
) -> Scatter:
    watches = [(run.name, watch) for run in report.runs for watch in run.watches]
    across = Axis.of(0, max(1, *(watch.visual_tokens for _, watch in watches)), lambda tokens: f"{tokens:,.0f}")
    up = Axis.of(0, max(top, *(figure(watch) for _, watch in watches)), form)
    points = tuple(
        (
            name,
            across.at(watch.visual_tokens),
            100 - up.at(figure(watch)),
            f"{watch.video_id}: {watch.visual_tokens:,} tokens, {figure(watch):.3g}",
        )
        for name, watch in watches
    )
    runs = {run.name: [figure(watch) for watch in run.watches] for run in report.runs if run.watches}
    ends = "; ".join(f"{name} from {min(found):.3g} to {max(found):.3g}" for name, found in runs.items())
    return Scatter(title, tuple(runs), caption, f"{caption} {ends}.", across, up, points)


def _bounds(estimate: Estimate) -> list[float]:
    """The value first, and its bounds where it has any."""
    return [bound for bound in (estimate.value, estimate.low, estimate.high) if bound is not None]


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is no smaller."""
    power = 10 ** math.floor(math.log10(step))
    return next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= step * (1 - 1e-9))
