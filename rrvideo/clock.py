"""Times as people write them: `1:30`, `1:02:03`, `1:30-2:45`."""

from __future__ import annotations

import math
import re

__all__ = ["format_time", "parse_clip", "parse_time"]

CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)")


def format_time(seconds: float) -> str:
    """Write `seconds` as `0:42` or `1:02:03`, without the fraction, so that it never lies past the video's end."""
    minutes, second = divmod(math.floor(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def parse_clip(text: str) -> tuple[float | None, float | None]:
    """Read `1:30-2:45`, `90-`, `-0:45` or `1:02:03-1:03:00` as (start, end) in seconds, None where it is open.

    Raises `ValueError` that says what is wrong with `text`.
    """
    start_text, dash, end_text = (part.strip() for part in text.partition("-"))
    if not dash or not (start_text or end_text):
        raise ValueError(f"a clip is START-END, such as 1:30-2:45, 90- or (--clip=) -0:45; got {text!r}")
    start = parse_time(start_text) if start_text else None
    end = parse_time(end_text) if end_text else None
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"the clip {text!r} ends before it starts")
    return start, end


def parse_time(text: str) -> float:
    """Read `90`, `1:30` or `1:02:03.5` in seconds; raises `ValueError` that says what is wrong with `text`."""
    match = CLOCK.fullmatch(text)
    if match is None:
        raise ValueError(f"a time is seconds, M:SS or H:MM:SS; got {text!r}")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    if (match[2] and seconds >= 60) or (match[1] and minutes >= 60):
        raise ValueError(f"minutes and seconds go up to 59; got {text!r}")
    return hours * 3600 + minutes * 60 + seconds
