"""What runs have found: scores by group, what they took, what was not answered, and runs compared with a baseline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np

from rreval.comparison import Comparison, compare
from rreval.journal import Record, Run, read_run
from rreval.official import official_letter
from rreval.statistics import LEVEL, RESAMPLES, Estimate
from rreval.tally import by_video, groups, is_right, share
from rrvideo.errors import RRVideoError

__all__ = ["STAGES", "Cost", "Failure", "Report", "RunReport", "Score", "Spread", "Unparsed", "Watch", "read_runs"]

STAGES = ("decode", "encode", "prefill", "generate")


@dataclass(frozen=True, slots=True)
class Score:
    """How a group of questions was answered.

    `accuracy` is over all of them: an answer without a letter is wrong, and so is a question that could not be asked.
    `official` is what the official scorer finds: over the `official_answered` in which it reads a letter, by its rule.
    """

    name: str
    videos: int
    questions: int
    correct: int
    unparsed: int
    failed: int
    accuracy: Estimate
    official: Estimate
    official_answered: int


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some measurements, and what one in twenty of them exceeds."""

    median: float
    p95: float


@dataclass(frozen=True, slots=True)
class Watch:
    """One video that was watched. Its three stages ran side by side, each for so many seconds."""

    video_id: str
    duration: str
    frames: int
    visual_tokens: int
    density: float
    decode: float
    encode: float
    prefill: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a group of videos took: the mean density, and spreads over its videos, or over its questions.

    `frames`, `visual_tokens` and the seconds of the first three `STAGES` are a video's, the others a question's.
    """

    name: str
    videos: int
    density: float
    frames: Spread
    visual_tokens: Spread
    prompt_tokens: Spread
    answer_tokens: Spread
    seconds: dict[str, Spread]


@dataclass(frozen=True, slots=True)
class Unparsed:
    """A response in which no letter was found; `official` is what the official scorer reads in it all the same."""

    question_id: str
    answer: str
    official: str
    response: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Questions about one video that could not be asked, and why."""

    video_id: str
    questions: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run, which `left` questions of its set are not in. `costs` are of all its videos, and of each duration's."""

    name: str
    settings: dict[str, Any]
    left: int
    overall: Score
    groups: dict[str, tuple[Score, ...]]
    costs: tuple[Cost, ...]
    watches: tuple[Watch, ...]
    unparsed: tuple[Unparsed, ...]
    failures: tuple[Failure, ...]

    @classmethod
    def of(cls, name: str, run: Run) -> Self:
        """Count and measure one run. Raises `RRVideoError` if nothing was asked yet."""
        if not run.records:
            raise RRVideoError(f"{name} holds no answers yet", "rrvideo eval videomme writes them")
        answered = [record for record in run.records if record.response is not None]
        parts = {"all": answered, **groups(answered)["duration"]} if answered else {}
        return cls(
            name=name,
            settings=dict(run.settings),
            left=max(0, run.settings.get("questions", 0) - len(run.records)),
            overall=_score("all", run.records),
            groups={
                field: tuple(_score(part, records) for part, records in found.items())
                for field, found in groups(run.records).items()
            },
            costs=tuple(_cost(part, records) for part, records in parts.items()),
            watches=tuple(map(_watch, by_video(answered))),
            unparsed=tuple(
                Unparsed(
                    record.question_id, record.answer, official_letter(record.response or ""), record.response or ""
                )
                for record in answered
                if record.prediction is None
            ),
            failures=_failures(run.records),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """One or more runs, and each of them compared with the `baseline`, which is one of them.

    Intervals are of the given level, from so many resamples of the videos.
    """

    runs: tuple[RunReport, ...]
    baseline: str
    comparisons: tuple[Comparison, ...]
    level: float = LEVEL
    resamples: int = RESAMPLES

    @classmethod
    def of(cls, runs: Mapping[str, Run], *, baseline: str | None = None) -> Self:
        """Report on runs by their names; without a baseline, the first with full attention is it.

        Raises `RRVideoError` if a run holds no answers, or if one does not have the baseline's questions.
        """
        if baseline is None:
            full = [name for name, run in runs.items() if run.settings.get("attention") == "full"]
            baseline = [*full, *runs][0]  # the first of all, where none has
        against = (baseline, runs[baseline].settings, runs[baseline].records)
        reports = tuple(RunReport.of(name, run) for name, run in runs.items())
        return cls(
            runs=reports,
            baseline=baseline,
            comparisons=tuple(
                compare(against, (name, run.settings, run.records)) for name, run in runs.items() if name != baseline
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


def read_runs(folders: Iterable[Path]) -> dict[str, Run]:
    """Read runs, each once, by the names of their folders, or by whole paths where two folders have one name.

    Raises `RRVideoError` if one of them holds no run.
    """
    unique = {folder.resolve(): folder for folder in folders}
    names = [folder.name for folder in unique]
    return {
        _printable(str(given) if names.count(folder.name) > 1 else folder.name): read_run(given)
        for folder, given in unique.items()
    }


def _printable(name: str) -> str:
    """A file's name may hold bytes that are no text."""
    return name.encode(errors="backslashreplace").decode()


def _score(name: str, records: Sequence[Record]) -> Score:
    letters = {record.question_id: official_letter(record.response or "") for record in records}
    return Score(
        name=name,
        videos=len(by_video(records)),
        questions=len(records),
        correct=sum(map(is_right, records)),
        unparsed=sum(record.response is not None and record.prediction is None for record in records),
        failed=sum(record.response is None for record in records),
        accuracy=share(records, is_right),
        official=share(
            records,
            lambda record: letters[record.question_id] == record.answer,
            among=lambda record: letters[record.question_id] != "",
        ),
        official_answered=sum(letter != "" for letter in letters.values()),
    )


def _watch(records: Sequence[Record]) -> Watch:
    """From a video's answers; where a resumed run watched it again, the first counts."""
    first = asdict(records[0])
    return Watch(
        **{name: first[name] for name in ("video_id", "duration", "frames", "visual_tokens", "density")},
        **{stage: first["seconds"][stage] for stage in STAGES[:3]},
        warnings=tuple(dict.fromkeys(warning for record in records for warning in record.warnings)),
    )


def _cost(name: str, records: Sequence[Record]) -> Cost:
    watches = [_watch(video) for video in by_video(records)]
    seconds = {stage: _spread(getattr(watch, stage) for watch in watches) for stage in STAGES[:3]}
    return Cost(
        name=name,
        videos=len(watches),
        density=fmean(watch.density for watch in watches),
        frames=_spread(watch.frames for watch in watches),
        visual_tokens=_spread(watch.visual_tokens for watch in watches),
        prompt_tokens=_spread(record.prompt_tokens for record in records),
        answer_tokens=_spread(record.answer_tokens for record in records),
        seconds=seconds | {"generate": _spread(record.seconds["generate"] for record in records if record.seconds)},
    )


def _spread(values: Iterable[float | None]) -> Spread:
    """Raises `TypeError` for a None: what has an answer was measured."""
    return Spread(*np.quantile(list(values), [0.5, 0.95]).tolist())


def _failures(records: Iterable[Record]) -> tuple[Failure, ...]:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if record.response is None:
            found[record.video_id, record.error or "no reason was recorded"].append(record.question_id)
    return tuple(Failure(video, tuple(questions), reason) for (video, reason), questions in found.items())
