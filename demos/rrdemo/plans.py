"""What watching a video would take, as it is told before anything is decoded."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rrdemo.conversation import PlanView, Settings

if TYPE_CHECKING:
    from rrvideo.budget import Budget
    from rrvideo.video import SamplePlan

__all__ = ["longest_gap", "view"]


def view(chosen: SamplePlan, need: Budget, settings: Settings, *, memory: int, watched: bool) -> PlanView:
    """The plan `chosen` for `settings`, which needs `need` of the `memory` for videos, in bytes."""
    needed = need.kv_bytes + need.activation_bytes
    return PlanView(
        frames=need.frames,
        wanted_frames=need.wanted_frames,
        interval=longest_gap(chosen),
        width=need.width,
        height=need.height,
        tokens=need.prompt_tokens,
        visual_tokens=need.visual_tokens,
        kv_bytes=need.kv_bytes,
        memory_bytes=needed,
        fits=needed <= memory,
        watched=watched,
        start=chosen.start,
        end=chosen.end,
        times=chosen.times,
        warnings=(*_fewer(chosen, need, settings), *chosen.warnings),
    )


def longest_gap(chosen: SamplePlan) -> float:
    """The longest time between two frames, in seconds: keyframes stand at uneven distances."""
    return max((after - before for before, after in pairwise(chosen.times)), default=chosen.end - chosen.start)


def _fewer(chosen: SamplePlan, need: Budget, settings: Settings) -> list[str]:
    """Why there are fewer frames than the frame rate asks for, where `chosen` does not say so itself.

    It does where the model has no room for more, and where there are no more keyframes.
    """
    if need.wanted_frames - need.frames < 2:  # which is rounding: a temporal step has two frames
        return []
    if need.wanted_frames > settings.max_frames >= need.frames > settings.max_frames - 2:
        return [f"the frame rate asks for {need.wanted_frames:,} frames: {settings.max_frames:,} are the most"]
    if settings.fps > chosen.info.fps and settings.sampling == "uniform":
        return [f"the video itself has only {chosen.info.fps:.4g} frames a second: {need.frames:,} are taken"]
    return []
