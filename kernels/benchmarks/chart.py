"""A line chart as SVG, written by hand: no plotting package is needed to look at a benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 460
LEFT, TOP, RIGHT, BOTTOM = 70, 36, 190, 56  # margins; the legend is on the right
COLOURS = ("#0b63c4", "#c4360b", "#1a8a4a", "#8a5ad1", "#b58900", "#555555", "#999999", "#d14f9b", "#00868b")

Points = Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Points]) -> str:
    """Draw each series of (x, y) as a line with its points, as an SVG document; both axes begin at 0.

    ValueError: there is no point to draw.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("series must have a point")
    (x_end, x_step), (y_end, y_step) = (_axis(max(point[i] for point in points)) for i in range(2))

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / x_end, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / y_end

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 20, title, size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_label, anchor="middle"),
        f'<g transform="translate(18 {HEIGHT / 2}) rotate(-90)">{_text(0, 0, y_label, anchor="middle")}</g>',
    ]
    for i in range(round(x_end / x_step) + 1):
        x, y = place(i * x_step, 0)
        parts.append(_line(x, y, x, TOP) + _text(x, y + 18, f"{i * x_step:g}", anchor="middle"))
    for i in range(round(y_end / y_step) + 1):
        x, y = place(0, i * y_step)
        parts.append(_line(x, y, WIDTH - RIGHT, y) + _text(x - 8, y + 4, f"{i * y_step:g}", anchor="end"))
    for i, (name, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        placed = [place(x, y) for x, y in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        y = TOP + 12 + 20 * i
        parts.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{y - 4}" r="4" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 30, y, name))
    return "\n".join([*parts, "</svg>\n"])


def _axis(largest: float) -> tuple[float, float]:
    """Where an axis ends, and a round distance between its grid lines: four to ten of them up to `largest`."""
    rough = (largest or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (5, 2, 1) if factor * power <= rough)
    return step * math.ceil(largest / step - 1e-9), step


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'
