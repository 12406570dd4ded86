"""Ask each window of a long video the same questions, and get typed answers with their times.

    questions = {"goal": "Is a goal scored?", "ball": "Which team has the ball?", "players": "How many are there?"}
    schema = {"goal": "yes/no", "ball": ["red", "blue"], "players": "number"}
    for window in qa.scan("match.mp4", questions, schema=schema, every=60, window=60):
        if window["goal"].value:
            print(window.start, window["goal"].probability)

A window is watched when it is taken from the scan, and not before.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rrvideo import frameindex
from rrvideo.clock import format_time
from rrvideo.errors import VideoError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from rrvideo.frameindex import FrameIndex
    from rrvideo.pipeline import Video, VideoQA

__all__ = ["Finding", "Kind", "Query", "Scan", "Value", "Window", "check_columns", "parse_query", "scan"]

Kind = str | Sequence[str]  # "yes/no", "number", "text", or the labels to choose from: ["left", "right"], "left|right"
Value = bool | float | str | None

NUMBER = re.compile(r"(?<![\w:.,])-?\d+(?:,\d{3})*(?:\.\d+)?(?![:.,]?\d)")  # not the parts of a time such as 0:42
QUERY = re.compile(r"\s*([\w-]+)\s*=\s*([^:]+?)\s*:\s*(.*\S)\s*", re.DOTALL)
OWN_COLUMNS = ("video", "start", "end", "warnings", "error", "scan")
NO_MATTER = {"path", "start", "end", "progress", "cancel", "cache"}  # what a watch is told that changes no answer


@dataclass(frozen=True, slots=True)
class Query:
    """A question, the name of its column, and the kind of answer it has.

    `labels` are what is to choose from: yes and no for "yes/no", none for "number" and "text".
    """

    name: str
    text: str
    kind: str  # yes/no, number, text, or the labels with | between them
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, text: str, kind: Kind) -> Query:
        """Check a question. Raises `ValueError` that names it and says what is wrong."""
        if not text.strip():
            raise ValueError(f"question {name!r} must not be empty")
        if not name or name in OWN_COLUMNS:
            raise ValueError(f"a question cannot be named {name!r}: {', '.join(OWN_COLUMNS)} are taken")
        if kind in ("number", "text"):
            return cls(name, text, str(kind))
        if kind == "yes/no":
            return cls(name, text, "yes/no", ("yes", "no"))
        labels = tuple(label.strip() for label in (kind.split("|") if isinstance(kind, str) else kind))
        if len({label.casefold() for label in labels}) < max(2, len(labels)) or not all(labels):
            raise ValueError(f"{name!r} must be yes/no, number, text, or at least two different labels; got {kind!r}")
        return cls(name, text, "|".join(labels), labels)

    @property
    def columns(self) -> tuple[str, ...]:
        """What its answer is called in a table."""
        return (self.name, f"{self.name}_probability") if self.labels else (self.name,)


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question in one window: bool, label, number or text, or None where there is none.

    `probability` is that of yes for a yes/no question, and that of the label for a choice, among those given.
    """

    value: Value
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """What one window of a video showed, from `start` to `end` seconds; with an `error`, all its answers are None."""

    video: str
    start: float
    end: float
    answers: Mapping[str, Finding]
    warnings: tuple[str, ...] = ()
    error: str = ""

    def __getitem__(self, name: str) -> Finding:
        return self.answers[name]

    def to_dict(self) -> dict[str, Any]:
        """One flat row, as JSON takes it; a choice and a yes/no question have a second column for the probability."""
        row: dict[str, Any] = {"video": self.video, "start": self.start, "end": self.end}
        for name, finding in self.answers.items():
            row[name] = finding.value
            if finding.probability is not None:
                row[f"{name}_probability"] = finding.probability
        return row | {"warnings": "; ".join(self.warnings), "error": self.error}


