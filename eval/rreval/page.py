"""A report as one HTML file that needs no other: plots that follow the window's width, and every table."""

from __future__ import annotations

from pathlib import Path

from rreval.plots import accuracies, differences, scatters, stages
from rreval.render import one_line
from rreval.report import Report
from rreval.tables import legend, percent, summary, tables

__all__ = ["as_page"]

LOOKS = 6  # colours and shapes that the page has for runs


def as_page(report: Report) -> str:
    """The whole page. It has no script and loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, one_line=one_line, number="{:,}".format)
    return environment.get_template("page.html").render(
        report=report,
        style=(here / "page.css").read_text(encoding="utf-8"),
        looks={run.name: number % LOOKS for number, run in enumerate(report.runs)},
        summaries=[summary(comparison) for comparison in report.comparisons],
        plots=[*differences(report), *accuracies(report), *stages(report)],
        scatters=list(scatters(report)),
        tables=list(tables(report)),
        legend=legend(report),
    )
