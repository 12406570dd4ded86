"""The timeline under the player: where the model looked, and where frames were taken at all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rrdemo.conversation import PlanView, Turn
from rrdemo.words import spacing, spread
from rrvideo.clock import format_time

__all__ = ["timeline"]

HEIGHT = 40  # of the drawing, whose width is the video's length in seconds
FLOOR = 34  # of the bars: below it a tick for each frame
EPSILON = 1e-6
TOLD_APART = 200  # frames, at most
ZOOMED = 0.5  # of the video: a shorter clip is worth a closer look

Clip = tuple[float, float]  # seconds


def timeline(duration: float, *, plan: PlanView | None = None, turn: Turn | None = None) -> str:
    """The timeline of a video as HTML: a slider for page.js, and what `turn` saw of it and looked at.

    Without a turn it shows what `plan` would see; beside one, where the next watch would be different.
    """
    clip, times, interval = _seen(duration, plan, turn)
    attention = turn.attention if turn else ()
    end = format_time(duration)
    return (
        f'<div class="track" role="slider" tabindex="0" aria-label="Timeline: {_label(turn)}" '
        f'data-step="{interval or duration / 100:.3f}" data-duration="{duration:.3f}" '
        f'aria-valuemin="0" aria-valuemax="{duration:.3f}" aria-valuenow="0" aria-valuetext="0:00 of {end}">'
        f'<svg viewBox="0 0 {max(duration, EPSILON):.3f} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f"{_outside(clip, duration)}{_ticks(times)}{_bars(attention, duration)}{_planned(clip, plan)}</svg>"
        '<span class="playhead"></span></div>'
        f'<div class="scale"><span aria-hidden="true">0:00</span>{_zoom(clip, duration)}'
        f'<span aria-hidden="true">{end}</span></div>'
        f'<p class="facts">{_caption(clip, times, plan, turn)}</p>'
    )


def _seen(duration: float, plan: PlanView | None, turn: Turn | None) -> tuple[Clip, Sequence[float], float]:
    """The clip, the seconds of its frames and the longest time between two: of the turn, or else of the plan."""
    if turn:
        return turn.clip, turn.times, turn.interval
    if plan:
        return (plan.start, plan.end), plan.times, plan.interval
    return (0.0, duration), (), 0.0


def _label(turn: Turn | None) -> str:
    if not turn or not turn.evidence:
        return "seek in the video"
    strongest = turn.evidence[0]
    return f"the model looked most at {format_time(strongest.start)} to {format_time(strongest.end)}"


def _caption(clip: Clip, times: Sequence[float], plan: PlanView | None, turn: Turn | None) -> str:
    if not turn:
        apart = plan and len(times) > 1 and spacing(plan.interval)
        return f"Frames are at most {apart} apart: nobody sees what lies between two." if apart else ""
    looked = "Bars show where the model looked for its last answer; "
    seen = f"it saw {spread(len(times), turn.interval)}"
    told = [looked + seen + (": nobody saw what lies between two." if len(times) > 1 else ".")]
    if plan and tuple(plan.times) != tuple(times):
        told.append(f"The next watch takes {spread(plan.frames, plan.interval)}")
        told[-1] += ", where the line above is." if (plan.start, plan.end) != clip else "."
    return " ".join(told)


def _zoom(clip: Clip, duration: float) -> str:
    """A switch for page.js, which shows nothing but the clip, if that is short."""
    start, end = clip
    if not EPSILON < end - start < ZOOMED * duration:
        return ""
    return (
        f'<button type="button" class="zoom" aria-pressed="false" data-start="{start:.3f}" data-end="{end:.3f}">'
        f"Zoom to {format_time(start)}–{format_time(end)}</button>"
    )


def _outside(clip: Clip, duration: float) -> str:
    spans = [(0.0, clip[0]), (clip[1], duration)]
    return "".join(
        f'<rect class="outside" x="{first:.3f}" y="0" width="{last - first:.3f}" height="{HEIGHT}"/>'
        for first, last in spans
        if last - first > EPSILON
    )


def _planned(clip: Clip, plan: PlanView | None) -> str:
    """A line over what the next watch would take, if that is another part of the video."""
    if plan is None or (plan.start, plan.end) == clip:
        return ""
    return f'<rect class="planned" x="{plan.start:.3f}" y="0" width="{plan.end - plan.start:.3f}" height="3"/>'


def _ticks(times: Sequence[float]) -> str:
    """A tick for each frame; frames that stand too close to be told apart make a band."""
    if not times:
        return ""
    close = (times[-1] - times[0]) / TOLD_APART
    runs: list[list[float]] = []
    for time in times:
        if runs and time - runs[-1][-1] <= close:
            runs[-1].append(time)
        else:
            runs.append([time])
    drawn = "".join(f"M{run[0]:.3f} {HEIGHT}v-4" + (f"H{run[-1]:.3f}v4z" if len(run) > 1 else "") for run in runs)
    return f'<path class="ticks" d="{drawn}"/>'


def _bars(attention: Sequence[tuple[float, float]], duration: float) -> str:
    """A bar from each temporal step to the next; its height grows with the root of its share.

    In proportion, one strong moment would leave nothing to be seen of all others.
    """
    times = [time for time, _ in attention]
    highest = max((share for _, share in attention), default=0.0)
    longest = max((after - before for before, after in pairwise(times)), default=duration)
    borders = pairwise([*times, min(duration, times[-1] + longest)] if times else [])
    return "".join(
        f'<rect class="bar" x="{first:.3f}" y="{FLOOR - height:.2f}" width="{last - first:.3f}" height="{height:.2f}"/>'
        for (first, last), (_, share) in zip(borders, attention, strict=True)
        if highest and (height := (FLOOR - 4) * (share / highest) ** 0.5)
    )
