"""Subtitles as Video-MME has them, and which of them are spoken at the frames that a model sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rrvideo.errors import RRVideoError

__all__ = ["Subtitle", "read_subtitles", "spoken_at"]

TIME = r"(?:(\d+):)?(\d+):(\d+)(?:[.,](\d+))?"
TIMES = re.compile(rf"\s*{TIME}\s*-->\s*{TIME}.*")
MARKUP = re.compile(r"</?(?:font|b|i|u|s|c|v)\b[^>]*>|\{\\[^}]*\}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Subtitle:
    """What is spoken from `start` until `end` seconds."""

    start: float
    end: float
    text: str


def read_subtitles(path: Path) -> list[Subtitle]:
    """Read an .srt file, without its markup, in the order of the times. Raises `RRVideoError` if it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RRVideoError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")  # what editors on Windows wrote for long
    found, spoken = list[tuple[float, float, list[str]]](), list[str]()
    for line in text.splitlines():
        if times := TIMES.fullmatch(line):
            if spoken and spoken[-1].strip().isdecimal():
                spoken.pop()  # the number of this one
            groups = times.groups()
            spoken = []
            found.append((_seconds(groups[:4]), _seconds(groups[4:]), spoken))
        elif line.strip():
            spoken.append(line)
    if text.strip() and not found:
        raise RRVideoError(f"{path} is no .srt file: it has no times", "copy or download it again")
    subtitles = [Subtitle(start, end, _plain(lines)) for start, end, lines in found]
    return sorted((subtitle for subtitle in subtitles if subtitle.text), key=lambda subtitle: subtitle.start)


def spoken_at(subtitles: Sequence[Subtitle], times: Sequence[float]) -> list[str]:
    """The subtitles that are on screen at any of `times` (seconds), each once, in their order."""
    return [each.text for each in subtitles if any(each.start <= time < each.end for time in times)]


def _seconds(groups: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = groups
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + int(seconds or 0) + float(f"0.{fraction or 0}")


def _plain(lines: Sequence[str]) -> str:
    return " ".join(" ".join(MARKUP.sub("", line) for line in lines).split())
