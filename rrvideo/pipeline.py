"""Watch a video, ask it questions: `VideoQA.load().watch("match.mp4").ask("Who scores first?")`."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch

from rrvideo import budget, engine, store
from rrvideo.errors import BudgetError
from rrvideo.evidence import Evidence, Gaze, intervals
from rrvideo.model import Checkpoint, load
from rrvideo.video import SamplePlan, VideoInfo, read_frames

if TYPE_CHECKING:
    from rrattention import RRConfig
    from rrvideo.scan import Kind, Scan

__all__ = ["EMBEDDED", "MAX_NEW_TOKENS", "Answer", "AnswerStream", "Chat", "Timings", "Usage", "Video", "VideoQA"]

EMBEDDED = {"tiny": Path(__file__).parent / "tiny" / "checkpoint"}  # models that come with the package
MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: the first three ran side by side, once, when the video was watched; the last went into this answer."""

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
    1.0 with full attention, and for videos so short that attention was dense. `attention` is what the evidence was
    found in: when each temporal step of the video begins, in seconds, and its share of the attention that stands out.
    """

    text: str
    evidence: list[Evidence]
    timings: Timings
    density: float
    usage: Usage
    attention: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them, but for `attention`: it has a row for each step."""
        fields = asdict(self)
        del fields["attention"]
        return fields


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

    It holds the KV cache of all that was seen. `close` frees it, as does the end of a `with` block. It answers one
    question at a time; other videos of the same model may be asked meanwhile, in other threads.
    """

    def __init__(
        self, plan: SamplePlan, warnings: Sequence[str], file: store.FileMark, watched: engine.Watched
    ) -> None:
        self.plan = plan
        self.warnings = tuple(warnings)  # what was lost, or may surprise
        self._file = file
        self._watched = watched

    @property
    def info(self) -> VideoInfo:
        """What the file holds."""
        return self.plan.info

    @property
    def seconds(self) -> dict[str, float]:
        """How long decode, encode and prefill were at work while the video was watched; they ran side by side."""
        return dict(self._watched.seconds)

    @property
    def density(self) -> float:
        """That of the prefill; see `Answer`."""
        return self._watched.density

    @overload
    def ask(self, question: str, *, max_new_tokens: int = ..., cancel: engine.Cancel | None = ...) -> Answer: ...
    @overload
    def ask(
        self, question: list[str], *, max_new_tokens: int = ..., cancel: engine.Cancel | None = ...
    ) -> list[Answer]: ...
    def ask(
        self,
        question: str | list[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        cancel: engine.Cancel | None = None,
    ) -> Answer | list[Answer]:
        """Answer one question, or each of several on its own: no answer depends on what else was asked.

        Decoding is greedy. `cancel` stops it from another thread. Raises `BudgetError` if a question is too long for
        the model's context, and `Cancelled`.
        """
        if isinstance(question, str):
            return self.stream(question, max_new_tokens=max_new_tokens, cancel=cancel).finish()
        return [self.stream(each, max_new_tokens=max_new_tokens, cancel=cancel).finish() for each in question]

    def stream(
        self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS, cancel: engine.Cancel | None = None
    ) -> AnswerStream:
        """Answer a question piece by piece, as the text is written; see `ask`."""
        return AnswerStream(self._answer([_checked(question)], max_new_tokens, cancel))

    def score(self, question: str, replies: Sequence[str], *, cancel: engine.Cancel | None = None) -> list[float]:
        """How likely the answer to a question begins with each of `replies`: natural logarithms of probabilities.

        A special token in a reply, such as the one that ends answers, counts as that token.
        """
        watched = self._watched
        encode = watched.checkpoint.tokenizer.encode
        ids = watched.checkpoint.question(watched.prefix, [_checked(question)])
        return watched.score(ids, [encode(reply, add_special_tokens=False) for reply in replies], cancel=cancel)

    def chat(self) -> Chat:
        """Begin a conversation, in which questions may refer to earlier ones."""
        return Chat(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was seen to the file `path`, for `VideoQA.open`: its size is that of the KV cache.

        Raises `RRVideoError` if it cannot be written.
        """
        store.save(path, store.Saved(self.plan, self.warnings, self._file, self._watched))

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

    def _answer(
        self, turns: Sequence[str], max_new_tokens: int, cancel: engine.Cancel | None
    ) -> Generator[str, None, Answer]:
        watched, start = self._watched, time.perf_counter()
        tokenizer = watched.checkpoint.tokenizer
        ids = watched.checkpoint.question(watched.prefix, turns)
        # Without what was said before.
        asked = watched.checkpoint.question(watched.prefix, turns[-1:]) if turns[1:] else ids
        gaze = Gaze(watched.prefix, asked=len(asked), layers=watched.layers)
        tokens: list[int] = []
        text = written = ""
        generated = watched.generate(ids, max_new_tokens=max_new_tokens, observer=gaze, cancel=cancel)
        with closing(generated):
            for token in generated:
                tokens.append(token)
                text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
                if len(text) > len(written) and not text.endswith("\ufffd"):  # of a character whose rest is to come
                    yield text[len(written) :]
                    written = text
        if text != written:
            yield text[len(written) :]
        weights, times = gaze.weights(), watched.prefix.times
        return Answer(
            text=text,
            evidence=intervals(weights, times, self.plan.end),
            timings=Timings(**watched.seconds, generate=time.perf_counter() - start),
            density=watched.density,
            usage=Usage(
                frames=watched.frames,
                visual_tokens=int(watched.prefix.visual.sum()),
                prompt_tokens=len(watched.prefix) + len(ids),
                answer_tokens=len(tokens),
            ),
            attention=tuple(zip(times, weights, strict=True)),
        )