class Scan(Iterator[Window]):
    """The windows of a video, each watched and asked when it is taken; `scan` makes it.

    `windows` are their times, `columns` the names of their fields in a table. `digest` stands for the questions, the
    model and all settings that answers depend on, and after a hyphen for the video as it was when the scan began.
    """

    def __init__(
        self,
        qa: VideoQA,
        index: FrameIndex,
        queries: Sequence[Query],
        windows: Sequence[tuple[float, float]],
        digest: str,
        *,
        max_new_tokens: int,
        **watch: Any,
    ) -> None:
        self.video = index.path
        self.queries = tuple(queries)
        self.windows = tuple(windows)
        self.digest = digest
        self.columns = (*OWN_COLUMNS[:3], *(column for query in queries for column in query.columns), *OWN_COLUMNS[3:])
        self._qa = qa
        self._index = index  # so that the file is not read again for each window
        self._max_new_tokens = max_new_tokens
        self._watch = watch
        self._done = 0

    def __len__(self) -> int:
        """How many windows are still to come."""
        return len(self.windows) - self._done

    def __next__(self) -> Window:
        if not len(self):
            raise StopIteration
        window = self._look(*self.windows[self._done])
        self._done += 1
        return window

    def go_to(self, number: int) -> None:
        """Take window `number` next, counted from 0."""
        self._done = number

    def write(self, path: str | Path) -> int:
        """Add the windows to a .jsonl or .csv file, one line each as soon as it is known, and return their number.

        Windows that the file holds are not watched again: a scan that was killed goes on where it stopped.
        Raises `RRVideoError` if the file is of a scan with other questions, model or settings.
        """
        from rrvideo.events import record

        return sum(1 for _ in record(self, path))

    def to_pandas(self) -> Any:
        """The windows as a pandas `DataFrame`. Raises `RRVideoError` if pandas is not installed."""
        from rrvideo.events import frame

        return frame(self)

    def _look(self, start: float, end: float) -> Window:
        nothing = {query.name: Finding(None) for query in self.queries}
        rounding = self._index.rounding
        try:
            with self._qa.watch(self._index, start=start, end=last_moment(self._index, end), **self._watch) as video:
                # Where no frame begins, the picture that still stands, or the nearest keyframe, was watched.
                if not any(start - rounding <= time < end - rounding for time in video.plan.times):
                    return Window(self.video, start, end, nothing, error="no frame lies in this window")
                warnings = tuple(warning for warning in video.warnings if warning not in video.info.warnings)
                return Window(self.video, start, end, self._ask(video), warnings)
        except VideoError as error:
            return Window(self.video, start, end, nothing, error=str(error))

    def _ask(self, video: Video) -> dict[str, Finding]:
        written = [query.text for query in self.queries if not query.labels]
        answers = iter(video.ask(written, max_new_tokens=self._max_new_tokens) if written else [])
        return {
            query.name: _choose(video, query, self._qa.checkpoint.tokenizer)
            if query.labels
            else _read(next(answers).text, query)
            for query in self.queries
        }


