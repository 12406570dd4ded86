"""What a model of the Qwen-VL kind reads: frames as pixel patches, a prompt as token ids, and their positions.

A prompt has two parts. The *prefix* is everything up to the end of the video; the *question* is what follows. One
prefix serves many questions, and because a special token stands at the border, tokenising the parts one by one gives
what tokenising the whole would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rrvideo.clock import format_time
from rrvideo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "VIDEO_PAD",
    "Label",
    "PatchSpec",
    "Prefix",
    "build_prefix",
    "build_question",
    "clock_label",
    "mrope_positions",
    "patchify",
    "seconds_label",
]

# What the prompt says before a temporal step, from the times of its frames in seconds.
Label = Callable[[Sequence[float]], str]

VISION_START, VIDEO_PAD, VISION_END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
_VIDEO_PLACEHOLDER = VISION_START + VIDEO_PAD + VISION_END


@dataclass(frozen=True, slots=True)
class PatchSpec:
    """How a checkpoint's processor cuts frames into patches: sizes in pixels and frames, colours per channel."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def updated(self, config: Mapping[str, Any]) -> PatchSpec:
        """The same, except for what a processor's configuration says."""
        known: dict[str, Any] = {name: config[name] for name in self.__slots__ if config.get(name) is not None}
        for name in {"image_mean", "image_std"} & known.keys():
            known[name] = tuple(known[name])
        return replace(self, **known)

    @property
    def factor(self) -> int:
        """Pixels along one side of a visual token: sides of frames are multiples of it."""
        return self.patch_size * self.merge_size

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Temporal steps, rows and columns of patches in a video of that many frames and pixels."""
        return -(-frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size


def patchify(frames: np.ndarray | torch.Tensor, spec: PatchSpec) -> torch.Tensor:
    """Cut frames into normalised pixel patches, in the order and with the values of the Hugging Face processor.

    `frames` is uint8 RGB `[frames, height, width, 3]` with sides that are multiples of `spec.factor`. An incomplete
    last step is filled up with its last frame, so a stream is cut into whole steps by its reader. Returns float32
    `[steps * rows * columns, 3 * temporal_patch_size * patch_size ** 2]` on the device of the frames.
    Raises `ValueError` for other shapes or types.
    """
    pixels = torch.as_tensor(frames)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
        raise ValueError(f"frames must be uint8 [frames, height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
    count, height, width, _ = pixels.shape
    if height % spec.factor or width % spec.factor:
        raise ValueError(f"the sides of frames must be multiples of {spec.factor}, got {width} x {height}")
    if missing := -count % spec.temporal_patch_size:
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])

    steps, rows, columns = spec.grid(count, height, width)
    side, merge, patch = (spec.temporal_patch_size, spec.merge_size, spec.patch_size)
    pixels = pixels.view(steps, side, rows // merge, merge, patch, columns // merge, merge, patch, 3)
    # The patches that are merged into one visual token lie next to each other; inside a patch, the channel comes first.
    pixels = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(steps * rows * columns, 3, -1)
    mean, std = _channel_statistics(spec, pixels.device)
    return pixels.float().sub_(mean).div_(std).flatten(1)


@lru_cache(maxsize=8)
def _channel_statistics(spec: PatchSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation in bytes, `[3, 1]` each; kept on the device, so that no batch waits for a copy."""
    to_bytes = 1.0 / spec.rescale_factor
    mean, std = (
        torch.tensor(values, device=device)[:, None] * to_bytes for values in (spec.image_mean, spec.image_std)
    )
    return mean, std


