"""Watch a video, ask it questions: `VideoQA.load().watch("match.mp4").ask("Who scores first?")`."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch

from rrvideo import engine
from rrvideo.errors import BudgetError
from rrvideo.evidence import Evidence, Gaze, intervals
from rrvideo.model import Checkpoint, load
from rrvideo.video import SamplePlan, VideoInfo, read_frames

if TYPE_CHECKING:
    from rrattention import RRConfig

__all__ = ["EMBEDDED", "MAX_NEW_TOKENS", "Answer", "AnswerStream", "Chat", "Timings", "Usage", "Video", "VideoQA"]

EMBEDDED = {"tiny": Path(__file__).parent / "tiny" / "checkpoint"}  # models that come with the package
MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: the first three were spent once, when the video was watched, and the last on this answer."""

    decode: float
    encode: float
    prefill: float
    generate: float

    def to_dict(self) -> dict[str, float]:
        """The fields, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the model read, and what it wrote; the prompt's tokens include the visual ones."""

    frames: int
    visual_tokens: int
    prompt_tokens: int
    answer_tokens: int

    def to_dict(self) -> dict[str, int]:
        """The fields, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and the moments of the video that it rests on, the most telling one first.

    `density` is the share of the causally visible blocks that the video's prefill attended to, over layers and heads:
    1.0 with full attention, and for videos so short that attention was dense.
    """

    text: str
    evidence: list[Evidence]
    timings: Timings
    density: float
    usage: Usage

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


class AnswerStream(Iterator[str]):
    """The text of an answer, piece by piece; `answer` is the whole of it, once the last piece is out."""

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self.answer: Answer | None = None
        self._pieces = pieces

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.answer = self.answer or end.value
            raise StopIteration from None

    def close(self) -> None:
        """Stop writing. The video then takes other questions; so it does when the stream is dropped."""
        self._pieces.close()

    def finish(self) -> Answer:
        """Read to the end and return the answer. Raises `RuntimeError` if the stream was closed before."""
        for _ in self:
            pass
        if self.answer is None:
            raise RuntimeError("the stream was closed before the answer was complete")
        return self.answer


