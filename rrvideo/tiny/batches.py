"""What the embedded model learns from: batches of videos of one geometry with their questions, level by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..tokens import PatchSpec, Prefix, build_prefix, build_question
from .drawing import parameters
from .world import (
    CHOICE_KINDS,
    KINDS,
    LONG_KINDS,
    MAX_SCENES,
    SHORT_KINDS,
    Question,
    World,
    draw_world,
    multiple_choice,
    questions,
)

SPEC = PatchSpec()
SIZES = ((56, 56), (84, 84), (56, 112), (84, 112), (84, 56), (112, 84), (56, 84), (112, 56))
STEPS = (1, 2, 4, 6, 10, 16, 28, 48, 90, 150, 300, 600, 1200, 2700)  # temporal steps of a video
# Sampled frames a second where a video goes on past 10 minutes: with another rate its times, which have a digit more
# from there on, would stand at other places.
RATES = {600: 1.0, 1200: 1.0, 2700: 2.0}
IGNORED = -100  # what cross_entropy skips

TIMED_KINDS = ("when", "times", "timeline")  # what only timestamps tell
SCORES = (*KINDS, *(f"choice {kind}" for kind in CHOICE_KINDS), "chat", *(f"T={steps}" for steps in STEPS))


@dataclass(frozen=True, slots=True)
class Form:
    """Questions that are asked together, because they are about as long."""

    kinds: tuple[str, ...]
    questions: int  # for each video
    length: int  # tokens of a question with its answer, padded
    answer_length: int  # tokens of an answer on average, at most
    turns: int = 1  # more of them make a chat: then `length` and `answer_length` are those of all its turns


FORMS = {
    "short": Form(SHORT_KINDS, questions=16, length=20, answer_length=4),
    "long": Form(LONG_KINDS, questions=6, length=72, answer_length=36),
    "choice": Form(CHOICE_KINDS, questions=6, length=96, answer_length=2),
    "chat": Form(SHORT_KINDS, questions=5, length=72, answer_length=12, turns=3),
}


@dataclass(frozen=True, slots=True)
class Level:
    """A stage of the curriculum."""

    steps: tuple[int, ...]
    forms: tuple[str, ...]  # as often as they are listed
    kinds: tuple[str, ...]  # likewise
    timestamps: bool
    passed: float  # share of right answers that ends it
    latest: float  # share of the whole training time that ends it


# Finding the scene that a question names is what everything else rests on, and many kinds at once hide it: with all of
# them from the start it was not learned in 5,500 steps.
NAMED = ("colour", "shape", "background", "direction", "first", "last", "describe", "each")
ORDER = ("after", "before", "count", "when", "timeline")  # what takes longest to learn
LEVELS = (
    Level((2, 4, 6), ("short", "short", "long"), NAMED, False, 0.85, 0.1),
    Level((2, 4, 6, 10), ("short", "short", "long"), (*NAMED, "presence", *ORDER), True, 0.85, 0.25),
    Level((4, 6, 10, 16), ("short", "long", "choice"), (*KINDS, *ORDER, *ORDER), True, 0.9, 0.55),
    Level((6, 10, 16, 28, 48), ("short", "long", "choice"), (*KINDS, *ORDER, *ORDER), True, 0.9, 0.75),
    Level((10, 28, 48, 90, 150, 300), ("short", "long", "choice"), (*KINDS, *ORDER, *ORDER), True, 0.95, 0.85),
    Level(
        *((28, 90, 300, 600, 1200, 2700), ("short", "long", "choice", "chat"), (*KINDS, *ORDER, *ORDER)),
        *(True, 2.0, 2.0),
    ),
)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the videos of a batch share: with it, all their tensors have the same sizes and all tokens their places."""

    steps: int
    size: tuple[int, int]  # height, width
    timestamps: bool
    late: bool  # past 10 minutes, where times have a digit more
    form: str

    @property
    def asked(self) -> Form:
        return FORMS[self.form]

    @property
    def longest(self) -> float:
        """Seconds of the longest video: one that begins before 10 minutes ends there, but for those in `RATES`."""
        return 2 * self.steps / RATES.get(self.steps, 1.0)

    def videos(self, prefix_length: int, tokens: int) -> int:
        """How many videos make a batch of about that many tokens."""
        return max(1, min(256, tokens // (prefix_length + self.asked.questions * self.asked.length)))

    @staticmethod
    def draw(rng: Random, level: Level) -> Geometry:
        """One of few for each number of steps: each costs a CUDA graph."""
        steps, form = rng.choice(level.steps), rng.choice(level.forms)
        timestamps = level.timestamps and (form == "choice" or rng.random() < 0.9)
        late = timestamps and form != "long" and rng.random() < 0.25
        size = SIZES[(3 * STEPS.index(steps) + list(FORMS).index(form) + 4 * late) % len(SIZES)]
        return Geometry(steps, size, timestamps, late, form)


class Batch(NamedTuple):
    """Videos of one geometry with their questions."""

    frames: torch.Tensor  # [videos, frames, 10] float32: parameters to render
    style: torch.Tensor  # [4] float32: how to draw them, see `draw` and `degrade`
    prefix_ids: torch.Tensor  # [prefix tokens] int64
    ids: torch.Tensor  # [videos, questions, tokens] int64: question, answer, padding
    kinds: torch.Tensor  # [videos * questions] int64: rows of SCORES
    before: torch.Tensor  # [answer tokens] int64: the token before each, counted through all of `ids`
    answers: torch.Tensor  # [answer tokens] int64, padded with IGNORED


class Batches(IterableDataset):  # type: ignore[type-arg]
    """An endless stream of batches at the level that `level` holds, easier ones among them."""

    def __init__(self, tokenizer: Any, level: Any, seed: str, tokens: int) -> None:
        self.tokenizer, self.level, self.seed, self.tokens = tokenizer, level, seed, tokens
        self.tokenised: dict[tuple[str, str, bool], tuple[list[int], list[int]]] = {}

    def __iter__(self) -> Iterator[tuple[Geometry, Batch]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        rng = Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            top = self.level.value
            level = LEVELS[top if rng.random() < 0.75 else rng.randint(min(1, top), top)]
            geometry = Geometry.draw(rng, level)
            yield geometry, self.draw(rng, geometry, level)

    def draw(self, rng: Random, geometry: Geometry, level: Level) -> Batch:
        """Draw one batch: first what all its videos share, then each video."""
        form = geometry.asked
        usual = [fps for fps in (0.5, 1.0, 1.0, 1.0, 2.0, 4.0) if 2 * geometry.steps / fps <= 600]
        fps = RATES.get(geometry.steps) or rng.choice(usual)
        duration = 2 * geometry.steps / fps
        if geometry.late:
            begin = rng.uniform(600, 3540 - duration)
        else:
            begin = rng.random() * rng.choice((0, 0, max(0.0, 600 - duration)))
        prefix, moments = example(self.tokenizer, geometry, begin, duration)
        kinds = [
            kind for kind in level.kinds if kind in form.kinds and (geometry.timestamps or kind not in TIMED_KINDS)
        ]

        videos = geometry.videos(len(prefix), self.tokens)
        frames, rows, scores = [], [], []
        for _ in range(videos):
            most = min(MAX_SCENES, max(1, geometry.steps // 2))
            scenes = max(rng.randint(1, most), rng.randint(1, most))
            shortest = min(duration, 4 / fps)
            world = draw_world(rng, duration, scenes, shortest=shortest, begin=begin)
            if geometry.steps >= 28 and scenes > 1 and rng.random() < 0.4:
                world = with_a_short_scene(world, rng, shortest)
            frames.append(torch.from_numpy(parameters(world, moments)))
            for _ in range(form.questions):
                asked = [self.ask(rng, world, moments, kinds) for _ in range(form.turns)]
                kind = asked[0].kind if form.turns == 1 else "chat"
                if geometry.form == "choice":
                    asked, kind = [multiple_choice(asked[0], world, rng, moments)], f"choice {kind}"
                rows.append(self.tokenise(prefix, asked))
                scores.append(SCORES.index(kind))

        ids = torch.zeros(len(rows), form.length, dtype=torch.long)
        before: list[int] = []
        for row, turns in enumerate(rows):
            end = 0
            for text, answer in turns:
                start, end = end + len(text), end + len(text) + len(answer)
                ids[row, start - len(text) : end] = torch.tensor(text + answer)
                before += range(row * form.length + start - 1, row * form.length + end - 1)
        size = len(rows) * form.answer_length  # the same for every batch of a geometry, as CUDA graphs need it
        before = before[:size]  # a batch of nothing but long answers does without its last
        where = torch.tensor(before + [0] * (size - len(before)))
        answers = ids.view(-1)[where + 1]
        answers[len(before) :] = IGNORED
        style = torch.tensor([rng.uniform(0.8, 2.5), rng.uniform(0.8, 1.25), rng.uniform(0, 6), rng.randint(0, 1)])
        return Batch(
            frames=torch.stack(frames),
            style=style,
            prefix_ids=prefix.input_ids,
            ids=ids.view(videos, form.questions, form.length),
            kinds=torch.tensor(scores),
            before=where,
            answers=answers,
        )

    @staticmethod
    def ask(rng: Random, world: World, moments: list[float], kinds: list[str]) -> Question:
        """A question about one video, of each kind as often as it is listed."""
        while not (possible := questions(world, rng, moments, [rng.choice(kinds)])):
            pass
        return rng.choice(possible)

    def tokenise(self, prefix: Prefix, turns: Sequence[Question]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each turn's question and of its answer, the end of the turn included."""
        tokens, end = [], self.tokenizer.eos_token_id
        for question, said in zip(turns, [None, *turns], strict=False):
            key = question.text, question.answer, said is None
            known = self.tokenised.get(key)
            if known is None:
                earlier = [] if said is None else [said.text, said.answer]
                asked = build_question(self.tokenizer, prefix, [*earlier, question.text]).tolist()
                if said:  # what follows the end of an answer, the second end in there, is the same after any other
                    asked = asked[asked.index(end, asked.index(end) + 1) + 1 :]
                answer = self.tokenizer.encode(question.answer, add_special_tokens=False)
                known = asked, [*answer, end]
                if len(self.tokenised) < 50_000:
                    self.tokenised[key] = known
            tokens.append(known)
        return tokens


def with_a_short_scene(world: World, rng: Random, shortest: float) -> World:
    """The same scenes, two or more, one of which lasts `shortest` seconds and no longer: as needles in a long video."""
    scenes = list(world.scenes)
    place = rng.randrange(len(scenes))
    left = min(place, len(scenes) - 2)  # of the border that moves
    border = scenes[place].start + shortest if left == place else scenes[place].end - shortest
    scenes[left], scenes[left + 1] = replace(scenes[left], end=border), replace(scenes[left + 1], start=border)
    return World(tuple(scenes))


def example(tokenizer: Any, geometry: Geometry, begin: float, duration: float) -> tuple[Prefix, list[float]]:
    """The prefix of a video from `begin` on, and its frames' times: spread evenly, as sampling a 25 fps file does."""
    moments = torch.linspace(begin, begin + duration - 0.04, 2 * geometry.steps, dtype=torch.float64).tolist()
    return build_prefix(tokenizer, SPEC, moments, geometry.size, timestamps=geometry.timestamps), moments


def corpus() -> Iterator[str]:
    """What the tokenizer is trained on: the world's questions and answers, and times."""
    rng = Random("corpus")
    yield "system\nYou are a helpful assistant.\nuser\nassistant\n"
    for _ in range(400):
        moments = [float(n) for n in range(40)]
        world = draw_world(rng, 40, rng.randint(1, MAX_SCENES))
        for question in questions(world, rng, moments):
            yield f"{question.text}\n{question.answer}"
            if question.kind in CHOICE_KINDS:
                yield multiple_choice(question, world, rng, moments).text
