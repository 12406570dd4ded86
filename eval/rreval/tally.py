"""Records counted: which are right, in which groups they fall, and sums for each video as `statistics` takes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from rreval.data import DURATIONS
from rreval.journal import Record
from rreval.statistics import Estimate, ratio

__all__ = ["GROUPS", "by_video", "groups", "is_right", "share"]

GROUPS = {"duration": "duration", "domain": "domain", "sub_category": "sub-category", "task_type": "task type"}


def is_right(record: Record) -> bool:
    """Whether a letter was read in the response, and it is the right one."""
    return record.prediction == record.answer


def by_video(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each video together, in the order of the videos' ids."""
    videos: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        videos[record.video_id].append(record)
    return [videos[video] for video in sorted(videos)]


def groups(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """The records by each of `GROUPS`: durations from short to long, all else by name."""
    found = {}
    for field in GROUPS:
        parts: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            parts[getattr(record, field)].append(record)
        found[field] = {name: parts[name] for name in sorted(parts, key=_order)}
    return found


def share(
    records: Iterable[Record], counted: Callable[[Record], float], among: Callable[[Record], float] = lambda record: 1
) -> Estimate:
    """The sum of what is `counted` over the sum of `among`, with an interval from resampled videos."""
    videos = by_video(records)
    return ratio([sum(map(counted, video)) for video in videos], [sum(map(among, video)) for video in videos])


def _order(name: str) -> tuple[int, str]:
    return (DURATIONS.index(name) if name in DURATIONS else len(DURATIONS), name)
