"""Small pictures of the moments that an answer rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO

import numpy as np

from rrvideo.errors import VideoError
from rrvideo.frameindex import FrameIndex
from rrvideo.video import plan_samples, read_frames

__all__ = ["strongest"]

APART = 1 / 25  # of the time that was watched: pictures that stand closer together would be the same picture


def strongest(
    index: FrameIndex, attention: Sequence[tuple[float, float]], *, count: int, height: int
) -> list[tuple[float, bytes]]:
    """Up to `count` moments with the greatest shares of `attention`, in order of time: seconds, and a JPEG picture.

    `attention` is that of an `Answer`. A moment right beside a stronger one is no moment of its own.
    Pictures are `height` pixels high, and as wide as that makes them. Moments that cannot be decoded are left out.
    """
    from PIL import Image

    numbers = sorted({int(abs(index.times - time).argmin()) for time in _peaks(attention, count)})
    if not numbers:
        return []
    plan = replace(
        plan_samples(index, max_frames=2),  # of which nothing but the file's own facts is kept
        indices=tuple(numbers),
        times=tuple(np.asarray(index.times)[numbers].tolist()),
        width=max(1, round(height * index.width / index.height)),
        height=height,
    )
    pictures = []
    try:
        for frame in read_frames(plan):
            file = BytesIO()
            Image.fromarray(frame.image).save(file, "JPEG", quality=80)
            pictures.append((frame.time, file.getvalue()))
    except VideoError:  # none of them can be decoded, although others could
        return []
    return pictures


def _peaks(attention: Sequence[tuple[float, float]], count: int) -> list[float]:
    """The seconds of the strongest moments, strongest first, each some way from all that are stronger."""
    apart = APART * (max(time for time, _ in attention) - min(time for time, _ in attention)) if attention else 0.0
    found: list[float] = []
    for time, _ in sorted(attention, key=lambda step: -step[1]):
        if len(found) < count and all(abs(time - other) > apart for other in found):
            found.append(time)
    return found