@dataclass(frozen=True)
class Prefix:
    """The part of a prompt that questions about one video share: its tokens, where they stand and when they are."""

    text: str  # the rendered template before the video: later turns must begin with it too
    input_ids: torch.Tensor  # [tokens] int64
    step: torch.Tensor  # [tokens] int64: the temporal step of a visual token, -1 for text
    grid_thw: torch.Tensor  # [segments, 3] int64: temporal steps, rows and columns of patches
    positions: torch.Tensor  # [3, tokens] int64: time, row and column of M-RoPE
    times: tuple[float, ...]  # seconds: when the first frame of each temporal step is shown

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def visual(self) -> torch.Tensor:
        """Which tokens a vision feature replaces, `[tokens]` bool; the features come in the same order."""
        return self.step >= 0

    @cached_property
    def segments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A sequence cut so that each temporal step is a segment: where segments begin, and which ones are the steps'.

        `[segments]` int32, of which the last is all that is said after the prefix, and `[steps]` int64.
        """
        step = self.step.numpy()
        starts = np.concatenate([[0], np.flatnonzero(step[1:] != step[:-1]) + 1, [len(step)]])
        steps = np.flatnonzero(step[starts[:-1]] >= 0)
        return torch.from_numpy(starts.astype(np.int32)), torch.from_numpy(steps)

    def next_positions(self, count: int) -> torch.Tensor:
        """The positions of the next `count` text tokens, `[3, count]`."""
        first = int(self.positions.max()) + 1
        return torch.arange(first, first + count).expand(3, -1)


def clock_label(times: Sequence[float]) -> str:
    """The time of a step's first frame as `1:02:03`: our way for models that are not trained with times."""
    return format_time(times[0])


def seconds_label(times: Sequence[float]) -> str:
    """The time midway between a step's first and last frame as `<0.5 seconds>`: Qwen3-VL's way."""
    return f"<{(times[0] + times[-1]) / 2:.1f} seconds>"


def build_prefix(
    tokenizer: PreTrainedTokenizerBase,
    spec: PatchSpec,
    times: Sequence[float],
    size: tuple[int, int],
    *,
    timestamps: bool,
    label: Label = clock_label,
    part_steps: bool = False,
    tokens_per_second: float | None = None,
) -> Prefix:
    """Lay out the prompt up to the end of a video whose frames are shown at `times` (seconds), `size` (height, width).

    With `timestamps`, every temporal step is a video segment of its own after its `label`; without, the video is one
    segment, or with `part_steps` one for each step all the same. `tokens_per_second` is for models whose temporal
    positions tell time. The prefix of a video's first whole steps begins that of the whole video, but for its last
    token, the end of a segment that goes on where the video is one. Raises `ModelError` if the chat template has no
    place for a video.
    """
    if not times:
        raise ValueError("a video needs at least one frame")
    steps, rows, columns = spec.grid(len(times), *size)
    moments = [times[i : i + spec.temporal_patch_size] for i in range(0, len(times), spec.temporal_patch_size)]
    step_times = tuple(shown[0] for shown in moments)
    step_tokens = rows * columns // spec.merge_size**2
    text, _ = _render(tokenizer, ["?"])
    # The segments take the place of the template's whole placeholder, its start and end included. In transformers 5,
    # Qwen3-VL's processor leaves these two around all segments: not so in the release that came with that model.
    start, pad, end = tokenizer.encode(_VIDEO_PLACEHOLDER, add_special_tokens=False)

    segments = [("", list(range(steps)))]
    if timestamps or part_steps:
        segments = [(label(shown) if timestamps else "", [index]) for index, shown in enumerate(moments)]
    labels = [text + segments[0][0], *(label for label, _ in segments[1:])]
    ids: list[np.ndarray] = []
    step: list[np.ndarray] = []
    for label_ids, (_, indices) in zip(tokenizer(labels, add_special_tokens=False).input_ids, segments, strict=True):
        visual: np.ndarray = np.repeat(indices, step_tokens)
        ids += [np.array([*label_ids, start]), np.full_like(visual, pad), np.array([end])]
        step += [np.full(len(label_ids) + 1, -1), visual, np.array([-1])]

    step_of_token = torch.from_numpy(np.concatenate(step))
    grid_thw = torch.tensor([[len(indices), rows, columns] for _, indices in segments])
    return Prefix(
        text=text,
        input_ids=torch.from_numpy(np.concatenate(ids)),
        step=step_of_token,
        grid_thw=grid_thw,
        positions=mrope_positions(
            step_of_token >= 0,
            grid_thw,
            merge_size=spec.merge_size,
            times=step_times if tokens_per_second else None,
            tokens_per_second=tokens_per_second or 0.0,
        ),
        times=step_times,
    )


