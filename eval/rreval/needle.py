"""The visual needle test: one odd scene, hidden at each depth of videos of each length. Does the model find it?

Scenes of the embedded model's world follow one another; of one, the needle, no other has the colour or the shape, and
it lasts two temporal steps. Full and sparse attention see the same videos and are asked the same questions about it.

RUN/settings.json   what the answers depend on
RUN/trials.jsonl    a line for each video that was watched in each way; a test that was stopped goes on after the last
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rreval.journal import begin_run
from rreval.letters import parse_letter
from rreval.settings import LABELS, rule_of, versions
from rrvideo.budget import ROOM, extent
from rrvideo.errors import BudgetError, RRVideoError
from rrvideo.locking import only_writer
from rrvideo.pipeline import VideoQA
from rrvideo.tiny.drawing import write_video
from rrvideo.tiny.world import Question, Scene, World, draw_world, multiple_choice
from rrvideo.video import smart_resize

if TYPE_CHECKING:
    from rrattention import RRConfig
    from rrvideo.model import Checkpoint

__all__ = ["DEPTHS", "LENGTHS", "NeedleTest", "Trial", "hide", "measure", "questions_about", "read_trials"]

LENGTHS = (1024, 2048, 4096, 8192)  # visual tokens; two cores watch these in a few minutes
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FPS = 2  # frames a second, so that a temporal step of two frames lasts a second
NEEDLE = 2  # steps, the least in which a shape is seen to move
HAY = 5  # other scenes, at most
FEWEST = NEEDLE + 4  # steps of a video: two other scenes, of two steps each
FRAME = (84, 112)  # pixels, height and width; more where the model's frames have to be larger
ANSWER = 32  # tokens, at most
FULL = "full"
TRIALS = "trials.jsonl"


@dataclass(frozen=True, slots=True)
class NeedleTest:
    """What is to be measured: `lengths` in visual tokens, `depths` from 0 to 1, `videos` for each length and depth.

    Each video is watched with full attention and with RRAttention at each of `taus`. ValueError names the field that is
    wrong, and its value.
    """

    lengths: Sequence[int] = LENGTHS
    depths: Sequence[float] = DEPTHS
    videos: int = 2
    taus: Sequence[float] = (0.95,)

    def __post_init__(self) -> None:
        for name, valid in (
            ("lengths", all(length > 0 for length in self.lengths)),
            ("depths", all(0 <= depth <= 1 for depth in self.depths)),
            ("taus", all(0 < tau <= 1 for tau in self.taus)),
            ("videos", self.videos > 0),
        ):
            if not valid:
                raise ValueError(f"{name} is out of bounds: {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Trial:
    """One video that was watched in one way, and how many of the questions about its needle were answered right."""

    attention: str  # "full", or "tau 0.95"
    length: int  # visual tokens that were asked for
    depth: float
    video: int
    right: int
    asked: int
    visual_tokens: int  # whole steps, so a few more than were asked for
    prompt_tokens: int
    density: float
    decode: float  # seconds, as are the next two
    encode: float
    prefill: float

    @property
    def key(self) -> tuple[str, int, float, int]:
        """What tells it from the others of a test."""
        return self.attention, self.length, self.depth, self.video


def hide(rng: Random, steps: int, depth: float) -> tuple[World, Scene]:
    """Draw a video of `steps` temporal steps with a needle at `depth`: 0 is its beginning, 1 its end.

    Raises `ValueError` if there are too few steps.
    """
    if steps < FEWEST:
        raise ValueError(f"steps must be {FEWEST} at least, not {steps}")
    rest = steps - NEEDLE
    hay = min(HAY, rest // 2)
    looks: tuple[Scene, ...] = ()
    while not (odd := [scene for scene in looks if _is_odd(scene, looks)]):
        looks = draw_world(rng, steps, hay + 1, shortest=0).scenes
    others = [scene for scene in looks if scene is not odd[0]]
    start = round(depth * rest)
    before = 0 if start == 0 else hay if start == rest else 1 + int(depth * (hay - 1))
    needle = replace(odd[0], start=start, end=start + NEEDLE)
    scenes = [
        *_lay(others[:before], 0, start),
        needle,
        *_lay(others[before:], start + NEEDLE, steps),
    ]
    return World(tuple(scenes)), needle


def questions_about(needle: Scene, world: World, rng: Random) -> list[Question]:
    """All that can be asked about the needle, as multiple choice; wrong options are what the other scenes show."""
    facts = (
        ("colour", f"What colour is the {needle.shape}?", needle.colour),
        ("shape", f"What shape is {needle.colour}?", needle.shape),
        ("background", f"What is the background behind the {needle.name}?", needle.background),
        ("direction", f"Which way does the {needle.name} move?", needle.direction),
    )
    return [multiple_choice(Question(*fact), world, rng, ()) for fact in facts]


def measure(
    qa: VideoQA, test: NeedleTest, folder: Path, *, progress: Callable[[int, int], None] | None = None
) -> Iterator[Trial]:
    """Run what `folder` lacks of `test`; each trial is on the disk when it is yielded.

    `progress` is told how many trials are done, and of how many. Raises `BudgetError` if a length does not fit the
    model, and `RRVideoError` if the folder was begun with another model, is in use, or cannot be written.
    """
    from rrattention.transformers import enable, settings

    model, (config, attention) = qa.checkpoint.model, settings(qa.checkpoint.model)
    ways = {FULL: config} | {f"tau {tau:g}": replace(config, tau=tau) for tau in test.taus}
    eyes = _Eyes.of(qa.checkpoint, test.lengths)
    begin_run(folder, _settings(eyes, config), labels=LABELS)
    journal = folder / TRIALS
    planned = list(product(sorted(set(test.lengths)), sorted(set(test.depths)), range(test.videos)))
    count, total = 0, len(planned) * len(ways)
    with only_writer(journal):
        done = {trial.key for trial in _repaired(journal)}
        try:
            for length, depth, video in planned:
                rng = Random(f"needle {length} {depth} {video}")
                world, needle = hide(rng, eyes.steps(length), depth)
                asked = questions_about(needle, world, rng)
                with TemporaryDirectory() as scratch:
                    path = Path(scratch, "needle.mp4")
                    for way, choice in ways.items():
                        if (way, length, depth, video) not in done:
                            if not path.exists():
                                write_video(world, path, width=eyes.width, height=eyes.height, fps=FPS)
                            enable(model, choice, attention="full" if way == FULL else "rr")
                            trial = Trial(way, length, depth, video, **eyes.look(path, asked))
                            _append(journal, trial)
                            yield trial
                        count += 1
                        if progress:
                            progress(count, total)
        finally:
            enable(model, config, attention=attention)


@dataclass(frozen=True, slots=True)
class _Eyes:
    """A model that sees every frame of the test's videos, at the size that they have."""

    qa: VideoQA
    width: int
    height: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, lengths: Sequence[int]) -> _Eyes:
        """Raises `BudgetError` if one of the lengths is too short, or does not fit."""
        limits = checkpoint.limits
        height, width = smart_resize(
            *FRAME, factor=limits.factor, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels
        )
        pixels = height * width
        every = replace(limits, min_pixels=pixels, max_pixels=pixels, total_pixels=sys.maxsize)
        eyes = cls(VideoQA(replace(checkpoint, limits=every)), width, height)
        least, room = FEWEST * pixels // limits.factor**2, checkpoint.context_length - ROOM
        if min(lengths) < least:
            raise BudgetError(
                f"a video of {min(lengths):,} visual tokens is too short to hide a scene in", f"take {least:,} or more"
            )
        longest = eyes.steps(max(lengths))
        positions = extent(checkpoint.prefix([step / 2 for step in range(2 * longest)], (height, width)))
        if positions > room:
            raise BudgetError(
                f"{max(lengths):,} visual tokens need {positions:,} positions, and the model has {room:,} for a video",
                f"about {max(lengths) * room // positions:,} visual tokens fit",
            )
        return eyes

    def steps(self, length: int) -> int:
        """Temporal steps of a video of at least `length` visual tokens."""
        return -(-length * self.qa.checkpoint.limits.factor**2 // (self.height * self.width))

    def look(self, path: Path, questions: Sequence[Question]) -> dict[str, Any]:
        """Watch a video and ask; returns the rest of a `Trial`."""
        with self.qa.watch(path, fps=FPS, max_frames=sys.maxsize) as video:
            answers = [video.ask(question.text, max_new_tokens=ANSWER) for question in questions]
        pairs = zip(questions, answers, strict=True)
        usage, timings = answers[0].usage, answers[0].timings
        return {
            "right": sum(parse_letter(answer.text, question.options) == question.answer for question, answer in pairs),
            "asked": len(questions),
            "visual_tokens": usage.visual_tokens,
            "prompt_tokens": usage.prompt_tokens,
            "density": answers[0].density,
            "decode": timings.decode,
            "encode": timings.encode,
            "prefill": timings.prefill,
        }


def read_trials(folder: Path) -> list[Trial]:
    """What a test has measured so far. Raises `RRVideoError` if there is none in `folder`, or it cannot be read."""
    path = folder / TRIALS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break was cut off
        return [Trial(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise RRVideoError(f"{path} cannot be read: {error}", "name the folder of a needle test") from error


def _is_odd(scene: Scene, scenes: Sequence[Scene]) -> bool:
    others = [other for other in scenes if other is not scene]
    return all(scene.colour != other.colour and scene.shape != other.shape for other in others)


def _lay(scenes: Sequence[Scene], start: int, end: int) -> list[Scene]:
    """Spread scenes over the steps from `start` to `end`, which are seconds too."""
    borders = [start + (end - start) * place // max(1, len(scenes)) for place in range(len(scenes) + 1)]
    return [
        replace(scene, start=float(a), end=float(b)) for scene, (a, b) in zip(scenes, pairwise(borders), strict=True)
    ]


def _settings(eyes: _Eyes, config: RRConfig) -> dict[str, Any]:
    """What the trials depend on, beside what each says of itself."""
    from rrvideo.store import checkpoint_digest

    checkpoint = eyes.qa.checkpoint
    return {
        "test": "needle",
        "model": checkpoint.name,
        "checkpoint": checkpoint_digest(checkpoint.folder)[:16],
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "width": eyes.width,
        "height": eyes.height,
        "rrattention": rule_of(config, checkpoint),
        "versions": versions(),
    }


def _repaired(path: Path) -> list[Trial]:
    """The trials of a file that is to be written on: half a line, of a test that was killed, is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    return read_trials(path.parent)


def _append(path: Path, trial: Trial) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RRVideoError(f"{path} cannot be written: {error.strerror}", "name another folder") from error
