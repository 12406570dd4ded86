"""A small set in Video-MME's form, drawn from the embedded model's world: it runs anywhere and needs no download.

FOLDER/videomme/test-00000-of-00001.parquet   three questions about each video, in the official schema
FOLDER/data/<videoID>.mp4                     the videos: as many short ones as medium and long ones
FOLDER/subtitle/<videoID>.srt                 the subtitles of every third video
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from rrvideo.errors import RRVideoError
from rrvideo.tiny.drawing import write_video
from rrvideo.tiny.world import CHOICE_KINDS, Question, World, draw_world, multiple_choice, questions

__all__ = ["LENGTHS", "Length", "default_folder", "make_set"]

EDITION = 1  # goes up whenever the same call draws another set than before
TABLE = Path("videomme") / "test-00000-of-00001.parquet"
QUESTIONS = 3  # about each video
SUBTITLED = 3  # every third video has subtitles
SIZES = {"Landscape": (112, 84), "Portrait": (84, 112), "Square": (84, 84)}  # pixels, width and height

# What Video-MME calls such questions.
TASK_TYPES = {
    "colour": "Attribute Perception",
    "shape": "Object Recognition",
    "background": "Spatial Perception",
    "direction": "Action Recognition",
    "first": "Temporal Perception",
    "last": "Temporal Perception",
    "after": "Temporal Reasoning",
    "before": "Temporal Reasoning",
    "count": "Counting Problem",
    "when": "Temporal Perception",
}


@dataclass(frozen=True, slots=True)
class Length:
    """How long videos last, in seconds, in how many scenes (each from, to), and their frames a second."""

    seconds: tuple[int, int]
    scenes: tuple[int, int]
    fps: int


LENGTHS = {  # Video-MME's: less than 2 minutes, 4 to 15, and 30 to 60
    "short": Length((20, 90), (2, 5), fps=4),
    "medium": Length((240, 480), (3, 8), fps=2),
    "long": Length((1800, 2400), (4, 8), fps=1),
}


def default_folder() -> Path:
    """Where the set is kept for all its users."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rrvideo" / f"world-{EDITION}"


def make_set(
    folder: Path | None = None,
    *,
    videos: int = 10,
    lengths: Mapping[str, Length] = LENGTHS,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the set in `folder` (default: `default_folder()`), unless it is there already, and return the folder.

    It has so many `videos` of each of the `lengths`. The same call draws the same set, though x264 does not always code
    a picture with the same last bits. Nothing is in the folder before all of it is. `progress` is told how many videos
    are written, and of how many. Raises `RRVideoError` if the folder cannot be written, or holds something else.
    """
    folder = folder or default_folder()
    if (folder / TABLE).exists():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RRVideoError(f"{folder} holds something else", "name a folder that is empty or not there yet")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
            made = Path(unfinished, folder.name)
            _write_set(made, videos, lengths, progress or (lambda done, total: None))
            try:
                made.rename(folder)
            except OSError:
                if not (folder / TABLE).exists():  # then another process has made it meanwhile
                    raise
    except OSError as error:
        raise RRVideoError(f"{folder} cannot be written: {error.strerror or error}", "name another folder") from error
    return folder


def _write_set(folder: Path, videos: int, lengths: Mapping[str, Length], progress: Callable[[int, int], None]) -> None:
    for part in ("data", "subtitle", TABLE.parent):
        (folder / part).mkdir(parents=True)
    drawn = [_draw(duration, nth, lengths[duration]) for duration in lengths for nth in range(videos)]
    rows = [row for number, video in enumerate(drawn) for row in _rows(video, number)]
    _write_table(folder / TABLE, rows)  # first: where pyarrow is missing, nobody should wait for the videos
    for done, video in enumerate(drawn, start=1):
        width, height = SIZES[video.shape]
        write_video(
            video.world, folder / "data" / f"{video.name}.mp4", width=width, height=height, fps=video.length.fps
        )
        if video.nth % SUBTITLED == 0:
            (folder / "subtitle" / f"{video.name}.srt").write_text(_subtitles(video.world), encoding="utf-8")
        progress(done, len(drawn))


@dataclass(frozen=True, slots=True)
class _Video:
    """One video of the set, of which `rng` draws what is asked."""

    duration: str
    nth: int
    length: Length
    world: World
    rng: Random

    @property
    def name(self) -> str:
        return f"{self.duration}-{self.nth + 1:03}"

    @property
    def shape(self) -> str:
        return list(SIZES)[self.nth % len(SIZES)]


def _draw(duration: str, nth: int, length: Length) -> _Video:
    rng = Random(f"Video-MME of the world, {duration} {nth}")
    seconds, scenes = rng.randint(*length.seconds), rng.randint(*length.scenes)
    return _Video(duration, nth, length, draw_world(rng, seconds, scenes, shortest=seconds / scenes / 2), rng)


def _rows(video: _Video, number: int) -> list[dict[str, Any]]:
    """Questions of three kinds; they take turns from video to video, so that each kind is asked about as often."""
    turn = QUESTIONS * number % len(CHOICE_KINDS)
    kinds = (*CHOICE_KINDS[turn:], *CHOICE_KINDS[:turn])
    chosen = filter(None, (_question(kind, video.world, video.rng) for kind in kinds))
    of_video = {
        "video_id": f"{number + 1:03}",
        "duration": video.duration,
        "domain": "Few scenes" if len(video.world.scenes) <= 4 else "Many scenes",
        "sub_category": video.shape,
        "url": "",
        "videoID": video.name,
    }
    return [
        {
            **of_video,
            "question_id": f"{number + 1:03}-{place}",
            "task_type": TASK_TYPES[question.kind],
            "question": question.text,
            "options": list(choice.options),
            "answer": choice.answer,
        }
        for place, (question, choice) in enumerate(islice(chosen, QUESTIONS), start=1)
    ]


def _question(kind: str, world: World, rng: Random) -> tuple[Question, Question] | None:
    """A question, open and as multiple choice; None where the world gives no such question."""
    if kind == "when" and len(world.scenes) < 4:
        return None  # wrong options would be any times, and among them the neighbours of the right one
    times = [float(second) for second in range(int(world.duration)) for _ in range(2)]  # each a step of two frames
    possible = questions(world, rng, times, [kind])
    if not possible:
        return None
    question = rng.choice(possible)
    return question, multiple_choice(question, world, rng, times)


def _subtitles(world: World) -> str:
    """A word on each scene, for as long as a viewer takes to read it."""
    entries = []
    for number, scene in enumerate(world.scenes, start=1):
        end = min(scene.start + 3, scene.end)
        entries.append(f"{number}\n{_srt_time(scene.start)} --> {_srt_time(end)}\nHere comes the {scene.shape}.\n")
    return "\n".join(entries)


def _srt_time(seconds: float) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise RRVideoError("pyarrow, which writes parquet, is not installed", 'pip install "rrvideo[eval]"') from error
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
