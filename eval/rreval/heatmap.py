"""What a needle test has found: accuracy over depth and length, as a heatmap, a table and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from rreval.needle import FULL, Trial
from rrvideo.errors import RRVideoError

__all__ = ["Grid", "document", "draw", "grids", "markdown"]

CHANCE = 0.25  # of four options
MEANS = {  # of a trial's fields: what a table calls them, and how it writes them
    "density": ("density", ".2f"),
    "prefill": ("prefill, seconds", ".2f"),
    "visual_tokens": ("visual tokens", ",.0f"),
    "prompt_tokens": ("all tokens", ",.0f"),
}


@dataclass(frozen=True, slots=True)
class Grid:
    """The trials of one kind of attention: by depth and length, and by length."""

    attention: str
    depths: list[float]
    lengths: list[int]
    trials: dict[tuple[float, int], list[Trial]]

    @property
    def title(self) -> str:
        return "full attention" if self.attention == FULL else f"RRAttention, {self.attention}"

    def accuracy(self, depth: float, length: int) -> float | None:
        """The share of questions that were answered right; None where nothing was measured."""
        trials = self.trials.get((depth, length))
        return sum(trial.right for trial in trials) / sum(trial.asked for trial in trials) if trials else None

    def mean(self, field: str, length: int) -> float | None:
        """The mean of a field of `Trial` over all videos of a length; None where there are none."""
        values = [getattr(trial, field) for depth in self.depths for trial in self.trials.get((depth, length), ())]
        return fmean(values) if values else None


def grids(trials: Sequence[Trial]) -> list[Grid]:
    """One grid for each kind of attention, full attention first, all with the same depths and lengths."""
    depths, lengths = (sorted({getattr(trial, name) for trial in trials}) for name in ("depth", "length"))
    found: dict[str, dict[tuple[float, int], list[Trial]]] = {}
    for trial in trials:
        found.setdefault(trial.attention, {}).setdefault((trial.depth, trial.length), []).append(trial)
    order = sorted(found, key=lambda attention: (attention != FULL, attention))
    return [Grid(attention, depths, lengths, found[attention]) for attention in order]


def markdown(shown: Sequence[Grid]) -> str:
    """A table for each grid, aligned for a terminal too."""
    return "\n\n".join(_table(grid) for grid in shown)


def document(shown: Sequence[Grid]) -> list[dict[str, Any]]:
    """The grids as JSON takes them: a list of cells, and the means over each length."""
    return [
        {
            "attention": grid.attention,
            "cells": [
                {"depth": depth, "length": length, "accuracy": grid.accuracy(depth, length)}
                for depth in grid.depths
                for length in grid.lengths
            ],
            "lengths": [
                {"length": length, **{name: grid.mean(name, length) for name in MEANS}} for length in grid.lengths
            ],
        }
        for grid in shown
    ]


def check_installed() -> None:
    """Raise `RRVideoError` if what draws is not installed: better before a long test than after it."""
    if find_spec("matplotlib") is None:
        raise RRVideoError("matplotlib, which draws, is not installed", 'pip install "rrvideo[eval]"')


def draw(shown: Sequence[Grid], path: Path) -> None:
    """Write the heatmap as PNG. Raises `RRVideoError` if that fails, or matplotlib is not installed."""
    check_installed()
    from matplotlib.figure import Figure

    depths, lengths = shown[0].depths, shown[0].lengths
    size = (2.4 + len(shown) * (0.4 + 0.85 * len(lengths)), 2.1 + 0.5 * len(depths))  # inches
    figure = Figure(figsize=size, layout="constrained")
    panels: Any = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, grid in zip(panels, shown, strict=True):
        rows = [[grid.accuracy(depth, length) for length in lengths] for depth in depths]
        values = [[float("nan") if value is None else value for value in row] for row in rows]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value is not None:
                    axes.text(x, y, f"{value:.0%}", ha="center", va="center", color="black" if value > 0.6 else "white")
        axes.set_title(grid.title, loc="left", fontweight="bold")
        axes.set_xticks(range(len(lengths)), [_under(grid, length) for length in lengths])
        axes.set_xticks([x + 0.5 for x in range(len(lengths) - 1)], minor=True)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_yticks([y + 0.5 for y in range(len(depths) - 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=2.5)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("depth of the needle")
    panels[0].annotate(  # says what stands under each column
        "visual tokens\ndensity\nprefill",
        **{"xy": (0, 0), "xycoords": "axes fraction", "xytext": (-3.5, -3.5), "textcoords": "offset points"},
        **{"ha": "right", "va": "top", "color": "dimgrey"},
    )
    bar = figure.colorbar(
        image, ax=list(panels), ticks=[0, CHANCE, 0.5, 0.75, 1], format="{x:.0%}", aspect=15, pad=0.02
    )
    bar.set_label(f"right answers ({CHANCE:.0%} by chance)")
    bar.outline.set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise RRVideoError(f"{path} cannot be written: {error.strerror}", "name another folder") from error


def _table(grid: Grid) -> str:
    rows = [["depth", *(_short(length) for length in grid.lengths)]]
    for depth in grid.depths:
        rows.append([f"{depth:.0%}", *(_text(grid.accuracy(depth, length), ".0%") for length in grid.lengths)])
    for name, (words, form) in MEANS.items():
        rows.append([words, *(_text(grid.mean(name, length), form) for length in grid.lengths)])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        " | ".join([f"| {row[0]:{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]
    rule = "|".join(["", "-" * (first + 2), *("-" * (width + 1) + ":" for width in others), ""])
    return "\n".join([f"{grid.title}:", "", f"{lines[0]} |", rule, *(f"{line} |" for line in lines[1:])])


def _under(grid: Grid, length: int) -> str:
    seconds = grid.mean("prefill", length)
    prefill = "" if seconds is None else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return "\n".join([_short(length), _text(grid.mean("density", length), ".2f"), prefill])


def _text(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _short(length: int) -> str:
    """1024 as 1K."""
    return f"{length:,}" if length % 1024 else f"{length // 1024}K"