class Video:
    """A video that a model has watched, and answers questions about; `VideoQA.watch` makes it.

    It holds the KV cache of all that was seen. `close` frees it, as does the end of a `with` block.
    """

    def __init__(self, plan: SamplePlan, warnings: Sequence[str], watched: engine.Watched) -> None:
        self.plan = plan
        self.warnings = tuple(warnings)  # what was lost, or may surprise
        self._watched = watched

    @property
    def info(self) -> VideoInfo:
        """What the file holds."""
        return self.plan.info

    @overload
    def ask(self, question: str, *, max_new_tokens: int = ...) -> Answer: ...
    @overload
    def ask(self, question: list[str], *, max_new_tokens: int = ...) -> list[Answer]: ...
    def ask(self, question: str | list[str], *, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer | list[Answer]:
        """Answer one question, or each of several on its own: no answer depends on what else was asked.

        Decoding is greedy. Raises `BudgetError` if a question is too long for the model's context.
        """
        if isinstance(question, str):
            return self.stream(question, max_new_tokens=max_new_tokens).finish()
        return [self.stream(each, max_new_tokens=max_new_tokens).finish() for each in question]

    def stream(self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> AnswerStream:
        """Answer a question piece by piece, as the text is written."""
        return AnswerStream(self._answer([_checked(question)], max_new_tokens))

    def chat(self) -> Chat:
        """Begin a conversation, in which questions may refer to earlier ones."""
        return Chat(self)

    def close(self) -> None:
        """Free the memory that the video takes on the model's device; it answers no more questions."""
        self._watched.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def to_dict(self) -> dict[str, Any]:
        """What was watched, as JSON takes it."""
        plan = self.plan
        return {
            "info": plan.info.to_dict(),
            "start": plan.start,
            "end": plan.end,
            "sampling": plan.sampling,
            "fps": plan.fps,
            "width": plan.width,
            "height": plan.height,
            "warnings": list(self.warnings),
        }

    def _answer(self, turns: Sequence[str], max_new_tokens: int) -> Generator[str, None, Answer]:
        watched, start = self._watched, time.perf_counter()
        tokenizer = watched.checkpoint.tokenizer
        ids = watched.checkpoint.question(watched.prefix, turns)
        gaze = Gaze(watched.prefix)
        tokens: list[int] = []
        text = written = ""
        with closing(watched.generate(ids, max_new_tokens=max_new_tokens, observer=gaze)) as generated:
            for token in generated:
                tokens.append(token)
                text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
                if len(text) > len(written) and not text.endswith("\ufffd"):  # of a character whose rest is to come
                    yield text[len(written) :]
                    written = text
        if text != written:
            yield text[len(written) :]
        return Answer(
            text=text,
            evidence=intervals(gaze.weights(), watched.prefix.times, self.plan.end),
            timings=Timings(**watched.seconds, generate=time.perf_counter() - start),
            density=watched.density,
            usage=Usage(
                frames=watched.frames,
                visual_tokens=int(watched.prefix.visual.sum()),
                prompt_tokens=len(watched.prefix) + len(ids),
                answer_tokens=len(tokens),
            ),
        )


class Chat:
    """A conversation about a video: each question comes with all that was said before."""

    def __init__(self, video: Video) -> None:
        self.turns: list[str] = []  # the user's and the model's, by turns
        self._video = video

    def ask(self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
        """Answer a question; see `Video.ask`."""
        return self.stream(question, max_new_tokens=max_new_tokens).finish()

    def stream(self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> AnswerStream:
        """Answer a question piece by piece. Only an answer that is read to its end becomes part of the history."""
        return AnswerStream(self._answer(_checked(question), max_new_tokens))

    def _answer(self, question: str, max_new_tokens: int) -> Generator[str, None, Answer]:
        turns = [*self.turns, question]
        answer = yield from self._video._answer(turns, max_new_tokens)
        self.turns = [*turns, answer.text]
        return answer


class VideoQA:
    """A model that watches videos. `VideoQA.load` makes it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @classmethod
    def load(
        cls,
        model: str | Path = "tiny",
        *,
        attention: Literal["rr", "full"] = "rr",
        config: RRConfig | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        device_map: str | Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a model: a folder in Hugging Face format, a hub id, or "tiny", the one that comes with rrvideo.

        The tiny one shows that a machine works. It knows only coloured shapes that move over coloured backgrounds.
        `config` sets RRAttention; `device="auto"` takes a GPU where there is one; `device_map` spreads a large model
        as accelerate does. Raises `ModelError` if the checkpoint cannot be used.
        """
        source = EMBEDDED.get(str(model), model)
        return cls(load(source, attention=attention, config=config, device=device, dtype=dtype, device_map=device_map))

    def watch(
        self,
        path: str | os.PathLike[str],
        *,
        fps: float = 1.0,
        start: float | None = None,
        end: float | None = None,
        max_frames: int = 768,
        sampling: Literal["uniform", "keyframes"] = "uniform",
        reader: Literal["pyav", "decord"] = "pyav",
        timestamps: bool | None = None,
        progress: engine.Progress | None = None,
    ) -> Video:
        """Watch the video at `path`, or its clip from `start` to `end` seconds.

        `fps`, `max_frames` and `sampling` choose its frames, as `video.plan_samples` does. `timestamps` writes the
        frames' times into the prompt; left out, that is done for models that cannot tell time otherwise. `progress` is
        called with "frames" or "tokens", how many are done, and of how many.
        Raises `VideoError` if nothing of the file can be seen, and `BudgetError` if the frames are too many.
        """
        plan = engine.plan(
            self.checkpoint,
            path,
            fps=fps,
            start=start,
            end=end,
            max_frames=max_frames,
            sampling=sampling,
            timestamps=timestamps,
        )
        stream = read_frames(plan, reader=reader)
        try:
            watched = engine.watch(self.checkpoint, stream, timestamps=timestamps, progress=progress)
        except torch.OutOfMemoryError as error:
            raise BudgetError(
                f"{len(plan.indices)} frames do not fit into the memory of {self.checkpoint.device}",
                "lower the frame rate (fps), or the number of frames (max_frames)",
            ) from error
        return Video(plan, stream.warnings, watched)


def _checked(question: str) -> str:
    if not question.strip():
        raise ValueError("a question must not be empty")
    return question
