"""The world of the embedded model: coloured shapes that cross coloured backgrounds, scene after scene.

A `World` is one video's story, and `questions` asks only what has exactly one answer in it. drawing.py shows it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from ..clock import format_time

__all__ = [
    "CHOICE_KINDS",
    "KINDS",
    "LONG_KINDS",
    "MULTIPLE_CHOICE",
    "SHORT_KINDS",
    "Question",
    "Scene",
    "World",
    "appearances",
    "draw_world",
    "multiple_choice",
    "questions",
    "scene_of",
]

COLOURS = {
    "red": (214, 28, 36),
    "green": (22, 150, 50),
    "blue": (28, 60, 216),
    "yellow": (244, 222, 22),
    "purple": (126, 30, 156),
    "orange": (246, 136, 16),
    "cyan": (30, 210, 220),
    "pink": (250, 142, 190),
}
BACKGROUNDS = {"white": (240, 240, 240), "black": (14, 14, 14), "grey": (128, 128, 128), "brown": (92, 56, 30)}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MAX_SCENES = 8

# The prompt of Video-MME without subtitles (https://github.com/MME-Benchmarks/Video-MME).
MULTIPLE_CHOICE = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:"
)


@dataclass(frozen=True, slots=True)
class Scene:
    """One shape that crosses one background, again and again, from `start` to `end` (seconds)."""

    colour: str
    shape: str
    background: str
    direction: str
    start: float
    end: float
    x: float  # the middle of the path, as a share of the width and of the height
    y: float
    travel: float  # the length of the path, as a share of the side along which it runs
    radius: float  # as a share of the shorter side

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class World:
    """One video, or a clip of one: scenes that follow one another for `duration` seconds."""

    scenes: tuple[Scene, ...]

    @property
    def duration(self) -> float:
        return self.scenes[-1].end - self.scenes[0].start


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its one answer; `options` holds four answers where it is multiple choice."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()


def draw_world(rng: Random, duration: float, scenes: int, *, shortest: float = 4.0, begin: float = 0.0) -> World:
    """Draw `duration` seconds of video from `begin` on in so many scenes, none shorter than `shortest` seconds.

    No two scenes show the same coloured shape, so that naming one names a scene. Raises `ValueError` when the
    scenes do not fit.
    """
    if not 1 <= scenes <= MAX_SCENES:
        raise ValueError(f"scenes must be 1 to {MAX_SCENES}, not {scenes}")
    slack = duration - scenes * shortest
    if slack < -1e-6:
        raise ValueError(f"{scenes} scenes of at least {shortest} s do not fit into {duration} s")
    shares = sorted(rng.random() for _ in range(scenes - 1))
    borders = [0.0, *(slack * share + shortest * (i + 1) for i, share in enumerate(shares)), duration]
    borders = [begin + border for border in borders]
    names = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], scenes)
    drawn = []
    for (colour, shape), (start, end) in zip(names, pairwise(borders), strict=True):
        drawn.append(
            Scene(
                colour=colour,
                shape=shape,
                background=rng.choice(list(BACKGROUNDS)),
                direction=rng.choice(list(DIRECTIONS)),
                start=start,
                end=end,
                x=rng.uniform(0.42, 0.58),
                y=rng.uniform(0.42, 0.58),
                travel=rng.uniform(0.32, 0.5),
                radius=rng.uniform(0.2, 0.3),
            )
        )
    return World(tuple(drawn))


def appearances(world: World, times: Sequence[float]) -> list[str]:
    """The time, as the model is told it, of the temporal step (two frames) that first shows each scene."""
    starts = [bisect_left(times, scene.start - 1e-6) for scene in world.scenes]
    return [format_time(times[first - first % 2]) for first in starts]


def _called(scene: Scene, world: World, rng: Random) -> str:
    """What a question calls a scene: its coloured shape, or its shape alone where no other scene shows one."""
    alone = sum(other.shape == scene.shape for other in world.scenes) == 1
    return scene.shape if alone and rng.random() < 0.5 else scene.name


def _colour(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    shapes = [scene.shape for scene in world.scenes]
    for scene in world.scenes:
        if shapes.count(scene.shape) == 1:
            word = rng.choice(("colour", "color"))
            yield f"What {word} is the {scene.shape}?", scene.colour


def _shape(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    colours = [scene.colour for scene in world.scenes]
    for scene in world.scenes:
        if colours.count(scene.colour) == 1:
            yield rng.choice(("What shape is {}?", "Which shape is {}?")).format(scene.colour), scene.shape


def _background(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    texts = ("What is the background behind the {}?", "What colour is the background of the {}?")
    for scene in world.scenes:
        yield rng.choice(texts).format(_called(scene, world, rng)), scene.background


def _direction(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    texts = ("Which way does the {} move?", "In which direction does the {} move?")
    for scene in world.scenes:
        yield rng.choice(texts).format(_called(scene, world, rng)), scene.direction


def _first(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    yield rng.choice(("What appears first?", "What is the first thing to appear?")), world.scenes[0].name


def _last(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    yield rng.choice(("What appears last?", "What is the last thing to appear?")), world.scenes[-1].name


def _after(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    texts = ("What appears right after the {}?", "What comes after the {}?")
    for scene, following in pairwise(world.scenes):
        yield rng.choice(texts).format(_called(scene, world, rng)), following.name


def _before(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    texts = ("What appears right before the {}?", "What comes before the {}?")
    for scene, following in pairwise(world.scenes):
        yield rng.choice(texts).format(_called(following, world, rng)), scene.name


def _count(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    texts = ("How many scenes are there?", "How many scenes does the video have?")
    yield rng.choice(texts), str(len(world.scenes))


def _when(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    texts = ("When does the {} appear?", "At what time does the {} appear?")
    for scene, time in zip(world.scenes, appearances(world, times), strict=True):
        yield rng.choice(texts).format(scene.name), time


def _presence(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    names = {scene.name for scene in world.scenes}
    yield f"Is there a {rng.choice(sorted(names))}?", "yes"
    # An absent thing whose colour or shape is there is the one that takes a look.
    others = {f"{a.colour} {b.shape}" for a in world.scenes for b in world.scenes} - names
    everything = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES} - names
    yield f"Is there a {rng.choice(sorted(others or everything))}?", "no"


def _describe(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    if len(world.scenes) <= 4:
        scenes = (f"{scene.name} on {scene.background} moving {scene.direction}" for scene in world.scenes)
        yield "Describe the video.", ", then ".join(scenes)


def _each(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Several scenes' facts in one answer, in an order that only the question tells."""
    names = [scene.name for scene in world.scenes]
    tables = {
        "background": dict(zip(names, (scene.background for scene in world.scenes), strict=True)),
        "direction": dict(zip(names, (scene.direction for scene in world.scenes), strict=True)),
        "colour": {scene.shape: scene.colour for scene in world.scenes},
        "shape": {scene.colour: scene.shape for scene in world.scenes},
    }
    for fact, table in tables.items():
        if len(table) == len(names):  # else one shape has two colours
            yield _list(fact, table, rng)


