"""Watch a video once and answer from what was seen: one prefill, whose KV cache each answer extends and rolls back.

`watch` decodes, encodes and prefills frames as they stream in, a chunk at a time and each in its own thread.
`Watched.generate` appends a question to what was watched and decodes its answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count, islice, pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from rrvideo.budget import CHUNKS_AHEAD, ROOM, chunk_frames, chunk_tokens, extent
from rrvideo.errors import BudgetError, ModelError
from rrvideo.model import Checkpoint
from rrvideo.stages import Cancel, Stages
from rrvideo.tokens import Prefix, patchify
from rrvideo.video import Frame, FrameStream, SamplePlan

if TYPE_CHECKING:
    from rrattention.transformers import Observer
    from rrvideo.cache import PrefixCache

__all__ = ["Cancel", "Progress", "Watched", "new_cache", "watch"]

# "decoded" or "frames" (which are encoded) or "tokens" (prefilled); how many are done, and of how many; and the seconds
# that this stage has been at work.
Progress = Callable[[str, int, int, float], None]

UNITS = {"decode": "decoded", "encode": "frames", "prefill": "tokens"}  # what each stage tells of
PATIENCE = 60.0  # seconds without a frame, after which a reader is thought to hang


@dataclass(slots=True, eq=False, repr=False)
class Watched:
    """A video as the model has seen it: the tokens of its prefix, their KV cache, and what they have cost.

    Questions are answered one at a time: each lengthens the cache, which is rolled back after it.
    """

    checkpoint: Checkpoint
    prefix: Prefix
    frames: int
    density: float  # kept blocks over visible ones, in the prefill
    seconds: dict[str, float]  # that decode, encode and prefill were at work; they overlap
    cache: PrefixCache | None
    _busy: threading.Lock = field(default_factory=threading.Lock)

    def generate(
        self,
        ids: torch.Tensor,
        *,
        max_new_tokens: int,
        observer: AbstractContextManager[Observer] | None = None,
        cancel: Cancel | None = None,
    ) -> Generator[int]:
        """Yield the answer to the question `ids` `[tokens]`, token by token, as greedy decoding finds it.

        What `observer` gives is one for `rrattention.transformers.observe`; it ends before the answer is rolled back.
        Raises `BudgetError` if question and answer do not fit, `Cancelled` where `cancel` says so, and `RuntimeError`
        while another answer is unfinished, or if the video is closed.
        """
        from rrattention.transformers import observe

        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
        with self._turn(len(ids), max_new_tokens) as turn, observer or nullcontext() as observing:
            for _ in range(max_new_tokens):
                if cancel:
                    cancel.check()
                # Only around the model's own pass: what the caller runs between two tokens is not ours to observe.
                with observe(observing) if observing else nullcontext():
                    logits = turn.forward(ids)
                token = int(logits[-1].argmax())
                if token in self.checkpoint.stop_ids:
                    return
                yield token
                ids = torch.tensor([token])

    def score(
        self, ids: torch.Tensor, continuations: Sequence[Sequence[int]], *, cancel: Cancel | None = None
    ) -> list[float]:
        """How likely each of `continuations` is as the beginning of the answer to the question `ids` `[tokens]`.

        Returns natural logarithms of probabilities. Raises what `generate` raises, and `ValueError` if one is empty.
        """
        if not all(continuations):
            raise ValueError("a continuation must not be empty")
        scores = []
        with self._turn(len(ids), max(map(len, continuations), default=0)) as turn:
            first = turn.forward(ids)
            for tokens in continuations:
                if cancel:
                    cancel.check()
                logits = first
                if len(tokens) > 1:
                    logits = torch.cat([first, turn.forward(torch.tensor(tokens[:-1]), last_only=False)])
                    turn.cache.roll_back(len(self.prefix) + len(ids))
                chosen = torch.tensor(tokens, device=logits.device)[:, None]
                scores.append(float(logits.float().log_softmax(-1).gather(1, chosen).sum()))
        return scores

    @property
    def layers(self) -> int:
        """Of the language model."""
        return int(self.checkpoint.model.config.get_text_config().num_hidden_layers)

    def close(self) -> None:
        """Free the KV cache."""
        self.cache = None

    @contextmanager
    def _turn(self, asked: int, answered: int) -> Iterator[_Turn]:
        """One question of `asked` tokens with an answer of up to `answered`; no trace is left of it."""
        if (cache := self.cache) is None:
            raise RuntimeError("the video is closed")
        room = self.checkpoint.context_length - extent(self.prefix)
        if asked + answered > room:
            raise BudgetError(
                f"a question of {asked} tokens and an answer of up to {answered} do not fit: {room} are left",
                "ask for a shorter answer, or watch fewer frames",
            )
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("another answer about this video is unfinished: read it to its end, or close it")
        try:
            yield _Turn(self.checkpoint, cache, len(self.prefix), self.prefix.next_positions(asked + answered))
        finally:
            cache.roll_back(len(self.prefix))
            self._busy.release()


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a question and its answer are to a model that has seen `seen` tokens: more tokens, at `positions`."""

    checkpoint: Checkpoint
    cache: PrefixCache
    seen: int
    positions: torch.Tensor  # [3, tokens]

    def forward(self, ids: torch.Tensor, *, last_only: bool = True) -> torch.Tensor:
        """Append `ids` `[tokens]`; returns the logits of what follows each, or the last, `[tokens, vocabulary]`.

        Raises `ModelError` where these are no numbers, which would else look like an answer.
        """
        from rrattention.transformers import exact

        start = self.cache.get_seq_length() - self.seen
        positions = self.positions[:, None, start : start + len(ids)]
        with exact():  # a question may be longer than a block, but a sparse pass is for the video
            embedded = self.checkpoint.embed(ids)[None]
            (logits,) = self.checkpoint.forward(embedded, positions, self.cache, last_only=last_only)
        if logits.isnan().any():
            kind = str(self.checkpoint.dtype).removeprefix("torch.")
            raise ModelError(f"{self.checkpoint.name} gives no numbers in {kind}", "load it with another dtype")
        return logits