class Chat:
    """A conversation about a video: each question comes with all that was said before."""

    def __init__(self, video: Video) -> None:
        self.turns: list[str] = []  # the user's and the model's, by turns
        self._video = video

    def ask(
        self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS, cancel: engine.Cancel | None = None
    ) -> Answer:
        """Answer a question; see `Video.ask`."""
        return self.stream(question, max_new_tokens=max_new_tokens, cancel=cancel).finish()

    def stream(
        self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS, cancel: engine.Cancel | None = None
    ) -> AnswerStream:
        """Answer a question piece by piece. Only an answer that is read to its end becomes part of the history."""
        return AnswerStream(self._answer(_checked(question), max_new_tokens, cancel))

    def _answer(self, question: str, max_new_tokens: int, cancel: engine.Cancel | None) -> Generator[str, None, Answer]:
        turns = [*self.turns, question]
        answer = yield from self._video._answer(turns, max_new_tokens, cancel)
        self.turns = [*turns, answer.text]
        return answer


class VideoQA:
    """A model that watches videos. `VideoQA.load` makes it.

    Several videos may be open at once, and several threads may watch and ask different ones at the same time. Each
    watch takes the memory of its own chunks.
    """

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

    def attending(self, attention: Literal["rr", "full"], config: RRConfig | None = None) -> VideoQA:
        """The same model with other settings of attention, as in `load`: it shares the weights, and so costs nothing.

        Both may be used side by side. What one has watched is not the other's.
        """
        return VideoQA(self.checkpoint.attending(attention, config))

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
        fit: bool = False,
        cache: Literal["device", "offload"] = "device",
        cancel: engine.Cancel | None = None,
    ) -> Video:
        """Watch the video at `path`, or its clip from `start` to `end` seconds.

        `fps`, `max_frames` and `sampling` choose its frames, as `video.plan_samples` does; with `fit` they are thinned
        to what the model takes. `timestamps` writes the frames' times into the prompt; left out, that is done for
        models that cannot tell time otherwise. `progress` is called with "decoded", "frames" (which are encoded) or
        "tokens" (prefilled), how many are done, of how many, and the seconds that this stage has been at work: from
        several threads, but one at a time. `cache="offload"` keeps the KV cache in the CPU's memory. `cancel` stops
        from another thread.
        Raises `VideoError` if nothing of the file can be seen, `BudgetError` if the frames are too many, and
        `Cancelled`.
        """
        plan = budget.plan(
            self.checkpoint,
            path,
            fps=fps,
            start=start,
            end=end,
            max_frames=max_frames,
            sampling=sampling,
            timestamps=timestamps,
            fit=fit,
        )
        file = store.FileMark.of(path)
        stream = read_frames(plan, reader=reader)
        try:
            watched = engine.watch(
                self.checkpoint, stream, timestamps=timestamps, progress=progress, cache=cache, cancel=cancel
            )
        except torch.OutOfMemoryError as error:
            raise BudgetError(
                f"{len(plan.indices)} frames do not fit into the memory of {self.checkpoint.device}",
                "lower the frame rate (fps), or the number of frames (max_frames)",
            ) from error
        return Video(plan, stream.warnings, file, watched)

    def open(self, path: str | os.PathLike[str], *, cache: Literal["device", "offload"] = "device") -> Video:
        """Bring back a video that `Video.save` wrote to the file `path`: its answers are those of the video saved.

        The video file itself need not be there any more. Raises `VideoError` if it is there and has changed, or if the
        saved file is not whole, and `ModelError` if it was watched by another model, or in another type of weights or
        attention.
        """
        saved = store.read(path, self.checkpoint, cache=cache)
        return Video(saved.plan, saved.warnings, saved.file, saved.watched)

    def scan(
        self,
        path: str | os.PathLike[str],
        questions: Mapping[str, str] | Sequence[str],
        *,
        every: float = 60.0,
        window: float = 60.0,
        schema: Mapping[str, Kind] | None = None,
        start: float | None = None,
        end: float | None = None,
        **watch: Any,
    ) -> Scan:
        """Ask each window of a long video the same questions, and get typed answers; see `rrvideo.scan.scan`."""
        from rrvideo.scan import scan

        return scan(self, path, questions, every=every, window=window, schema=schema, start=start, end=end, **watch)


def _checked(question: str) -> str:
    if not question.strip():
        raise ValueError("a question must not be empty")
    return question
