"""What a video will take, known before any of it is decoded: frames, tokens, positions and bytes.

`plan` chooses frames that the model has room for; `estimate` says what a plan needs, and how much of it would fit.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch

from rrvideo.errors import BudgetError
from rrvideo.model import Checkpoint
from rrvideo.tokens import Prefix
from rrvideo.video import SamplePlan, plan_samples

__all__ = [
    "CHUNKS_AHEAD",
    "CHUNK_FRAMES",
    "CHUNK_PIXELS",
    "CHUNK_TOKENS",
    "CHUNK_TOKENS_CUDA",
    "ROOM",
    "Budget",
    "chunk_frames",
    "chunk_tokens",
    "estimate",
    "extent",
    "plan",
]

ROOM = 512  # positions that a video leaves free for a question and its answer
# How many frames are held as pixels at a time: few, so that progress is seen, and fewer where they are large.
CHUNK_FRAMES = 32
CHUNK_PIXELS = 2**22
# How many tokens are prefilled at a time: multiples of the block size. An H100 does with 2,048 faster than the host can
# tell it what to do: a 2B model then prefilled 32K tokens in 1.16 s, and with 8,192 in 0.35 s (benchmarks/watch.py).
CHUNK_TOKENS = 2048
CHUNK_TOKENS_CUDA = 8192
CHUNKS_AT_ONCE = 3  # one that is decoded, one that is encoded and one that is prefilled
CHUNKS_AHEAD = 3  # of decoded frames, for the encoder: so many come while an accelerator prefills a chunk of tokens


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan needs, and what of it fits; bytes are those of the model's own type and device.

    The frames of `wanted_frames` (at the plan's rate) that are not among `frames` are cut by `max_frames`, and those
    that are not among `largest_frames` by the context.
    """

    wanted_frames: int
    frames: int
    width: int  # pixels, of each frame as the model gets it
    height: int
    visual_tokens: int
    prompt_tokens: int  # the visual ones and the text before and between them
    positions: int
    context: int
    room: int  # positions of the context that a video leaves free for a question and its answer
    fits: bool
    largest_frames: int  # how many fit: `frames` if they do, 0 if not even one
    weight_bytes: int
    kv_bytes: int  # with room for a question and its answer
    activation_bytes: int  # at most; see `activation_bytes`

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