def new_cache(checkpoint: Checkpoint, tokens: int, cache: Literal["device", "offload"] = "device") -> PrefixCache:
    """An empty KV cache with room for `tokens` and a question, on the model's devices or in the CPU's memory."""
    from rrvideo.cache import PrefixCache

    if cache not in {"device", "offload"}:
        raise ValueError(f"cache must be 'device' or 'offload', got {cache!r}")
    layers = checkpoint.model.config.get_text_config().num_hidden_layers
    return PrefixCache(layers, capacity=tokens + ROOM, offload=cache == "offload")


def watch(
    checkpoint: Checkpoint,
    stream: FrameStream,
    *,
    timestamps: bool | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
    cache: Literal["device", "offload"] = "device",
) -> Watched:
    """Prefill what `stream` shows, with the times of the frames that really come.

    A reader, an encoder and the caller's thread work ahead of each other by few chunks, so that the pixels of few
    exist at a time. `cache="offload"` keeps keys and values in the CPU's memory. `progress` is called from any of the
    three, one at a time, and not when the watch is over.
    Raises `VideoError` if no frame can be decoded or none comes for a minute, `Cancelled` where `cancel` says so, and
    what goes wrong in any of the threads.
    """
    from rrattention.transformers import record

    cancel = cancel or Cancel()
    plan, stopwatch, step = stream.plan, _Stopwatch(progress), checkpoint.spec.temporal_patch_size
    size, ahead = (plan.height, plan.width), CHUNKS_AHEAD * chunk_frames(plan, step)
    patience = max(PATIENCE, _longest_way(plan))  # a reader may take as long as what it has to decode plays
    planned = checkpoint.prefix(plan.times, size, timestamps=timestamps)
    kept = new_cache(checkpoint, len(planned), cache)
    prefill = _Prefill(checkpoint, kept, len(planned), cancel, stopwatch)
    times: list[float] = []
    as_planned = True
    with Stages(cancel) as stages, record() as recorded:
        frames = stages.ahead(_decoded(stream, stopwatch, stages), room=ahead, patience=patience)
        for shown, features in stages.ahead(_encoded(checkpoint, frames, plan, stopwatch), room=1):
            times += shown
            as_planned = as_planned and tuple(times) == plan.times[: len(times)] and len(times) % step == 0
            prefix = planned if as_planned else checkpoint.prefix(times, size, timestamps=timestamps)
            prefill.extend(prefix, features)
        prefix = planned if tuple(times) == plan.times else checkpoint.prefix(times, size, timestamps=timestamps)
        prefill.finish(prefix)
    return Watched(checkpoint, prefix, len(times), recorded.density(), stopwatch.seconds, kept)


def _longest_way(plan: SamplePlan) -> float:
    """Seconds of video that a reader has to decode, at most, to get to the next frame, or to the first one."""
    keyframes = plan.index.keyframes
    before = keyframes[keyframes <= plan.indices[0]][-2:]  # the last may begin an open group, which needs another one
    begin = plan.index.times[before[0]] if len(before) else 0.0
    return float(max(after - before for before, after in pairwise((begin, *plan.times))))


