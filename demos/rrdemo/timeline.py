"""The timeline under the player: where the model looked, and where frames were taken at all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rrdemo.conversation import Turn
from rrvideo.clock import format_time

__all__ = ["timeline"]

HEIGHT = 40  # of the drawing, whose width is the video's length in seconds
EPSILON = 1e-6


def timeline(
    duration: float,
    *,
    times: Sequence[float] = (),
    interval: float = 0.0,
    clip: tuple[float, float] | None = None,
    turn: Turn | None = None,
) -> str:
    """The timeline of a video as HTML: a slider for page.js, and the attention of `turn`.

    `times` are those of the frames that are or will be seen, `interval` the seconds between two, `clip` the part of the
    video that they come from. All but `turn` may come from a plan, before anything is watched.
    """
    attention = turn.attention if turn else ()
    step = interval or duration / 100
    start, end = clip or (0.0, duration)
    return (
        f'<div class="track" role="slider" tabindex="0" aria-label="Timeline: {_label(turn)}" data-step="{step:.3f}" '
        f'aria-valuemin="0" aria-valuemax="{duration:.3f}" aria-valuenow="0" '
        f'aria-valuetext="{format_time(0)} of {format_time(duration)}">'
        f'<svg viewBox="0 0 {max(duration, EPSILON):.3f} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f"{_outside(start, end, duration)}{_ticks(times)}{_bars(attention, duration)}</svg>"
        '<span class="playhead"></span><span class="pointer"></span></div>'
        f'<div class="scale" aria-hidden="true"><span>{format_time(0)}</span><span>{format_time(duration)}</span></div>'
        f'<p class="facts">{_caption(turn, interval)}</p>'
    )


def _label(turn: Turn | None) -> str:
    if not turn or not turn.evidence:
        return "seek in the video"
    strongest = turn.evidence[0]
    return f"the model looked most at {format_time(strongest.start)} to {format_time(strongest.end)}"


def _caption(turn: Turn | None, interval: float) -> str:
    looked = "Bars show where the model looked for its last answer. " if turn and turn.attention else ""
    sampled = f"Frames are at most {interval:.3g} s apart: nobody saw what lies between two." if interval else ""
    return looked + sampled


def _outside(start: float, end: float, duration: float) -> str:
    spans = [(0.0, start), (end, duration)]
    return "".join(
        f'<rect class="outside" x="{first:.3f}" y="0" width="{last - first:.3f}" height="{HEIGHT}"/>'
        for first, last in spans
        if last - first > EPSILON
    )


def _ticks(times: Sequence[float]) -> str:
    if not times:
        return ""
    drawn = "".join(f"M{time:.3f} {HEIGHT}v-4" for time in times)
    return f'<path class="ticks" d="{drawn}"/>'


def _bars(attention: Sequence[tuple[float, float]], duration: float) -> str:
    """A bar from each temporal step to the next, as high as its share of the highest."""
    times = [time for time, _ in attention]
    highest = max((share for _, share in attention), default=0.0)
    longest = max((after - before for before, after in pairwise(times)), default=duration)
    borders = pairwise([*times, min(duration, times[-1] + longest)] if times else [])
    return "".join(
        f'<rect class="bar" x="{first:.3f}" y="{HEIGHT - height:.2f}" width="{last - first:.3f}" '
        f'height="{height:.2f}"/>'
        for (first, last), (_, share) in zip(borders, attention, strict=True)
        if highest and (height := (HEIGHT - 4) * share / highest)
    )
