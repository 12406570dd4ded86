"""Watch a video once and answer from what was seen: one prefill, whose KV cache each answer extends and rolls back.

`plan` chooses frames that the model has room for, `watch` decodes, encodes and prefills them, and `Watched.generate`
appends a question and decodes its answer.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rrvideo.errors import BudgetError
from rrvideo.model import Checkpoint
from rrvideo.tokens import Prefix, patchify
from rrvideo.video import Frame, FrameStream, SamplePlan, plan_samples

if TYPE_CHECKING:
    from transformers import Cache

    from rrattention.transformers import Observer

__all__ = ["ROOM", "Progress", "Watched", "plan", "watch"]

Progress = Callable[[str, int, int], None]  # "frames" or "tokens", how many are done, and of how many

ROOM = 512  # positions that a video leaves free for a question and its answer
# How many frames are held as pixels at a time: few, so that progress is seen, and fewer where they are large.
CHUNK_FRAMES = 32
CHUNK_PIXELS = 2**22


@dataclass(slots=True, eq=False, repr=False)
class Watched:
    """A video as the model has seen it: the tokens of its prefix, their KV cache, and what they have cost.

    Questions are answered one at a time: each lengthens the cache, which is rolled back after it.
    """

    checkpoint: Checkpoint
    prefix: Prefix
    frames: int
    density: float  # kept blocks over visible ones, in the prefill
    seconds: dict[str, float]  # of decode, encode and prefill
    cache: Cache | None
    _busy: threading.Lock = field(default_factory=threading.Lock)

    def generate(self, ids: torch.Tensor, *, max_new_tokens: int, observer: Observer | None = None) -> Generator[int]:
        """Yield the answer to the question `ids` `[tokens]`, token by token, as greedy decoding finds it.

        `observer` is that of `rrattention.transformers.observe`. Raises `BudgetError` if question and answer do not
        fit, and `RuntimeError` while another answer is unfinished, or if the video is closed.
        """
        from rrattention.transformers import observe

        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
        checkpoint, cache, length = self.checkpoint, self.cache, len(self.prefix)
        if cache is None:
            raise RuntimeError("the video is closed")
        room = checkpoint.context_length - _extent(self.prefix)
        if len(ids) + max_new_tokens > room:
            raise BudgetError(
                f"a question of {len(ids)} tokens and an answer of up to {max_new_tokens} do not fit: {room} are left",
                "ask for a shorter answer, or watch fewer frames",
            )
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("another answer about this video is unfinished: read it to its end, or close it")
        positions = self.prefix.next_positions(len(ids) + max_new_tokens)[:, None]
        start = 0
        try:
            for _ in range(max_new_tokens):
                stop = start + len(ids)
                # Only around the model's own pass: what the caller runs between two tokens is not ours to observe.
                with observe(observer) if observer else nullcontext():
                    logits = checkpoint.forward(checkpoint.embed(ids)[None], positions[..., start:stop], cache)
                token = int(logits[0, -1].argmax())
                if token in checkpoint.stop_ids:
                    return
                yield token
                start, ids = stop, torch.tensor([token])
        finally:
            for layer in cache.layers:  # each by what it has: a pass that was interrupted has lengthened some of them
                layer.crop(length - layer.get_seq_length())
            self._busy.release()

    def close(self) -> None:
        """Free the KV cache."""
        self.cache = None


def plan(
    checkpoint: Checkpoint, path: str | os.PathLike[str], *, max_frames: int, timestamps: bool | None, **sampling: Any
) -> SamplePlan:
    """Choose frames as `video.plan_samples` does, within what the model takes.

    Raises `BudgetError`, before anything is decoded, if the frames do not fit its context; it says how many do.
    """

    def attempt(max_frames: int) -> tuple[SamplePlan, int]:
        chosen = plan_samples(path, max_frames=max_frames, limits=checkpoint.limits, **sampling)
        return chosen, _extent(checkpoint.prefix(chosen.times, (chosen.height, chosen.width), timestamps=timestamps))

    room = checkpoint.context_length - ROOM
    chosen, extent = attempt(max_frames)
    fit, needed = len(chosen.indices), extent
    while needed > room and fit > 1:  # fewer frames may be larger ones, so each guess has to be tried
        smaller, needed = attempt(max(1, fit * room // needed))
        fit = len(smaller.indices)
    if needed > room:
        raise BudgetError(f"no frame of this video fits the model's context of {checkpoint.context_length} positions")
    if fit < len(chosen.indices):
        raise BudgetError(
            f"{len(chosen.indices)} frames need {extent} positions, and the model's context has {room} for a video",
            f"{fit} frames fit: max_frames={fit} in Python, --max-frames {fit} on the command line",
        )
    return chosen


def watch(
    checkpoint: Checkpoint, stream: FrameStream, *, timestamps: bool | None = None, progress: Progress | None = None
) -> Watched:
    """Prefill what `stream` shows, with the times of the frames that really come.

    Frames are encoded a few at a time, as they are decoded. Raises `VideoError` if none can be.
    """
    from rrattention.transformers import record

    report = progress or (lambda stage, done, total: None)
    stopwatch = _Stopwatch(checkpoint.device)
    size = (stream.plan.height, stream.plan.width)
    times: list[float] = []
    features: list[torch.Tensor] = []
    for frames in _chunks(stream, checkpoint.spec.temporal_patch_size, stopwatch):
        with stopwatch("encode"):
            features.append(_encode(checkpoint, frames))
        times += [frame.time for frame in frames]
        report("frames", len(times), len(stream.plan.indices))

    prefix = checkpoint.prefix(times, size, timestamps=timestamps)
    report("tokens", 0, len(prefix))
    with stopwatch("prefill"), record() as prefill:
        embeddings = checkpoint.embed(prefix.input_ids)
        embeddings[prefix.visual] = torch.cat(features)
        cache = checkpoint.new_cache()
        checkpoint.forward(embeddings[None], prefix.positions[:, None], cache)
    report("tokens", len(prefix), len(prefix))
    return Watched(checkpoint, prefix, len(times), prefill.density(), stopwatch.seconds, cache)


def _chunks(stream: FrameStream, step: int, stopwatch: _Stopwatch) -> Iterator[list[Frame]]:
    """The frames a few at a time: whole temporal steps, except where the video ends within one."""
    plan = stream.plan
    count = min(CHUNK_FRAMES, CHUNK_PIXELS // (plan.height * plan.width)) // step * step or step
    frames = iter(stream)
    while True:
        with stopwatch("decode"):
            chunk = list(islice(frames, count))
        if not chunk:
            return
        yield chunk


def _encode(checkpoint: Checkpoint, frames: list[Frame]) -> torch.Tensor:
    """Vision features `[visual tokens, hidden]` of whole temporal steps, which the tower sees one by one.

    They pass as one video, however the prompt parts them: one row of the grid costs less to prepare than many.
    """
    pixels = np.stack([frame.image for frame in frames])
    grid = torch.tensor([checkpoint.spec.grid(*pixels.shape[:3])])
    return checkpoint.encode(patchify(torch.from_numpy(pixels).to(checkpoint.device), checkpoint.spec), grid)


def _extent(prefix: Prefix) -> int:
    """How many positions a prefix takes: what a context is long in.

    They are fewer than its tokens, because those of one frame share some: so Qwen2-VL takes more tokens of video than
    its `max_position_embeddings` (Qwen2-VL, sections 2.1 and 3.3).
    """
    return int(prefix.positions.max()) + 1


class _Stopwatch:
    """Adds up the seconds of each stage, with what the device does for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
