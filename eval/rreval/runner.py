"""Ask a model the questions of a set: each video is watched once, and each answer is on the disk before the next."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING, Literal

from rreval.data import Row, VideoItem, seconds_of
from rreval.journal import Journal, Record
from rreval.letters import parse_letter
from rreval.prompt import prompt
from rreval.settings import RunSettings
from rreval.subtitles import Subtitle, read_subtitles, spoken_at
from rrvideo.errors import RRVideoError

if TYPE_CHECKING:
    from rrvideo.engine import Progress
    from rrvideo.pipeline import Video, VideoQA

__all__ = ["check_same", "deal", "run", "unanswered"]


def unanswered(items: Sequence[VideoItem], records: Sequence[Record], *, retry_failed: bool = False) -> list[VideoItem]:
    """What is left to ask: the videos with those questions that have no record, or with `retry_failed` no answer."""
    done = {record.question_id for record in records if record.error is None or not retry_failed}
    left = [replace(item, rows=tuple(row for row in item.rows if row.question_id not in done)) for item in items]
    return [item for item in left if item.rows]


def check_same(items: Sequence[VideoItem], records: Sequence[Record], *, subtitles: bool) -> None:
    """Raise `RRVideoError` if a video that was watched is another one now, or has subtitles that it had not then."""
    known = {item.video_id: item for item in items}
    for record in records:
        item = known.get(record.video_id)
        if item is None or record.error is not None:
            continue
        if record.video_bytes is not None and item.path.exists() and item.path.stat().st_size != record.video_bytes:
            raise RRVideoError(
                f"{item.path} is not the video that the run has watched as {item.video_id}",
                "put that one back, or begin a new run",
            )
        if subtitles and record.subtitled is False and item.subtitle is not None:
            raise RRVideoError(
                f"the run has asked about {item.video_id} without subtitles, and now there are some",
                "move them away, or begin a new run",
            )


def deal(items: Sequence[VideoItem], count: int) -> list[list[VideoItem]]:
    """Deal videos to `count` processes, the longest first, each to the one that has least to watch so far."""
    lengths = {item.video_id: seconds_of(item) for item in items} if count > 1 else {}
    hands: list[list[VideoItem]] = [[] for _ in range(count)]
    loads = [(0.0, 0, hand) for hand in range(count)]  # seconds, videos, and whose
    heapify(loads)
    for item in sorted(items, key=lambda item: -lengths.get(item.video_id, 0.0)):
        seconds, videos, hand = loads[0]
        hands[hand].append(item)
        heapreplace(loads, (seconds + lengths.get(item.video_id, 0.0), videos + 1, hand))
    return hands


def run(
    qa: VideoQA,
    items: Sequence[VideoItem],
    settings: RunSettings,
    journal: Journal,
    *,
    cache: Literal["device", "offload"] = "device",
    watching: Callable[[VideoItem], Progress] | None = None,
) -> Iterator[Record]:
    """Watch each video and ask its questions; each record is in the `journal` when it is yielded.

    A video that cannot be watched, or a question that cannot be asked, is recorded with the reason. `watching` gives
    the progress callback for a video's watch. Raises `RRVideoError` if the journal cannot be written.
    """
    qa = settings.limited(qa)
    for item in items:
        for record in _answers(qa, item, settings, cache, watching and watching(item)):
            journal.append(record)
            yield record


def _answers(
    qa: VideoQA,
    item: VideoItem,
    settings: RunSettings,
    cache: Literal["device", "offload"],
    progress: Progress | None,
) -> Iterator[Record]:
    asked, subtitled = 0, item.subtitle is not None if settings.subtitles else None
    try:
        subtitles = read_subtitles(item.subtitle) if settings.subtitles and item.subtitle else []
        with qa.watch(item.path, **settings.watch_options(), cache=cache, progress=progress) as video:
            size = item.path.stat().st_size
            for row in item.rows:
                record = replace(_answer(video, row, subtitles, settings), video_bytes=size, subtitled=subtitled)
                asked += 1
                yield record
    except Exception as error:  # whatever one of 900 videos does, the others are asked
        if os.environ.get("RRVIDEO_DEBUG") == "1":
            traceback.print_exc()
        reason = str(error) if isinstance(error, RRVideoError) else f"{type(error).__name__}: {error}"
        for row in item.rows[asked:]:
            yield replace(_blank(row), error=reason)


def _answer(video: Video, row: Row, subtitles: Sequence[Subtitle], settings: RunSettings) -> Record:
    record = replace(_blank(row), warnings=video.warnings)
    try:
        spoken = spoken_at(subtitles, video.plan.times)
        answer = video.ask(prompt(row, spoken), max_new_tokens=settings.max_new_tokens)
    except RRVideoError as error:  # of this question: it is too long, and others may not be
        return replace(record, error=str(error))
    return replace(
        record,
        response=answer.text,
        prediction=parse_letter(answer.text, row.options),
        density=answer.density,
        frames=answer.usage.frames,
        visual_tokens=answer.usage.visual_tokens,
        prompt_tokens=answer.usage.prompt_tokens,
        answer_tokens=answer.usage.answer_tokens,
        seconds=answer.timings.to_dict(),
    )


def _blank(row: Row) -> Record:
    fields = asdict(row)
    fields.pop("url")
    return Record(**fields | {"options": row.options})
