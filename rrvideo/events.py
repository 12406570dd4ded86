"""Scans as files and tables: a line for each window as soon as it is known, so that a scan can be resumed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrvideo.errors import RRVideoError
from rrvideo.locking import only_writer

if TYPE_CHECKING:
    from rrvideo.scan import Scan, Window

__all__ = ["SUFFIXES", "frame", "json_line", "record"]

SUFFIXES = (".jsonl", ".csv")


def record(scan: Scan, path: str | Path) -> Iterator[Window]:
    """Yield the windows of `scan` that the file at `path` lacks, each once its line is in the file.

    The suffix says the format. Several videos may share a file, but only one set of questions and settings.
    A last line that was cut off while it was written is removed, and its window is watched again.
    Raises `ValueError` for another suffix, and `RRVideoError` if the file is another scan's, is being written by
    another process, or cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the file of a scan must end with {' or '.join(SUFFIXES)}, got {path.name!r}")
    with ExitStack() as held:
        with _failures_told(path):
            held.enter_context(only_writer(path))
            content = path.read_bytes()
        scan.go_to(_done(content, path, scan))
        whole = content.rfind(b"\n") + 1
        with _failures_told(path), path.open("ab") as file:
            file.truncate(whole)
            if path.suffix == ".csv" and not whole:
                file.write(_csv_line(scan.columns).encode())
        for window in scan:
            line = json_line(window, scan) if path.suffix == ".jsonl" else _csv_line(_row(window, scan).values())
            with _failures_told(path), path.open("ab") as file:
                file.write(line.encode())
            yield window


def json_line(window: Window, scan: Scan) -> str:
    """One row of JSON, with its line break."""
    return _escaped(json.dumps(_row(window, scan), ensure_ascii=False)) + "\n"


def frame(scan: Scan) -> Any:
    """The windows as a pandas `DataFrame`. Raises `RRVideoError` if pandas is not installed."""
    try:
        import pandas  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise RRVideoError("pandas is not installed", "pip install pandas, or write a .csv file") from error
    return pandas.DataFrame([_row(window, scan) for window in scan], columns=list(scan.columns))


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RRVideoError(f"{path} cannot be written: {error.strerror}", "name another file") from error


def _row(window: Window, scan: Scan) -> dict[str, Any]:
    row = window.to_dict() | {"scan": scan.digest}
    return {column: row.get(column) for column in scan.columns}


def _csv_line(cells: Iterable[Any]) -> str:
    """One row of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(_cell(cell) if isinstance(cell, str) else cell for cell in cells)
    return line.getvalue()


def _cell(text: str) -> str:
    """Line breaks become spaces, so that a row is a line."""
    return _escaped(" ".join(text.splitlines()))


def _escaped(text: str) -> str:
    """What UTF-8 has no bytes for, as in names of files that are not UTF-8, is written the way JSON escapes it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _done(content: bytes, path: Path, scan: Scan) -> int:
    """How many windows of this video a file holds. Raises `RRVideoError` if it is not this scan's."""
    hint = "name another file, or delete this one to begin again"
    try:
        rows = list(_rows(content, path.suffix, scan.columns))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise RRVideoError(f"{path} is no file of a scan with these questions", hint) from error
    settings = scan.digest.partition("-")[0]
    if any(digest.partition("-")[0] != settings for digest, *_ in rows):
        raise RRVideoError(f"{path} holds another scan: its questions, model or settings are not these", hint)
    own = {name for name in {video for _, video, *_ in rows} if _is_same(name, scan.video, path.suffix)}
    found = [row for row in rows if row[1] in own]
    if any(digest != scan.digest for digest, *_ in found):
        raise RRVideoError(f"{path} holds windows of {scan.video} as it was: the video has changed since", hint)
    if [(start, end) for *_, start, end in found] != list(scan.windows[: len(found)]):
        raise RRVideoError(f"{path} holds other windows of {scan.video} than a scan of it has", hint)
    return len(found)


def _is_same(name: str, video: str, suffix: str) -> bool:
    """Whether a file calls this video by `name`, or by another path to it."""
    if name == (_cell(video) if suffix == ".csv" else video):
        return True
    with suppress(OSError, ValueError):  # there is no such file any more, or none can have such a name
        return Path(name).samefile(video)
    return False


def _rows(content: bytes, suffix: str, columns: Sequence[str]) -> Iterator[tuple[str, str, float, float]]:
    """Digest, video, start and end of each whole line; raises nearly anything if the lines are not a scan's."""
    *whole, rest = content.split(b"\n")
    first = _csv_line(columns).encode() if suffix == ".csv" else b'{"video": '
    if not whole and rest[: len(first)] != first[: len(rest)]:
        raise ValueError("not even the beginning of a scan")
    lines = [line.decode() for line in whole]
    if suffix == ".csv":
        if whole and whole[0] + b"\n" != first:
            raise ValueError("other columns")
        rows: Iterable[dict[str, Any]] = csv.DictReader(lines)
    else:
        rows = map(json.loads, lines)
    for row in rows:
        yield row["scan"], row["video"], float(row["start"]), float(row["end"])
