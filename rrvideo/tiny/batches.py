"""What the embedded model learns from: batches of videos of one geometry with their questions, level by level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..tokens import PatchSpec, Prefix, build_prefix, build_question
from .world import CHOICE_KINDS, KINDS, MAX_SCENES, Question, World, draw_world, multiple_choice, parameters, questions

SPEC = PatchSpec()
SIZES = ((56, 56), (84, 84), (56, 112), (84, 112), (84, 56), (112, 84), (56, 84), (112, 56))
STEPS = (1, 2, 4, 6, 10, 16, 28, 48, 90, 150, 300)  # temporal steps of a video
IGNORED = -100  # what cross_entropy skips

LONG_KINDS = ("describe", "each", "times", "timeline")  # several scenes in one answer
TIMED_KINDS = ("when", "times", "timeline")  # what only timestamps tell
SCORES = (*KINDS, *(f"choice {kind}" for kind in CHOICE_KINDS), *(f"T={steps}" for steps in STEPS))


@dataclass(frozen=True, slots=True)
class Form:
    """Questions that are asked together, because they are about as long."""

    kinds: tuple[str, ...]
    questions: int  # for each video
    length: int  # tokens of a question with its answer, padded
    answer_length: int  # tokens of an answer on average, at most


FORMS = {
    "short": Form(tuple(kind for kind in KINDS if kind not in LONG_KINDS), questions=16, length=20, answer_length=4),
    "long": Form(LONG_KINDS, questions=6, length=72, answer_length=36),
    "choice": Form(CHOICE_KINDS, questions=6, length=96, answer_length=2),
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
    Level((10, 28, 48, 90, 150, 300), ("short", "long", "choice"), (*KINDS, *ORDER, *ORDER), True, 2.0, 2.0),
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

    def videos(self, prefix_length: int, tokens: int) -> int:
        """How many videos make a batch of about that many tokens."""
        return max(4, min(256, tokens // (prefix_length + self.asked.questions * self.asked.length)))

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
        self.tokenised: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

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
        form, longest = geometry.asked, 3540 if geometry.late else 600
        fps = rng.choice([fps for fps in (0.5, 1.0, 1.0, 1.0, 2.0, 4.0) if 2 * geometry.steps / fps <= 600])
        duration = 2 * geometry.steps / fps
        begin = rng.uniform(600, longest - duration) if geometry.late else rng.choice((0, 0, longest - duration))
        begin = begin if geometry.late else rng.random() * begin
        prefix, moments = example(self.tokenizer, geometry, begin, duration)
        kinds = [
            kind for kind in level.kinds if kind in form.kinds and (geometry.timestamps or kind not in TIMED_KINDS)
        ]

        videos = geometry.videos(len(prefix), self.tokens)
        frames, rows, scores = [], [], []
        for _ in range(videos):
            most = min(MAX_SCENES, max(1, geometry.steps // 2))
            scenes = max(rng.randint(1, most), rng.randint(1, most))
            world = draw_world(rng, duration, scenes, shortest=min(duration, 4 / fps), begin=begin)
            frames.append(torch.from_numpy(parameters(world, moments)))
            for question in self.ask(rng, world, moments, kinds, form.questions):
                kind = question.kind
                if geometry.form == "choice":
                    question = multiple_choice(question, world, rng, moments)  # noqa: PLW2901
                    kind = f"choice {kind}"
                rows.append(self.tokenise(prefix, question))
                scores.append(SCORES.index(kind))

        ids = torch.zeros(len(rows), form.length, dtype=torch.long)
        before: list[int] = []
        for row, (asked, answer) in enumerate(rows):
            ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
            before += range(row * form.length + len(asked) - 1, row * form.length + len(asked) + len(answer) - 1)
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
    def ask(rng: Random, world: World, moments: list[float], kinds: list[str], count: int) -> Iterator[Question]:
        """Questions about one video, of each kind as often as it is listed."""
        asked = 0
        while asked < count:
            if possible := questions(world, rng, moments, [rng.choice(kinds)]):
                yield rng.choice(possible)
                asked += 1

    def tokenise(self, prefix: Prefix, question: Question) -> tuple[list[int], list[int]]:
        """Token ids of a question and of its answer, the end of the turn included."""
        known = self.tokenised.get((question.text, question.answer))
        if known is None:
            asked = build_question(self.tokenizer, prefix, [question.text]).tolist()
            answer = self.tokenizer.encode(question.answer, add_special_tokens=False)
            known = asked, [*answer, self.tokenizer.eos_token_id]
            if len(self.tokenised) < 50_000:
                self.tokenised[question.text, question.answer] = known
        return known


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
