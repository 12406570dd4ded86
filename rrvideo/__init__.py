"""Watch a long video once, ask it many questions: Qwen2-VL style models with RRAttention prefill.

    from rrvideo import VideoQA

    video = VideoQA.load().watch("match.mp4")
    print(video.ask("Who scores first?").text)

Importing the package loads nothing heavy: each name is looked up when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rrattention import RRConfig
    from rrvideo.errors import BudgetError, Cancelled, ModelError, RRVideoError, VideoError
    from rrvideo.evidence import Evidence
    from rrvideo.pipeline import Answer, AnswerStream, Chat, Timings, Usage, Video, VideoQA
    from rrvideo.scan import Finding, Scan, Window
    from rrvideo.stages import Cancel

__all__ = [
    "Answer",
    "AnswerStream",
    "BudgetError",
    "Cancel",
    "Cancelled",
    "Chat",
    "Evidence",
    "Finding",
    "ModelError",
    "RRConfig",
    "RRVideoError",
    "Scan",
    "Timings",
    "Usage",
    "Video",
    "VideoError",
    "VideoQA",
    "Window",
]

_ROOMS = {
    "rrattention": ("RRConfig",),
    "rrvideo.errors": ("BudgetError", "Cancelled", "ModelError", "RRVideoError", "VideoError"),
    "rrvideo.evidence": ("Evidence",),
    "rrvideo.pipeline": ("Answer", "AnswerStream", "Chat", "Timings", "Usage", "Video", "VideoQA"),
    "rrvideo.scan": ("Finding", "Scan", "Window"),
    "rrvideo.stages": ("Cancel",),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(room), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
