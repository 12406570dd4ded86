"""What the embedded model learns from: batches of videos of one geometry with their questions, level by level."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..tokens import PatchSpec, Prefix, build_prefix, build_question
from .world import KINDS, MAX_SCENES, Question, World, draw_world, multiple_choice, parameters, questions

SPEC = PatchSpec()
SIZES = ((56, 56), (84, 84), (56, 112), (84, 112), (84, 56), (112, 84), (56, 84), (112, 56))
STEPS = (1, 2, 4, 6, 10, 16, 28, 48, 90, 150, 300)  # temporal steps of a video
QUESTIONS = 8  # for each video of a batch
OPEN_LENGTH, CHOICE_LENGTH = 64, 112  # tokens of a question with its answer, padded
ANSWER_LENGTH = 12  # tokens of an answer on average, at most; a description is long, the seven others are shorter
IGNORED = -100  # what cross_entropy skips
CHOICE_KINDS = tuple(kind for kind in KINDS if kind not in {"presence", "describe", "each"})
SCORES = (*KINDS, "letter", *(f"choice {kind}" for kind in CHOICE_KINDS), *(f"T={steps}" for steps in STEPS))


@dataclass(frozen=True, slots=True)
class Level:
    """A stage of the curriculum: how many temporal steps, and the running loss and the time that let it in."""

    steps: tuple[int, ...]
    loss: float
    latest: float  # share of the whole training time


LEVELS = (
    Level((1, 2), math.inf, 0.0),
    Level((2, 4, 6), 0.30, 0.03),
    Level((4, 6, 10), 0.20, 0.20),
    Level((6, 10, 16, 28), 0.15, 0.40),
    Level((10, 16, 28, 48), 0.10, 0.55),
    Level((16, 28, 48, 90, 150, 300), 0.06, 0.72),
)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the videos of a batch share: with it, all their tensors have the same sizes and all tokens their places."""

    steps: int
    size: tuple[int, int]  # height, width
    timestamps: bool
    late: bool  # past 10 minutes, where times have a digit more
    choice: bool

    def videos(self, prefix_length: int, tokens: int) -> int:
        """How many videos make a batch of about that many tokens."""
        return max(4, min(256, tokens // (prefix_length + QUESTIONS * self.length)))

    @property
    def length(self) -> int:
        return CHOICE_LENGTH if self.choice else OPEN_LENGTH

    @staticmethod
    def draw(rng: Random, steps: int) -> Geometry:
        """One of five for each number of steps: few, because each costs a CUDA graph."""
        variant = rng.choice((0, 0, 1, 2, 3, 3, 4))
        size = SIZES[(3 * STEPS.index(steps) + variant) % len(SIZES)]
        return Geometry(steps, size, timestamps=variant != 2, late=variant in {1, 4}, choice=variant >= 3)


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

    def __init__(self, tokenizer: Any, level: Any, seed: str, tokens: int, fixed: bool) -> None:
        self.tokenizer, self.level, self.seed, self.tokens = tokenizer, level, seed, tokens
        self.fixed = fixed  # whether questions are padded to the geometry's length, as CUDA graphs need it
        self.tokenised: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def __iter__(self) -> Iterator[tuple[Geometry, Batch]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        rng = Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            top = self.level.value
            level = top if rng.random() < 0.7 else rng.randint(min(1, top), top)
            geometry = Geometry.draw(rng, rng.choice(LEVELS[level].steps))
            yield geometry, self.draw(rng, geometry)

    def draw(self, rng: Random, geometry: Geometry) -> Batch:
        """Draw one batch: first what all its videos share, then each video."""
        choice, longest = geometry.choice, 3540 if geometry.late else 600
        fps = rng.choice([fps for fps in (0.5, 1.0, 1.0, 1.0, 2.0, 4.0) if 2 * geometry.steps / fps <= 600])
        duration = 2 * geometry.steps / fps
        begin = rng.uniform(600, longest - duration) if geometry.late else rng.choice((0, 0, longest - duration))
        begin = begin if geometry.late else rng.random() * begin
        prefix, moments = example(self.tokenizer, geometry, begin, duration)
        kinds = tuple(kind for kind in (CHOICE_KINDS if choice else KINDS) if geometry.timestamps or kind != "when")
        if not self.fixed and rng.random() < 0.6:  # without the long answers, to which the others would be padded
            kinds = tuple(kind for kind in kinds if kind in CHOICE_KINDS or kind == "presence")

        videos = geometry.videos(len(prefix), self.tokens)
        frames, rows, scores = [], [], []
        for _ in range(videos):
            most = min(MAX_SCENES, max(1, geometry.steps // 2))
            shortest = min(duration, 4 / fps)
            world = draw_world(rng, duration, rng.randint(1, most), shortest=shortest, begin=begin)
            frames.append(torch.from_numpy(parameters(world, moments)))
            for question in self.ask(rng, world, moments, kinds):
                kind = f"choice {question.kind}" if choice else question.kind
                if choice:
                    question = multiple_choice(question, world, rng, moments)  # noqa: PLW2901
                    if rng.random() < 0.25:
                        question, kind = letters(question, rng), "letter"  # noqa: PLW2901
                rows.append(self.tokenise(prefix, question))
                scores.append(SCORES.index(kind))

        length = geometry.length if self.fixed else max(len(asked) + len(answer) for asked, answer in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        before: list[int] = []
        for row, (asked, answer) in enumerate(rows):
            ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
            before += range(row * length + len(asked) - 1, row * length + len(asked) + len(answer) - 1)
        if self.fixed:
            before = before[: len(rows) * ANSWER_LENGTH]  # a batch of nothing but long answers does without its last
        padding = max(0, len(rows) * ANSWER_LENGTH - len(before))
        where = torch.tensor(before + [0] * padding)
        answers = ids.view(-1)[where + 1]
        answers[len(before) :] = IGNORED
        style = torch.tensor([rng.uniform(0.8, 2.5), rng.uniform(0.8, 1.25), rng.uniform(0, 6), rng.randint(0, 1)])
        return Batch(
            frames=torch.stack(frames),
            style=style,
            prefix_ids=prefix.input_ids,
            ids=ids.view(videos, QUESTIONS, length),
            kinds=torch.tensor(scores),
            before=where,
            answers=answers,
        )

    @staticmethod
    def ask(rng: Random, world: World, moments: list[float], kinds: tuple[str, ...]) -> Iterator[Question]:
        """Questions about one video: its description, which tells most, and then each kind as likely as another."""
        others = [kind for kind in kinds if kind != "describe"]
        wanted = ["describe"] if "describe" in kinds else []
        asked = 0
        while asked < QUESTIONS:
            kind = wanted.pop() if wanted else rng.choice(others)
            if possible := questions(world, rng, moments, [kind]):
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


def letters(question: Question, rng: Random) -> Question:
    """Ask for the letters of a question's four options: a skill of its own, learned sooner without the video."""
    named = [tuple(reversed(option.split(". ", 1))) for option in question.options]
    rng.shuffle(named)
    text = f"Give the letter of each: {', '.join(name for name, _ in named)}.\n" + "\n".join(question.options)
    return Question(question.kind, text, ", ".join(f"{name} {letter}" for name, letter in named))


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
