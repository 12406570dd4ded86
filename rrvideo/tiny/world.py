"""The world of the embedded model: coloured shapes that cross coloured backgrounds, scene after scene.

A `World` is one video's story. `questions` asks only what has exactly one answer in it, `render` draws it at
any moment, size and device, and `write_video` encodes it, so that training, tests and samples all see one world.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch

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
    "parameters",
    "questions",
    "render",
    "scene_of",
    "write_video",
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
CROSSING = 8.0  # seconds: where a scene lasts longer, its shape starts again, so that its motion shows at any length

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


def parameters(world: World, times: Sequence[float]) -> np.ndarray:
    """What each frame shows, as numbers: [frames, 10] of colour (3), background (3), shape, x, y, radius."""
    rows = []
    scenes = iter(world.scenes)
    scene = next(scenes)
    for time in times:
        while time >= scene.end - 1e-6 and scene is not world.scenes[-1]:
            scene = next(scenes)
        progress = (time - scene.start) / min(CROSSING, scene.end - scene.start) % 1 - 0.5
        right, down = DIRECTIONS[scene.direction]
        x, y = scene.x + right * progress * scene.travel, scene.y + down * progress * scene.travel
        shape = SHAPES.index(scene.shape)
        rows.append((*COLOURS[scene.colour], *BACKGROUNDS[scene.background], shape, x, y, scene.radius))
    return np.asarray(rows, dtype=np.float32)


def render(
    frames: torch.Tensor,
    height: int,
    width: int,
    *,
    softness: float | torch.Tensor = 1.0,
    stretch: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Draw frames from their `parameters` [..., 10]: float RGB in 0..255, [..., height, width, 3], on their device.

    `softness` is the width of the shapes' edges in pixels; `stretch` makes shapes that much wider than high, as a
    resize to a multiple of 28 pixels does.
    """
    colour, background, shape, x, y, radius = frames[..., None, None, :].split((3, 3, 1, 1, 1, 1), dim=-1)
    rows = torch.arange(height, device=frames.device, dtype=frames.dtype)[:, None, None] + 0.5
    columns = torch.arange(width, device=frames.device, dtype=frames.dtype)[None, :, None] + 0.5
    down, right = rows - y * height, (columns - x * width) / stretch
    distance = torch.hypot(down, right)
    angle = torch.atan2(down, right) + math.pi / 2  # from straight up, where every shape points
    size = radius * torch.as_tensor(width / stretch).clamp(max=height)
    coverage = ((_boundary(shape, angle) * size - distance) / softness + 0.5).clamp(0, 1)
    return background + (colour - background) * coverage


def _boundary(shape: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """How far from its centre each shape reaches in the direction of `angle`, for a radius of about 1."""
    square = math.cos(math.pi / 4) / torch.cos(_fold(angle, 4)) * 1.2
    triangle = math.cos(math.pi / 3) / torch.cos(_fold(angle + math.pi / 3, 3)) * 1.25
    # A star's edge is the straight line from a tip (1, 0) to a notch.
    notch_x, notch_y = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    side = _fold(angle, 5).abs()
    star = notch_y / (notch_y * torch.cos(side) + (1 - notch_x) * torch.sin(side)) * 1.3
    radii = torch.where(shape == SHAPES.index("square"), square, torch.ones_like(angle))
    radii = torch.where(shape == SHAPES.index("triangle"), triangle, radii)
    return torch.where(shape == SHAPES.index("star"), star, radii)


def _fold(angle: torch.Tensor, corners: int) -> torch.Tensor:
    """Bring an angle into the sector around its nearest multiple of a turn / corners."""
    sector = 2 * math.pi / corners
    return angle - sector * torch.round(angle / sector)


def write_video(world: World, path: str | Path, *, width: int, height: int, fps: int = 25, gop: int = 50) -> None:
    """Encode the world as H.264 (4:2:0, x264's default quality) at the given size and frame rate."""
    import av

    times = world.scenes[0].start + np.arange(round(world.duration * fps)) / fps
    described = torch.from_numpy(parameters(world, times.tolist()))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"g": str(gop), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        with _one_thread():
            for frame in described:
                picture = render(frame, height, width).round().to(torch.uint8).numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Do without other threads: a frame is many small steps, in each of which they would wait for one another.

    Where other programs keep the cores busy, that was measured to take a hundred times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
