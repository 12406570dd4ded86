"""The official result file of Video-MME, and the rule by which its scorer reads letters.

The scorer is evaluation/eval_your_results.py of https://github.com/MME-Benchmarks/Video-MME. It leaves answers that it
cannot read out of its denominator, and takes the first capital letter from A to D: of "Answer is C" the A. Figures that
were published with it hold both, so ours are given by this rule too, beside our own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rreval.data import DURATIONS
from rreval.journal import Record

__all__ = ["objections", "official_letter", "official_results"]

VIDEOS = 300  # of each duration


def official_letter(response: str) -> str:
    """The letter that the official scorer reads in a response, "" if it reads none."""
    # It removes "The best answer is" and the like before it looks, but nothing with a capital A to D in it.
    found = re.search("[ABCD]", response)
    return found[0] if found else ""


def official_results(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What the official result file holds: one object a video, in the order of their ids, with its questions in theirs.

    The response to a question that could not be asked is "". A video about which nothing could be asked is `missing`,
    which is what the scorer's option to skip missing videos looks at.
    """
    videos: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: (record.video_id, record.question_id)):
        video = videos.setdefault(
            record.video_id,
            {
                "video_id": record.video_id,
                "duration": record.duration,
                "domain": record.domain,
                "sub_category": record.sub_category,
                "missing": True,
                "questions": [],
            },
        )
        video["missing"] &= record.response is None
        video["questions"].append(
            {
                "question_id": record.question_id,
                "task_type": record.task_type,
                "question": record.question,
                "options": list(record.options),
                "answer": record.answer,
                "response": record.response or "",
            }
        )
    return list(videos.values())


def objections(results: Sequence[dict[str, Any]]) -> list[str]:
    """Why the official scorer would refuse a result file, unless it is told to skip what is missing."""
    counts = Counter(video["duration"] for video in results)
    return [
        f"{counts[duration]} of {VIDEOS} {duration} videos are there"
        for duration in DURATIONS
        if counts[duration] != VIDEOS
    ]
