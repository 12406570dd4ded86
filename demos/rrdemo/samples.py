"""Example videos of the embedded model's world: one comes with rrvideo, others are drawn when they are first wanted."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from rrvideo.cli import SAMPLE
from rrvideo.errors import RRVideoError

if TYPE_CHECKING:
    from rrvideo.tiny.world import World

__all__ = ["Sample", "samples"]

KINDS = ("first", "last", "colour", "direction", "background", "shape")  # of questions that the model is good at


@dataclass(frozen=True, slots=True)
class Sample:
    """An example: what to call it, what is in it, and questions that suit it."""

    name: str  # of its file, and of the bundled one as the command line takes it
    about: str
    questions: tuple[str, ...]
    world: World = field(repr=False)
    width: int
    height: int
    fps: int

    @property
    def source(self) -> str:
        """What `rrvideo ask` calls it on this machine."""
        return self.name if self.name == "sample" else str(_cache() / self.name)

    def file(self) -> Path:
        """Its video file, drawn into the user's cache folder if it is not there yet: seconds, once.

        Raises `RRVideoError` if nothing can be written there.
        """
        if self.name == "sample":
            return SAMPLE
        from rrvideo.tiny.drawing import write_video

        folder = _cache()
        path = folder / self.name
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                # In a folder of its own: what two draw at a time, or somebody breaks off, is never half a file.
                with tempfile.TemporaryDirectory(dir=folder) as partial:
                    drawn = Path(partial) / self.name
                    write_video(self.world, drawn, width=self.width, height=self.height, fps=self.fps)
                    drawn.replace(path)
        except OSError as error:
            raise RRVideoError(
                f"the example cannot be drawn: {error}", "set XDG_CACHE_HOME to another folder"
            ) from error
        return path


def samples() -> list[Sample]:
    """The examples; nothing is drawn yet."""
    from rrvideo.tiny.sample import sample_world
    from rrvideo.tiny.world import draw_world

    upright = draw_world(Random("example upright"), 24, 3, shortest=6)
    long = draw_world(Random("example ten minutes"), 600, 8, shortest=40)
    return [
        Sample("sample", "A minute in five scenes", _questions(sample_world()), sample_world(), 320, 240, 15),
        Sample("upright.mp4", "Twenty-four seconds, upright", _questions(upright), upright, 240, 320, 12),
        Sample("ten-minutes.mp4", "Ten minutes in eight scenes", _questions(long), long, 192, 144, 2),
    ]


def _questions(world: World) -> tuple[str, ...]:
    """One question of each kind that has exactly one answer."""
    from rrvideo.tiny.world import questions

    rng = Random("example questions")
    drawn = [questions(world, rng, [], [kind]) for kind in KINDS]
    return tuple(rng.choice(possible).text for possible in drawn if possible)


def _cache() -> Path:
    """A folder for this version, whose way of drawing it is."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "rrvideo" / f"examples-{version('rrvideo')}"