def plan(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    max_frames: int,
    timestamps: bool | None,
    fit: bool = False,
    **sampling: Any,
) -> SamplePlan:
    """Choose frames as `video.plan_samples` does, within what the model takes.

    Raises `BudgetError`, before anything is decoded, if the frames do not fit its context; it says how many do. With
    `fit` the largest number that fits is taken instead, spread over the same time.
    """
    limits = checkpoint.limits
    if fit:  # the pixels of all frames have a limit too
        max_frames = min(max_frames, limits.total_pixels // limits.factor**2 * limits.temporal_factor)
    chosen = plan_samples(path, max_frames=max_frames, limits=limits, **sampling)
    needed = extent(_prefix(checkpoint, chosen, timestamps))
    room = checkpoint.context_length - ROOM
    if needed <= room:
        return chosen
    smaller = _largest(checkpoint, chosen, timestamps)
    if smaller is None:
        raise BudgetError(
            f"no frame of this video fits the model's context of {checkpoint.context_length} positions",
            "load a model with a longer context",
        )
    if fit:
        return smaller
    count = len(smaller.indices)
    raise BudgetError(
        f"{len(chosen.indices)} frames need {needed} positions, and the model's context has {room} for a video",
        f"{count} frames fit: max_frames={count} or fit=True in Python, --max-frames {count} or --fit in the shell",
    )


def estimate(checkpoint: Checkpoint, plan: SamplePlan, *, timestamps: bool | None = None) -> Budget:
    """Say what `plan` needs, whether the model has room for it, and how many frames it has room for.

    Takes no weights: a checkpoint on the meta device will do.
    """
    prefix = _prefix(checkpoint, plan, timestamps)
    frames, positions = len(plan.indices), extent(prefix)
    fits = positions <= checkpoint.context_length - ROOM
    largest = plan if fits else _largest(checkpoint, plan, timestamps)
    return Budget(
        wanted_frames=max(frames, round((plan.end - plan.start) * plan.fps)),
        frames=frames,
        width=plan.width,
        height=plan.height,
        visual_tokens=int(prefix.visual.sum()),
        prompt_tokens=len(prefix),
        positions=positions,
        context=checkpoint.context_length,
        room=ROOM,
        fits=fits,
        largest_frames=len(largest.indices) if largest else 0,
        weight_bytes=sum(parameter.nbytes for parameter in checkpoint.model.parameters()),
        kv_bytes=kv_bytes(checkpoint, len(prefix) + ROOM),
        activation_bytes=activation_bytes(checkpoint, plan, len(prefix)),
    )


def extent(prefix: Prefix) -> int:
    """How many positions a prefix takes: what a context is long in.

    They are fewer than its tokens, because those of one frame share some: so Qwen2-VL takes more tokens of video than
    its `max_position_embeddings` (Qwen2-VL, sections 2.1 and 3.3).
    """
    return int(prefix.positions.max()) + 1


def chunk_frames(plan: SamplePlan, step: int) -> int:
    """How many frames of `plan` are held as pixels at a time: whole temporal steps of `step` frames, at least one."""
    return min(CHUNK_FRAMES, CHUNK_PIXELS // (plan.height * plan.width)) // step * step or step


def chunk_tokens(device: torch.device) -> int:
    """How many tokens are prefilled at a time on `device`."""
    return CHUNK_TOKENS_CUDA if device.type == "cuda" else CHUNK_TOKENS


def kv_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """Bytes of the KV cache of so many tokens: a key and a value in each layer, for each key head."""
    config = checkpoint.model.config.get_text_config()
    numbers: int = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(config)
    return tokens * numbers * checkpoint.dtype.itemsize


def activation_bytes(checkpoint: Checkpoint, plan: SamplePlan, tokens: int) -> int:
    """An upper bound on what a watch holds at any moment beyond weights and KV cache.

    It counts every tensor that one vision layer makes of a chunk of frames and one language layer of a chunk of tokens,
    as if none were freed before the layer ends, the pixels and features of the chunks that wait, and a copy of one
    layer's keys and values in float32. Only this last part grows with the video.
    """
    from rrattention.transformers import settings

    chunk = chunk_tokens(checkpoint.device)
    longest = min(tokens, chunk + settings(checkpoint.model)[0].block_size)  # the end may be a block longer
    return (
        _vision_bytes(checkpoint, plan, longest)
        + _language_bytes(checkpoint, longest)
        + _attention_bytes(checkpoint, tokens)
    )


def _prefix(checkpoint: Checkpoint, plan: SamplePlan, timestamps: bool | None) -> Prefix:
    return checkpoint.prefix(plan.times, (plan.height, plan.width), timestamps=timestamps)


def _largest(checkpoint: Checkpoint, plan: SamplePlan, timestamps: bool | None) -> SamplePlan | None:
    """The plan with the most frames that fits, where `plan` does not; None if a single frame is too much."""

    def thinned(max_frames: int) -> SamplePlan:
        return plan_samples(
            plan.index,
            fps=plan.fps,
            start=plan.start,
            end=plan.end,
            max_frames=max_frames,
            sampling=cast(Literal["uniform", "keyframes"], plan.sampling),
            limits=checkpoint.limits,
        )

    # Fewer frames may be larger ones, so each number of temporal steps has to be tried; they need ever more positions.
    step = checkpoint.limits.temporal_factor
    numbers = [1, *range(step, len(plan.indices), step)]
    room = checkpoint.context_length - ROOM
    fitting = bisect_right(numbers, room, key=lambda count: extent(_prefix(checkpoint, thinned(count), timestamps)))
    return thinned(numbers[fitting - 1]) if fitting else None


def _vision_bytes(checkpoint: Checkpoint, plan: SamplePlan, longest: int) -> int:
    spec, config, size = checkpoint.spec, checkpoint.model.config.vision_config, checkpoint.dtype.itemsize
    frames = min(chunk_frames(plan, spec.temporal_patch_size), len(plan.indices))
    steps, rows, columns = spec.grid(frames, plan.height, plan.width)
    patches = steps * rows * columns
    hidden = getattr(config, "embed_dim", None) or config.hidden_size
    inner = getattr(config, "intermediate_size", None) or int(hidden * config.mlp_ratio)
    pixels = 3 * spec.temporal_patch_size * spec.patch_size**2
    # Patches as bytes, in float32 and in the model's type; then norms, projections, rotations, attention and MLP.
    a_patch = pixels * (1 + 4 + size) + hidden * (16 * size + 10 * 4) + inner * 4 * size
    # Beside those that wait for the encoder, what is in it and what is on its way.
    frames_waiting = (CHUNKS_AHEAD + 2) * 3 * frames * plan.height * plan.width
    tokens_waiting = CHUNKS_AT_ONCE * patches // spec.merge_size**2 + longest
    # Twice, because what waits is joined by copying.
    return patches * a_patch + frames_waiting + 2 * tokens_waiting * checkpoint.feature_width * size


def _language_bytes(checkpoint: Checkpoint, longest: int) -> int:
    config, size = checkpoint.model.config.get_text_config(), checkpoint.dtype.itemsize
    hidden, heads = config.hidden_size, config.num_attention_heads * _head_dim(config)
    key_heads = config.num_key_value_heads * _head_dim(config)
    # Embeddings, residuals, projections and their rotations, MLP; norms and attention compute in float32.
    a_token = size * (8 * hidden + 6 * heads + 6 * key_heads + 4 * config.intermediate_size)
    a_token += size * checkpoint.feature_width + 4 * (6 * hidden + 3 * heads)
    return longest * a_token + config.vocab_size * (size + 4)


def _attention_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """What attention over the whole prefix needs beside queries: keys and values once more, and the dense mask."""
    from rrattention.dense import QUERY_CHUNK

    config, size = checkpoint.model.config.get_text_config(), checkpoint.dtype.itemsize
    copies = 2 * config.num_key_value_heads * _head_dim(config) * (size + 4)
    group = config.num_attention_heads // config.num_key_value_heads
    masks = group * min(tokens, QUERY_CHUNK) * (2 + 4)  # of booleans, and as what is added to the scores
    return tokens * (copies + masks)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
