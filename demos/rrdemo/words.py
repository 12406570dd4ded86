"""Numbers and sentences as people write them, for the page and for exports."""

from __future__ import annotations

import re

__all__ = ["counted", "elapsed", "sentence", "spacing", "spread"]


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 frame`, `1,620 frames`; `many` where an s does not make the plural."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def spacing(seconds: float) -> str:
    """A time between frames, to three digits: `0.267 s`, `1,800 s`."""
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def spread(frames: int, interval: float) -> str:
    """How many frames there are and, if several, how far apart: `60 frames, at most 1.07 s apart`."""
    return counted(frames, "frame") + (f", at most {spacing(interval)} apart" if frames > 1 else "")


def elapsed(seconds: float) -> str:
    """How long something took: `27 ms`, `1.2 s`."""
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def sentence(text: str) -> str:
    """Begin `text` as a sentence does, unless it begins with the name of a file."""
    return text[:1].upper() + text[1:] if re.match(r"[a-z]+(?:[ ,:;]|$)", text) else text
