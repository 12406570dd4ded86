"""Open, probe and sample a video: a stream of frames with their times, in order and at the size a model takes.

Three steps: `probe` says what a file holds, `plan_samples` chooses frames and their size, `read_frames` decodes them.
Nothing here needs torch, and memory does not grow with the length of the video.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rrvideo.clock import format_time, parse_clip
from rrvideo.errors import BudgetError, VideoError
from rrvideo.frameindex import FrameIndex, scan
from rrvideo.readers import read_decord, read_pyav

__all__ = [
    "Frame",
    "FrameStream",
    "PixelLimits",
    "SamplePlan",
    "VideoInfo",
    "format_time",
    "parse_clip",
    "plan_samples",
    "probe",
    "read_frames",
    "smart_resize",
]

MIN_FRAMES = 4  # qwen-vl-utils samples no fewer, however short the clip
MAX_ASPECT = 200  # and refuses pictures that are longer than this
READERS = {"pyav": read_pyav, "decord": read_decord}


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file holds, counted in its packets: what its header says may be wrong."""

    path: str
    container: str
    codec: str
    width: int  # in pixels, upright; these are taken as square, as Qwen's own preprocessing takes them
    height: int
    rotation: int  # degrees clockwise from the coded picture to the displayed one
    duration: float  # seconds
    fps: float  # the average
    frame_count: int
    keyframe_count: int
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return dataclasses.asdict(self) | {"warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """How many pixels frames may have, after resizing; the defaults are those of qwen-vl-utils."""

    min_pixels: int = 128 * 28 * 28  # of one frame
    max_pixels: int = 768 * 28 * 28  # of one frame
    total_pixels: int = int(0.9 * 128000 * 28 * 28)  # of all temporal steps, each of `temporal_factor` frames
    factor: int = 28  # sides are multiples of it
    temporal_factor: int = 2  # frames that make one step

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "total_pixels", "factor", "temporal_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_pixels < max(self.min_pixels, self.factor**2):
            raise ValueError(f"max_pixels must hold min_pixels and factor x factor, got {self.max_pixels}")


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """Which frames of a video to read, and the size to read them at.

    `times` are the frames' own, in seconds since the video's first frame, also where only a clip is sampled.
    Frame counts are multiples of the temporal factor, except for keyframes and for a video of a single frame.
    """

    info: VideoInfo
    indices: tuple[int, ...]
    times: tuple[float, ...]
    width: int
    height: int
    sampling: str
    fps: float
    start: float
    end: float
    warnings: tuple[str, ...]
    index: FrameIndex = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a video: its number, its time in seconds, and its picture, RGB uint8 [height, width, 3]."""

    index: int
    time: float
    image: np.ndarray


class FrameStream:
    """The frames of a plan, decoded one by one as they are taken.

    `warnings` starts with those of the plan and grows while frames are read. Frames that cannot be decoded are left
    out; if that is all of them, the iteration ends in a `VideoError`.
    """

    def __init__(self, plan: SamplePlan, reader: str) -> None:
        self.plan = plan
        self.reader = reader
        self.warnings = list(plan.warnings)

    def __iter__(self) -> Iterator[Frame]:
        plan = self.plan
        self.warnings[:] = plan.warnings
        missing = dict(zip(plan.indices, plan.times, strict=True))
        read = READERS[self.reader]
        for number, image in read(
            plan.index, plan.indices, width=plan.width, height=plan.height, warn=self.warnings.append
        ):
            yield Frame(number, missing.pop(number), image)
        name = Path(plan.info.path).name
        if len(missing) == len(plan.indices):
            raise VideoError(f"none of {len(missing)} frames of {name} can be decoded", "the file is damaged")
        if missing:
            first, last = format_time(min(missing.values())), format_time(max(missing.values()))
            where = f"at {first}" if first == last else f"between {first} and {last}"
            self.warnings.append(f"{len(missing)} of {len(plan.indices)} frames could not be decoded, {where}")


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Say what the video file at `path` holds.

    Raises `VideoError` if it is no video, or if nothing of it can be decoded.
    """
    return _info(scan(path))


def plan_samples(
    path: str | os.PathLike[str],
    *,
    fps: float = 1.0,
    start: float | None = None,
    end: float | None = None,
    max_frames: int = 768,
    sampling: Literal["uniform", "keyframes"] = "uniform",
    limits: PixelLimits | None = None,
) -> SamplePlan:
    """Choose the frames of the video at `path`, or of its clip from `start` to `end` seconds, and their size.

    `uniform` takes the frames that qwen-vl-utils takes. `keyframes` takes the keyframe nearest to each of these, once;
    they are fewer, perhaps an odd number, and decoding them is many times faster.
    Given `plan.index` of an earlier plan for `path`, the file is not read again.
    Raises `VideoError` if the file is no video or the clip lies outside it, and `BudgetError` if `limits` have no room
    for so many frames.
    """
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if max_frames < 1:
        raise ValueError(f"max_frames must be positive, got {max_frames}")
    if sampling not in {"uniform", "keyframes"}:
        raise ValueError(f"sampling must be 'uniform' or 'keyframes', got {sampling!r}")
    limits = limits or PixelLimits()
    index = path if isinstance(path, FrameIndex) else scan(path)
    warnings = list(index.warnings)
    start, end = _clip(index, start, end, warnings)
    first, last = _frames_within(index, start, end)
    numbers = _uniform(first, last, index.fps, fps, max_frames, limits.temporal_factor)
    if sampling == "keyframes":
        numbers = _nearest_keyframes(index, numbers, first, last, warnings)
    height, width = _frame_size(index, len(numbers), limits)
    return SamplePlan(
        info=_info(index),
        indices=tuple(numbers),
        times=tuple(index.times[numbers].tolist()),
        width=width,
        height=height,
        sampling=sampling,
        fps=fps,
        start=start,
        end=end,
        warnings=tuple(warnings),
        index=index,
    )


def read_frames(plan: SamplePlan, *, reader: Literal["pyav", "decord"] = "pyav") -> FrameStream:
    """Read the frames of `plan` as a stream; `decord` gives the same frames, of undamaged files."""
    if reader not in READERS:
        raise ValueError(f"reader must be one of {', '.join(READERS)}; got {reader!r}")
    return FrameStream(plan, reader)


def smart_resize(height: int, width: int, *, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The (height, width) nearest to a picture's own shape, in multiples of `factor`, within the limits on its area.

    The rule of qwen-vl-utils, except that `max_pixels` holds where it would be broken there: by rounding up, by a long
    thin picture, and by a larger `min_pixels`. Raises `ValueError` if one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"one side must be at most {MAX_ASPECT} times the other, got {height}x{width}")
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    longest = max(factor, math.floor(max_pixels / factor**2) * factor)  # of a picture that is one factor thin
    return min(rows, longest), min(columns, longest)


def _info(index: FrameIndex) -> VideoInfo:
    return VideoInfo(
        path=index.path,
        container=index.container,
        codec=index.codec,
        width=index.width,
        height=index.height,
        rotation=index.upright.rotation,
        duration=index.duration,
        fps=index.fps,
        frame_count=len(index),
        keyframe_count=len(index.keyframes),
        warnings=index.warnings,
    )


def _clip(index: FrameIndex, start: float | None, end: float | None, warnings: list[str]) -> tuple[float, float]:
    """The clip's bounds in seconds, where None stands for the video's own."""
    length = format_time(index.duration)
    if start is not None and not 0 <= start < index.duration:
        begin = f"{format_time(start)} ({start:.2f} s)" if 0 <= start < math.inf else f"{start:g} s"
        raise VideoError(f"the clip starts at {begin}, but the video is {length} long ({index.duration:.2f} s)")
    if end is not None and not end > (start or 0.0):
        raise VideoError(f"the clip ends at {end:g} s, before it starts; the video is {length} long")
    if end is not None and index.duration + 1 < end < math.inf:
        warnings.append(f"the clip ends at {format_time(end)}, but the video at {length}")
    return start or 0.0, index.duration if end is None else min(end, index.duration)


def _frames_within(index: FrameIndex, start: float, end: float) -> tuple[int, int]:
    """The first and the last frame of a clip; where no frame begins in it, the one that is on screen."""
    times = index.times
    first = int(np.searchsorted(times, start - index.rounding))
    last = int(np.searchsorted(times, end + index.rounding, side="right")) - 1
    return min(first, last), last


def _uniform(first: int, last: int, video_fps: float, fps: float, max_frames: int, factor: int) -> list[int]:
    """The frames that qwen-vl-utils takes: an even count at `fps`, spread evenly from the first to the last."""
    total = last - first + 1
    count = max(total / video_fps * fps, math.ceil(MIN_FRAMES / factor) * factor)
    count = min(count, math.floor(max_frames / factor) * factor, total)
    return _linspace(first, last, max(1, math.floor(count / factor) * factor))


def _linspace(first: int, last: int, count: int) -> list[int]:
    """`torch.linspace(first, last, count).round()`: in float32, from both ends to the middle, with fused multiply-add.

    In a long video its rounding picks other frames, now and then, than exact arithmetic would.
    """
    step = float(np.float32(last - first) / np.float32(max(count - 1, 1)))
    position = np.arange(count)
    from_first, from_last = first + step * position, last - step * (count - 1 - position)
    values = np.where(position < count // 2, from_first, from_last) if count > 1 else from_first
    return [int(value) for value in np.round(values.astype(np.float32))]


def _nearest_keyframes(
    index: FrameIndex, numbers: Sequence[int], first: int, last: int, warnings: list[str]
) -> list[int]:
    """The keyframe nearest in time to each of `numbers`, each once, in order."""
    keyframes = index.keyframes
    inside = keyframes[(keyframes >= first) & (keyframes <= last)]
    if not len(inside):
        warnings.append("no keyframe lies in the clip: the nearest outside it are used")
        inside = keyframes
    stamps = index.stamps[index.order]  # integers, among which a tie is a tie
    nearest = np.unique([np.argmin(abs(stamps[inside] - stamps[number])) for number in numbers])
    if 2 * len(nearest) < len(numbers):
        warnings.append(f"{len(nearest)} keyframes stand for {len(numbers)} frames: the video has no more")
    return [int(number) for number in inside[nearest]]


def _frame_size(index: FrameIndex, count: int, limits: PixelLimits) -> tuple[int, int]:
    """The (height, width) of frames of which `count` fit the total budget, below the minimum if need be."""
    padded = math.ceil(count / limits.temporal_factor) * limits.temporal_factor
    share = limits.total_pixels / padded * limits.temporal_factor
    if share < limits.factor**2:
        fit = limits.total_pixels // limits.factor**2 * limits.temporal_factor
        raise BudgetError(f"{count} frames do not fit {limits.total_pixels} pixels", f"ask for at most {fit} frames")
    try:
        return smart_resize(
            index.height,
            index.width,
            factor=limits.factor,
            min_pixels=limits.min_pixels,
            max_pixels=min(limits.max_pixels, share),
        )
    except ValueError as error:
        raise VideoError(f"{Path(index.path).name} cannot be used: {error}") from error