class _Prefill:
    """The language model's pass over the prefix, in chunks that select the blocks that one pass over it all would.

    So their borders fall on multiples of the block size; the planned number of tokens decides whether attention is
    sparse, also where frames turn out to be missing; and at least a block is held back until it is known to be the end.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: PrefixCache,
        planned: int,
        cancel: Cancel,
        stopwatch: _Stopwatch,
    ) -> None:
        from rrattention.transformers import settings

        self.checkpoint, self.cache, self.planned = checkpoint, cache, planned
        self.cancel, self.stopwatch = cancel, stopwatch
        self.block = settings(checkpoint.model)[0].block_size
        self.chunk = max(chunk_tokens(checkpoint.device) // self.block, 1) * self.block
        self.features: list[torch.Tensor] = []  # of the visual tokens that are not prefilled yet
        self.encoded = 0  # visual tokens

    def extend(self, prefix: Prefix, features: torch.Tensor) -> None:
        """Take the `features` of the next steps of `prefix`; prefill the chunks that are full.

        Only what stands before the end of these steps has to be right: more of the prefix may become another.
        """
        self.features.append(features)
        self.encoded += len(features)
        # NumPy, and below only part of the prefix: over so many tokens torch would call up all its threads, and while
        # those wait for more work they take the cores from the decoder's.
        settled = int(np.flatnonzero(prefix.step.numpy() >= 0)[self.encoded - 1]) + 1
        while settled - self.cache.get_seq_length() >= self.chunk + self.block:
            self._run(prefix, self.chunk, last=False)

    def finish(self, prefix: Prefix) -> None:
        """Prefill the rest."""
        self._run(prefix, len(prefix) - self.cache.get_seq_length(), last=True)

    def _run(self, prefix: Prefix, count: int, *, last: bool) -> None:
        from rrattention.transformers import chunk

        self.cancel.check()
        start = self.cache.get_seq_length()
        part = slice(start, start + count)
        visual = prefix.step[part] >= 0
        taken, rest = torch.cat(self.features).tensor_split([int(visual.sum())])
        self.features = [rest]
        with (
            self.stopwatch("prefill", self.checkpoint.device),
            chunk(total_tokens=self.planned, last=last),
        ):
            embeddings = self.checkpoint.embed(prefix.input_ids[part], visual, taken)
            self.checkpoint.forward(embeddings[None], prefix.positions[:, None, part], self.cache)
        self.stopwatch.tell("prefill", part.stop, len(prefix) if last else self.planned)


def _decoded(stream: FrameStream, stopwatch: _Stopwatch, stages: Stages) -> Generator[Frame]:
    frames = iter(stream)
    for done in count(1):
        with stopwatch("decode"):
            frame = next(frames, None)
        if frame is None:
            return
        stages.check()  # a reader that was left to itself may come back when nobody listens any more
        stopwatch.tell("decode", done, len(stream.plan.indices))
        yield frame


def _encoded(
    checkpoint: Checkpoint, frames: Iterator[Frame], plan: SamplePlan, stopwatch: _Stopwatch
) -> Generator[tuple[list[float], torch.Tensor]]:
    """Times and features of a chunk of frames at a time: whole temporal steps, except where the video ends in one."""
    size, done = chunk_frames(plan, checkpoint.spec.temporal_patch_size), 0
    while chunk := list(islice(frames, size)):
        with stopwatch("encode", checkpoint.device):
            features = _encode(checkpoint, chunk)
        done += len(chunk)
        stopwatch.tell("encode", done, len(plan.indices))
        yield [frame.time for frame in chunk], features


def _encode(checkpoint: Checkpoint, frames: list[Frame]) -> torch.Tensor:
    """Vision features `[visual tokens, hidden]` of whole temporal steps, which the tower sees one by one.

    They pass as one video, however the prompt parts them: one row of the grid costs less to prepare than many.
    """
    pixels = np.stack([frame.image for frame in frames])
    grid = torch.tensor([checkpoint.spec.grid(*pixels.shape[:3])])
    return checkpoint.encode(patchify(torch.from_numpy(pixels).to(checkpoint.device), checkpoint.spec), grid)


class _Stopwatch:
    """Adds up the seconds that each stage is at work, with what the device does for it, and tells how far it is.

    Stages share an accelerator, so there they take turns: to wait for it is not to be at work.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._accelerator = threading.Lock()
        self._progress = progress
        self._telling = threading.Lock()

    @contextmanager
    def __call__(self, stage: str, device: torch.device | None = None) -> Iterator[None]:
        shared = device is not None and device.type != "cpu"
        with self._accelerator if shared else nullcontext():
            start = time.perf_counter()
            yield
            if shared:
                torch.accelerator.synchronize(device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def tell(self, stage: str, done: int, total: int) -> None:
        """Call `progress`, for one stage at a time."""
        if self._progress:
            with self._telling:
                self._progress(UNITS[stage], done, total, self.seconds[stage])
