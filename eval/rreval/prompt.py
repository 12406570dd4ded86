"""The official prompt of Video-MME."""

from __future__ import annotations

from collections.abc import Sequence

from rreval.data import Row

__all__ = ["prompt"]

# https://github.com/MME-Benchmarks/Video-MME
SUBTITLES = "This video's subtitles are listed below:"
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
CUE = "The best answer is:"


def prompt(row: Row, subtitles: Sequence[str] = ()) -> str:
    """The official prompt of a question; without subtitles it does not speak of them."""
    spoken = [SUBTITLES, *subtitles] if subtitles else []
    return "\n".join([*spoken, INSTRUCTION, row.question, *row.options, CUE])
