"""Two runs over the same questions, compared question by question: full attention and sparse, say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rreval.journal import Record
from rreval.statistics import Estimate, mcnemar
from rreval.tally import groups, is_right, share
from rrvideo.errors import RRVideoError

__all__ = ["Change", "Comparison", "Flip", "compare"]

LABELS = ("versions",)  # settings that say where a run was made and not how


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a group of questions: `difference` is the other run's accuracy less the baseline's."""

    name: str
    questions: int
    gained: int
    lost: int
    difference: Estimate


@dataclass(frozen=True, slots=True)
class Flip:
    """A question that one run has right and the other has not; a prediction is None where there is no letter."""

    question_id: str
    duration: str
    task_type: str
    question: str
    answer: str
    baseline: str | None
    other: str | None

    @property
    def gained(self) -> bool:
        return self.other == self.answer


@dataclass(frozen=True, slots=True)
class Comparison:
    """The run `other` against the run `baseline`, over the questions that both hold.

    `kept` is the other's score as a share of the baseline's, `p` the exact p-value of McNemar's test that both are
    equally good, `agreeing` the number of questions with the same letter in both, or with none. `left_out` counts the
    questions that only one run holds. `settings` has both values of each that differs.
    """

    baseline: str
    other: str
    baseline_accuracy: Estimate
    other_accuracy: Estimate
    overall: Change
    kept: Estimate
    p: float
    agreeing: int
    left_out: int
    groups: dict[str, tuple[Change, ...]]
    flips: tuple[Flip, ...]
    settings: dict[str, tuple[Any, Any]]


def compare(
    baseline: tuple[str, dict[str, Any], Sequence[Record]], other: tuple[str, dict[str, Any], Sequence[Record]]
) -> Comparison:
    """Compare two runs, each given as its name, its settings and its records.

    Raises `RRVideoError` if they share no question, or if a shared one is not the same in both.
    """
    first, second = ({record.question_id: record for record in run[2]} for run in (baseline, other))
    shared = sorted(first.keys() & second.keys())
    names = f"{baseline[0]} and {other[0]}"
    if not shared:
        raise RRVideoError(f"{names} have no question in common", "report each by itself")
    for question in shared:
        if _content(first[question]) != _content(second[question]):
            raise RRVideoError(f"question {question} of {names} is not the same", "they ran over different data sets")
    pairs = {question: (first[question], second[question]) for question in shared}
    common = [before for before, _ in pairs.values()]
    overall = _change("all", common, pairs)
    return Comparison(
        baseline=baseline[0],
        other=other[0],
        baseline_accuracy=share(common, is_right),
        other_accuracy=share((after for _, after in pairs.values()), is_right),
        overall=overall,
        kept=share(common, lambda record: is_right(pairs[record.question_id][1]), among=is_right),
        p=mcnemar(overall.lost, overall.gained),
        agreeing=sum(before.prediction == after.prediction for before, after in pairs.values()),
        left_out=len(first.keys() ^ second.keys()),
        groups={
            field: tuple(_change(name, records, pairs) for name, records in found.items())
            for field, found in groups(common).items()
        },
        flips=tuple(_flip(*pair) for pair in pairs.values() if is_right(pair[0]) != is_right(pair[1])),
        settings=_differing(baseline[1], other[1]),
    )


def _content(record: Record) -> tuple[Any, ...]:
    return record.video_id, record.question, record.options, record.answer


def _change(name: str, records: Sequence[Record], pairs: dict[str, tuple[Record, Record]]) -> Change:
    """How the questions of `records`, which are the baseline's, have fared in the other run."""

    def gain(record: Record) -> int:
        before, after = pairs[record.question_id]
        return is_right(after) - is_right(before)

    gains = [gain(record) for record in records]
    return Change(name, len(records), gains.count(1), gains.count(-1), share(records, gain))


def _flip(before: Record, after: Record) -> Flip:
    return Flip(
        question_id=before.question_id,
        duration=before.duration,
        task_type=before.task_type,
        question=before.question,
        answer=before.answer,
        baseline=before.prediction,
        other=after.prediction,
    )


def _differing(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (first.get(name), second.get(name))
        for name in {**first, **second}
        if name not in LABELS and first.get(name) != second.get(name)
    }