def scan(
    qa: VideoQA,
    path: str | os.PathLike[str],
    questions: Mapping[str, str] | Sequence[str],
    *,
    every: float = 60.0,
    window: float = 60.0,
    schema: Mapping[str, Kind] | None = None,
    start: float | None = None,
    end: float | None = None,
    max_new_tokens: int = 256,
    **watch: Any,
) -> Scan:
    """Ask `questions` of a window of `window` seconds, every `every` seconds of the video at `path`.

    `questions` have names, or are their own; one may come by itself. `schema` says for each name what its answers
    are: "yes/no", "number", labels to choose from, or "text", which it is without. Each question is asked as it is
    written; yes/no and choices are not read from a text but weighed, by the probabilities that the model gives to each
    as the beginning of its answer. `watch` is what `VideoQA.watch` takes. A window of which no frame can be seen has an
    error and no answers.
    Raises `VideoError` if the file is no video or ends before `start`.
    """
    from rrattention.transformers import settings as attention_settings
    from rrvideo.store import FileMark, describe

    for name, value in (("every", every), ("window", window)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number of seconds above 0, got {value}")
    if isinstance(questions, str):
        questions = [questions]
    texts = questions if isinstance(questions, Mapping) else {text: text for text in questions}
    schema = schema or {}
    if unknown := schema.keys() - texts.keys():
        raise ValueError(f"schema names {', '.join(sorted(unknown))}, which is not among the questions")
    queries = [Query.of(name, text, schema.get(name, "text")) for name, text in texts.items()]
    if not queries:
        raise ValueError("a scan needs at least one question")
    check_columns(queries)
    attention, _ = attention_settings(qa.checkpoint.model)
    watch_settings = inspect.signature(qa.watch).bind(path, **watch)
    watch_settings.apply_defaults()
    settings = {
        "model": {name: value for name, value in describe(qa.checkpoint).items() if name != "name"},
        "questions": [[query.name, query.text, query.kind] for query in queries],
        "windows": [float(every), float(window), float(start or 0), None if end is None else float(end)],
        "answers": [max_new_tokens, attention.least_tokens(qa.checkpoint.device)],
        "watch": {name: value for name, value in watch_settings.arguments.items() if name not in NO_MATTER},
    }
    index = frameindex.scan(path)
    windows = _windows(index, every, window, start or 0.0, end)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    digest += f"-{FileMark.of(path).digest[:12]}"
    return Scan(qa, index, queries, windows, digest, max_new_tokens=max_new_tokens, **watch)


def parse_query(text: str) -> Query:
    """Read `NAME=KIND: QUESTION`, as in `goal=yes/no: Is a goal scored?`; raises `ValueError`."""
    match = QUERY.fullmatch(text)
    if match is None:
        raise ValueError(f"a question is NAME=KIND: QUESTION, such as 'goal=yes/no: Is a goal scored?'; got {text!r}")
    name, kind, question = match.groups()
    return Query.of(name, question, kind)


def check_columns(queries: Sequence[Query]) -> None:
    """Raise `ValueError` if two answers would have one name."""
    columns = [column for query in queries for column in query.columns]
    if twice := [column for column in dict.fromkeys(columns) if columns.count(column) > 1]:
        raise ValueError(f"two answers are named {', '.join(twice)}")


def _windows(
    index: FrameIndex, every: float, window: float, start: float, end: float | None
) -> list[tuple[float, float]]:
    """Their bounds in seconds; the last is short, and holds a frame that no other one does."""
    if not 0 <= start < index.duration:
        raise VideoError(f"the scan starts at {start:g} s, but the video is {format_time(index.duration)} long")
    stop = index.duration if end is None else min(end, index.duration)
    if stop <= start:
        raise VideoError(f"the scan ends at {stop:g} s, before it starts")
    last_frame, windows = float(index.times[-1]), list[tuple[float, float]]()
    begin = start
    while begin < stop and begin <= last_frame and (not windows or windows[-1][1] < stop):
        windows.append((begin, min(begin + window, stop)))
        begin = start + len(windows) * every
    return windows


def last_moment(index: FrameIndex, end: float) -> float:
    """The end of a clip that holds all that a window up to `end` does, and nothing of the next window.

    For a clip takes in the frame at its end, and both its ends take frames that may have been rounded across them.
    """
    return end - 2 * index.rounding - 1e-9


def _choose(video: Video, query: Query, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Weigh the labels by how probable the model's answer begins with each, in any of its spellings."""
    spellings = [
        (label, space + form)
        for label in query.labels
        for form in dict.fromkeys((label, label[:1].upper() + label[1:]))
        for space in ("", " ")
    ]
    ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for _, text in spellings]
    scores = video.score(query.text, [text for _, text in spellings])
    highest = max(scores)
    chance = dict.fromkeys(query.labels, 0.0)
    own: dict[tuple[int, ...], float] = {}
    # "red circle" begins with "red": what the longer has is not the shorter's.
    for (label, _), begins, score in sorted(zip(spellings, ids, scores, strict=True), key=lambda item: -len(item[1])):
        longer = sum(share for other, share in own.items() if other[: len(begins)] == begins)
        own[begins] = max(0.0, math.exp(score - highest) - longer)
        chance[label] += own[begins]
    total = sum(chance.values())
    if query.kind == "yes/no":
        yes = chance["yes"] / total
        return Finding(yes >= 0.5, yes)
    label = max(chance, key=lambda label: chance[label])
    return Finding(label, chance[label] / total)


def _read(text: str, query: Query) -> Finding:
    if query.kind == "text":
        return Finding(text)
    found = NUMBER.search(text)
    number = float(found[0].replace(",", "")) if found else math.inf  # as also too many digits are
    return Finding(number if math.isfinite(number) else None)