def _times(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    names = [scene.name for scene in world.scenes]
    yield _list("time", dict(zip(names, appearances(world, times), strict=True)), rng)


def _timeline(world: World, rng: Random, times: Sequence[float]) -> Iterator[tuple[str, str]]:
    if len(world.scenes) <= 6:
        shown = (f"{time} {scene.name}" for scene, time in zip(world.scenes, appearances(world, times), strict=True))
        yield rng.choice(("List the scenes with their times.", "What appears when?")), ", ".join(shown)


def _list(fact: str, table: dict[str, str], rng: Random) -> tuple[str, str]:
    asked = rng.sample(list(table), min(4, len(table)))
    return f"Give the {fact} of each: {', '.join(asked)}.", ", ".join(f"{key} {table[key]}" for key in asked)


KINDS: dict[str, Callable[[World, Random, Sequence[float]], Iterator[tuple[str, str]]]] = {
    "colour": _colour,
    "shape": _shape,
    "background": _background,
    "direction": _direction,
    "first": _first,
    "last": _last,
    "after": _after,
    "before": _before,
    "count": _count,
    "when": _when,
    "presence": _presence,
    "describe": _describe,
    "each": _each,
    "times": _times,
    "timeline": _timeline,
}


LONG_KINDS = ("describe", "each", "times", "timeline")  # several scenes in one answer
SHORT_KINDS = tuple(kind for kind in KINDS if kind not in LONG_KINDS)
CHOICE_KINDS = tuple(kind for kind in KINDS if kind not in {"presence", *LONG_KINDS})


def questions(world: World, rng: Random, times: Sequence[float], kinds: Sequence[str] = tuple(KINDS)) -> list[Question]:
    """Every question of the given kinds that has exactly one answer, given the sampled frames' `times` (seconds)."""
    return [Question(kind, text, answer) for kind in kinds for text, answer in KINDS[kind](world, rng, times)]


def scene_of(question: Question, world: World) -> Scene | None:
    """The scene that a question is about, or None where it is about several, or none."""
    if question.kind in {"first", "last"}:
        return world.scenes[0 if question.kind == "first" else -1]
    if question.kind not in {"colour", "shape", "background", "direction", "when"}:
        return None
    words = question.text.rstrip("?").split()
    return max(world.scenes, key=lambda scene: (scene.colour in words) + (scene.shape in words))


def multiple_choice(question: Question, world: World, rng: Random, times: Sequence[float]) -> Question:
    """The question in Video-MME's form: three wrong options that this video makes plausible, and a letter to answer.

    Raises `ValueError` for kinds that have no four options: those that are not in `CHOICE_KINDS`.
    """
    wrong = _wrong_answers(question, world, rng, times)
    options = [question.answer, *wrong[:3]]
    rng.shuffle(options)
    lettered = tuple(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    text = MULTIPLE_CHOICE.format(question=question.text, options="\n".join(lettered))
    return Question(question.kind, text, "ABCD"[options.index(question.answer)], lettered)


def _wrong_answers(question: Question, world: World, rng: Random, times: Sequence[float]) -> list[str]:
    """Wrong options, the tempting ones (what else this video shows) first."""
    match question.kind:
        case "colour":
            tempting, others = [scene.colour for scene in world.scenes], list(COLOURS)
        case "shape":
            tempting, others = [], list(SHAPES)
        case "background":
            tempting, others = [], list(BACKGROUNDS)
        case "direction":
            tempting, others = [], list(DIRECTIONS)
        case "first" | "last" | "after" | "before":
            tempting = [scene.name for scene in world.scenes]
            others = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        case "count":
            tempting, others = [], [str(n) for n in range(1, MAX_SCENES + 1)]
        case "when":
            tempting = appearances(world, times)
            others = [format_time(time) for time in times]
            others += [format_time(times[-1] + 10 * n) for n in range(1, 4)]
        case kind:
            raise ValueError(f"questions of kind {kind!r} have no four options")
    rng.shuffle(tempting)
    rng.shuffle(others)
    return [option for option in dict.fromkeys([*tempting, *others]) if option != question.answer]
