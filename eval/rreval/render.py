"""A report for a terminal, as Markdown, and as JSON; and how any of them becomes a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from textwrap import fill

from rreval.report import Report
from rreval.tables import Table, legend, summary, tables
from rrvideo.errors import RRVideoError

__all__ = ["as_json", "as_markdown", "as_text", "one_line", "write"]

WIDEST = 72  # characters of a cell in a terminal
LONGEST = 20  # rows of a list in a terminal


def as_text(report: Report) -> str:
    """Aligned tables. Of long lists and long texts only the beginning is shown; the other forms have all."""
    parts = [_aligned(table) for table in tables(report)]
    sentences = [summary(comparison) for comparison in report.comparisons]
    return "\n\n".join([*(fill(text, 110) for text in sentences), *parts, fill(legend(report), 110)])


def as_markdown(report: Report) -> str:
    """The same tables, whole, for a README or a pull request."""
    parts = [f"## {_escaped(table.title)}\n\n{_piped(table)}" for table in tables(report)]
    sentences = [_escaped(summary(comparison)) for comparison in report.comparisons]
    return "\n\n".join(["# Video-MME", *sentences, *parts, legend(report)])


def as_json(report: Report) -> str:
    """Everything that the report holds, as one document."""
    return json.dumps(report.to_dict(), indent=2, allow_nan=False)


def write(path: Path, text: str) -> None:
    """Write a file. Raises `RRVideoError` if that fails."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RRVideoError(f"{path} cannot be written: {error.strerror}", "name another file") from error


def one_line(text: str, *, widest: int | None = None) -> str:
    """Text that a model wrote, fit to be shown: one line, cut if too wide, and nothing that a terminal would obey."""
    line = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in " ".join(text.split()))
    return line if widest is None or len(line) <= widest else f"{line[: widest - 3]}..."


def _aligned(table: Table) -> str:
    shown = list(islice(table.rows, LONGEST if table.kind == "list" else None))
    cells = [[one_line(cell, widest=WIDEST) for cell in row] for row in (table.header, *shown)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_justified(row, widths, table.words) for row in cells]
    left = len(table.rows) - len(shown)
    more = [f"and {left:,} more: --markdown, --json and --html have them"] if left else []
    return "\n".join([table.title.upper(), *lines, *more])


def _justified(row: Sequence[str], widths: Sequence[int], words: int) -> str:
    cells = (
        cell.ljust(width) if number < words else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _piped(table: Table) -> str:
    rule = ["---" if number < table.words else "---:" for number in range(len(table.header))]
    rows = [[_escaped(one_line(cell)) for cell in row] for row in (table.header, *table.rows)]
    rows.insert(1, rule)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _escaped(text: str) -> str:
    """Text without what Markdown would take for its own."""
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, f"\\{sign}")
    return text