def build_question(tokenizer: PreTrainedTokenizerBase, prefix: Prefix, turns: Sequence[str]) -> torch.Tensor:
    """Tokenise what follows the video, up to where the assistant's answer begins: `[tokens]` int64.

    `turns` are what user and assistant said by turns, the user first and last: one question, or a chat so far.
    Raises `ModelError` if the chat template changes the part before the video when the conversation goes on.
    """
    if len(turns) % 2 == 0:
        raise ValueError(f"turns must begin and end with the user's, got {len(turns)} turns")
    before, after = _render(tokenizer, turns)
    if before != prefix.text:
        raise ModelError(
            "the model's chat template writes another text before the video as the conversation goes on",
            "ask each question on its own instead of in a chat",
        )
    return torch.tensor(tokenizer.encode(after, add_special_tokens=False))


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> tuple[str, str]:
    """The conversation's text before and after the video, whose place is in the user's first turn."""
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    messages[0]["content"] = [{"type": "video"}, {"type": "text", "text": turns[0]}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, placeholder, after = rendered.partition(_VIDEO_PLACEHOLDER)
    if not placeholder:
        raise ModelError(
            "the model's chat template has no place for a video",
            f"it must write {_VIDEO_PLACEHOLDER} for an item of type video",
        )
    return before, after


def mrope_positions(
    visual: torch.Tensor,
    grid_thw: torch.Tensor,
    *,
    merge_size: int,
    times: Sequence[float] | None = None,
    tokens_per_second: float = 0.0,
) -> torch.Tensor:
    """M-RoPE positions (time, row, column) of a sequence of text and video segments: `[3, tokens]` int64.

    `visual` `[tokens]` bool says which tokens are visual, `grid_thw` `[segments, 3]` the patches of each segment. Text
    counts on by one in all three; within a segment each token stands at its place in the grid, and the text after it
    goes on at the largest position so far plus one (Qwen2-VL, section 2.1). With `times`, one per temporal step in
    seconds, temporal positions are `tokens_per_second` apart for each second since the segment's first step
    (Qwen2.5-VL, section 2.1.2); otherwise one apart for each step.

    The model of transformers takes one number for that, the seconds between any two steps (`second_per_grid_ts`). For
    steps that are evenly spaced, as in training, this is the same. Of others, such as keyframes, it could only tell the
    mean; here each keeps the time that it is shown.
    """
    steps, rows, columns = grid_thw[:, 0], grid_thw[:, 1] // merge_size, grid_thw[:, 2] // merge_size
    sizes = steps * rows * columns
    segment = torch.arange(len(grid_thw)).repeat_interleave(sizes)  # of each visual token, as all below
    rank = torch.arange(len(segment)) - (sizes.cumsum(0) - sizes)[segment]
    rows, columns = rows[segment], columns[segment]
    time = rank // (rows * columns)
    if times is not None:
        seconds = torch.tensor(times, dtype=torch.float64)
        first = (steps.cumsum(0) - steps)[segment]
        # A container rounds its times, 2 s to 1.9999 s for one: a millisecond keeps them on their side of the floor.
        time = ((seconds[first + time] - seconds[first] + 1e-3) * tokens_per_second).floor().long()
    places = torch.stack([time, rank // columns % rows, rank % columns])

    # How far the count moves on after each token: by one after text, past the whole segment after its last token.
    advance = (~visual).long()
    extent = torch.zeros(len(grid_thw), dtype=torch.long).scatter_reduce(0, segment, places.amax(0), "amax") + 1
    advance[visual.nonzero()[sizes.cumsum(0) - 1, 0]] = extent
    positions = (advance.cumsum(0) - advance).repeat(3, 1)
    positions[:, visual] += places
    return positions
