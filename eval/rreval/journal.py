"""The answers of a run on disk, each as soon as it is known, so that none is lost whenever the run ends.

RUN/settings.json          what the answers depend on, written once
RUN/answers-<rank>.jsonl   what each process has answered, a line for each question; lines are only appended
RUN/answers.jsonl          all of it, each question once: `merge` writes it
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rrvideo.errors import RRVideoError
from rrvideo.locking import lock

__all__ = ["Journal", "Record", "Run", "begin_run", "merge", "read_run"]

SETTINGS, MERGED = "settings.json", "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Record:
    """One question and what became of it: a `response`, or the `error` for which there is none.

    The first fields are those of the data set. `prediction` is the letter that the response gives, or None where it
    gives none. `video_bytes` is the size of the video's file, and `subtitled` says whether there were subtitles, where
    these were asked for. `density` is that of the video's prefill. `seconds` holds decode, encode and prefill, which a
    video's questions share, and generate, which is this answer's own.
    """

    question_id: str
    video_id: str
    videoID: str  # noqa: N815 (the official name)
    duration: str
    domain: str
    sub_category: str
    task_type: str
    question: str
    options: tuple[str, ...]
    answer: str
    response: str | None = None
    prediction: str | None = None
    error: str | None = None
    density: float | None = None
    frames: int | None = None
    visual_tokens: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    seconds: dict[str, float] | None = None
    warnings: tuple[str, ...] = ()
    video_bytes: int | None = None
    subtitled: bool | None = None

    @classmethod
    def of(cls, line: bytes) -> Self:
        """Read a line of JSON. Raises `ValueError` or `TypeError` if it is not a whole record."""
        fields = json.loads(line)
        return cls(**fields | {name: tuple(fields[name]) for name in ("options", "warnings") if name in fields})

    def line(self) -> bytes:
        """The record as a line of JSON."""
        # Half a surrogate pair, which UTF-8 has no bytes for, is written the way JSON escapes it.
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Run:
    """All that a run has answered so far, in the order of its questions' ids, and the settings of `settings.json`."""

    folder: Path
    settings: dict[str, Any]
    records: list[Record]


class Journal:
    """Where one process of a run writes its answers; one other process cannot write to the same file meanwhile.

    A line that was cut off when an earlier run was killed is removed. Raises `RRVideoError` if the file cannot be
    written, or is being written.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.path = folder / f"answers-{rank}.jsonl"
        with _failures_told(self.path):
            self._file = self.path.open("a+b", buffering=0)
            lock(self._file.fileno(), self.path)
            self._file.seek(0)
            content = self._file.read()
            whole = content.rfind(b"\n") + 1
            if _is_record(content[whole:]):
                self._file.write(b"\n")  # all that was cut off
            else:
                self._file.truncate(whole)
            _sync_folder(folder)

    def append(self, record: Record) -> None:
        """Write a record; once this returns, it is on the disk."""
        left = memoryview(record.line())
        with _failures_told(self.path):
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_run(folder: str | Path) -> Run:
    """Read a run, finished or not: what all its processes have written, each question once.

    An answer counts more than a failure, and of several the last one. Raises `RRVideoError` if `folder` holds no run,
    or one of its files is damaged.
    """
    folder = Path(folder)
    return Run(folder, _settings(folder), _union([folder]))


def begin_run(folder: Path, settings: Mapping[str, Any], *, labels: Sequence[str] = ()) -> None:
    """Make `folder` a run with these `settings`, or check that it is one.

    `labels` are settings that answers do not depend on: these may differ. Raises `RRVideoError` that names those that
    do and must not.
    """
    if not (folder / SETTINGS).exists():
        with _failures_told(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("answers*.jsonl")):
            raise RRVideoError(f"{folder} holds answers but no {SETTINGS}", "put it back, or name another folder")
        _write(folder / SETTINGS, json.dumps(settings, indent=2).encode() + b"\n")
        return
    _check_same(folder, _settings(folder), settings, labels)


def merge(folder: str | Path, others: Sequence[str | Path] = (), *, labels: Sequence[str] = ()) -> Run:
    """Write all answers of the run in `folder` to its `answers.jsonl`, with those of `others`, and return it.

    `others` are folders of the same run from hosts that share no disk with it. It may be done at any time and again.
    Raises `RRVideoError` if their settings differ, except for `labels`.
    """
    folders = [Path(each) for each in (folder, *others)]
    settings = _settings(folders[0])
    for other in folders[1:]:
        _check_same(other, _settings(other), settings, labels)
    records = _union(folders)
    _write(folders[0] / MERGED, b"".join(record.line() for record in records))
    return Run(folders[0], settings, records)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
    except FileNotFoundError as error:
        raise RRVideoError(
            f"{folder} holds no run: there is no {SETTINGS} in it", "name the folder that --out named"
        ) from error
    except (OSError, ValueError) as error:
        raise RRVideoError(f"{folder / SETTINGS} cannot be read: {error}", "put it back, or begin a new run") from error
    return dict(settings)


def _check_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any], labels: Sequence[str]) -> None:
    differ = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in {**there, **here}
        if name not in labels and there.get(name) != here.get(name)
    ]
    if differ:
        raise RRVideoError(f"{folder} was begun with other settings: {'; '.join(differ)}", "name another folder")


def _union(folders: Sequence[Path]) -> list[Record]:
    """Every question once, in the order of their ids."""
    found: dict[str, Record] = {}
    for folder in folders:
        # What was merged first: it is no newer than what the processes have written.
        for path in sorted(folder.glob("answers*.jsonl"), key=lambda path: (path.name != MERGED, path.name)):
            for record in _records(path):
                known = found.get(record.question_id)
                if known is None or record.error is None or known.error is not None:
                    found[record.question_id] = record
    return [found[question] for question in sorted(found)]


def _records(path: Path) -> Iterator[Record]:
    with _failures_told(path):
        *lines, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, rest] if _is_record(rest) else lines, start=1):
        try:
            yield Record.of(line)
        except (ValueError, TypeError) as error:
            raise RRVideoError(
                f"line {number} of {path} is damaged", "delete that line: its question is then asked again"
            ) from error


def _is_record(line: bytes) -> bool:
    """Whether a line is whole, although its line break may not have been written."""
    with suppress(ValueError, TypeError):
        Record.of(line)
        return True
    return False


def _write(path: Path, content: bytes) -> None:
    """Put a file in its place at once: at no moment is there half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with _failures_told(path):
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Let a new file's name survive a power cut as well as its contents."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RRVideoError(f"{path} cannot be read or written: {error.strerror}", "name another folder") from error
