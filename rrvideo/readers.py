"""Decode some frames of a video, by their numbers: one at a time, upright, and at the size that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from rrvideo.errors import VideoError
from rrvideo.frameindex import FrameIndex, open_video, packets_of

__all__ = ["read_decord", "read_pyav"]

# Qwen's own preprocessing is an antialiased bicubic. swscale's is the same to half a grey level, but only with exact
# rounding and chroma at full resolution: without them pictures come out one to two levels darker.
RESIZING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# A seek empties the decoder: it pays when it saves decoding this many packets, or merely reading so many.
SEEK_SAVES_DECODING = 16
SEEK_SAVES_READING = 1000


@dataclass(slots=True)
class Stretch:
    """Frames to decode in one go, from packet `start` to packet `stop`; a seek leads from one stretch to the next."""

    start: int
    stop: int
    frames: list[int] = field(default_factory=list)


def read_pyav(
    index: FrameIndex, frames: Sequence[int], *, width: int, height: int, warn: Callable[[str], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, image) of each of the ascending `frames` that can be decoded; uint8 [height, width, 3].

    Where all of them are keyframes, nothing else is decoded. Memory does not grow with their number.
    """
    keys_only = bool(np.isin(frames, index.keyframes).all())
    resize = _resizer(*index.upright.size(width, height))
    with open_video(index.path) as (container, stream):
        stream.thread_type = "AUTO"
        decoder = _Decoder(stream.codec_context)
        for stretch in _stretches(index, frames, SEEK_SAVES_READING if keys_only else SEEK_SAVES_DECODING):
            packets = _packets_for(container, stream, index, stretch)
            pictures = _pictures(decoder, packets, index, stretch, keys_only)
            for number, picture in _numbered(pictures, index, stretch):
                if not decoder.broken:
                    yield number, index.upright.apply(resize(picture))
    if decoder.failures:
        warn(f"damaged places met in decoding: {decoder.failures}; pictures that build on them were left out")


def read_decord(
    index: FrameIndex, frames: Sequence[int], *, width: int, height: int, warn: Callable[[str], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the same as `read_pyav`, decoded by decord, which published Qwen2-VL figures were made with.

    Raises `VideoError` if decord is not installed, or cannot be trusted with the file. It may hang on a damaged one,
    so none is given to it and there is nothing to `warn` of.
    """
    try:
        import decord
    except ImportError as error:
        raise VideoError("decord is not installed", "pip install decord, or use reader='pyav'") from error
    name, otherwise = Path(index.path).name, "use reader='pyav'"
    if index.container in {"mpegts", "mpeg"} or index.upright.mirrored or index.warnings:
        raise VideoError(f"decord misreads MPEG streams, mirrored videos and damaged ones, such as {name}", otherwise)
    decord.logging.set_level(decord.logging.QUIET)
    resize = _resizer(width, height)
    try:
        video = decord.VideoReader(str(Path(index.path).absolute()))
        if len(video) != len(index):
            raise VideoError(f"decord finds {len(video)} frames in {name} where there are {len(index)}", otherwise)
        for number, picture in _decord_pictures(video, index, frames):
            yield number, resize(av.VideoFrame.from_ndarray(picture.asnumpy(), format="rgb24"))
    except decord.DECORDError as error:
        raise VideoError(f"decord cannot read {name}", otherwise) from error


def _decord_pictures(video: Any, index: FrameIndex, frames: Sequence[int]) -> Iterator[tuple[int, Any]]:
    # decord seeks as if every keyframe were shown in the order of the file. Where it is not, only one by one is exact.
    if np.array_equal(index.keyframes, np.flatnonzero(index.keys)) and not index.by_arrival:
        for number in frames:
            yield number, video[number]
    else:
        wanted = set(frames)
        for number in range(max(wanted) + 1):
            picture = video.next()
            if number in wanted:
                yield number, picture


class _Decoder:
    """A codec that goes on after damaged packets and counts them.

    `broken` says that the picture that came last is not what was filmed: after damage, pictures show what others have
    left behind, however clearly, until one comes that builds on no other.
    """

    def __init__(self, context: av.VideoCodecContext) -> None:
        self.context = context
        self.failures = 0
        self.broken = False

    def decode(self, packet: av.Packet | None) -> Iterator[av.VideoFrame]:
        try:
            pictures = self.context.decode(packet)
        except av.FFmpegError:
            self.failures += 1
            self.broken = True
            return
        for picture in pictures:
            self.failures += picture.is_corrupt
            self.broken = picture.is_corrupt or (self.broken and not picture.key_frame)
            yield picture


def _stretches(index: FrameIndex, frames: Sequence[int], seek_saves: int) -> Iterator[Stretch]:
    """Group frames so that a seek from one group to the next saves more than `seek_saves` packets."""
    stretch: Stretch | None = None
    borders = zip(index.starts(frames).tolist(), index.stops(frames).tolist(), strict=True)
    for number, (start, stop) in zip(frames, borders, strict=True):
        if stretch is None or start - stretch.stop > seek_saves:
            if stretch is not None:
                yield stretch
            stretch = Stretch(start, stop)
        stretch.stop = max(stretch.stop, stop)
        stretch.frames.append(number)
    if stretch is not None:
        yield stretch


def _packets_for(
    container: av.container.InputContainer, stream: av.VideoStream, index: FrameIndex, stretch: Stretch
) -> Iterator[av.Packet]:
    """All packets from the stretch's start, or a little before, to its stop."""
    last, ended = int(index.stamps[stretch.stop]), False
    for packet in _packets_from(container, stream, index, stretch.start):
        if packet.pts is not None:  # else it belongs to the packet before
            if ended:
                return
            ended = packet.pts == last
        yield packet


def _packets_from(
    container: av.container.InputContainer, stream: av.VideoStream, index: FrameIndex, start: int
) -> Iterator[av.Packet]:
    if start == 0:  # the first stretch, with nothing read yet
        return packets_of(container, stream)
    # Containers differ in which of a packet's two times they seek by, so look where the seek has led.
    for stamp in (int(index.stamps[start]), index.seek_stamp(start), index.seek_stamp(0)):
        try:
            container.seek(stamp, stream=stream)
        except av.FFmpegError:
            continue
        packets = packets_of(container, stream)
        first = next(packets, None)
        if first is not None and (index.stamps[: start + 1] == first.pts).any():
            return chain([first], packets)
    return iter(())


def _pictures(
    decoder: _Decoder, packets: Iterator[av.Packet], index: FrameIndex, stretch: Stretch, keys_only: bool
) -> Iterator[av.VideoFrame]:
    """Decode what the stretch needs: with `keys_only` its own packets, else the rest too if others build on them."""
    stamps = set(index.stamps[index.order[stretch.frames]].tolist())
    needed = decoder.broken = False
    for packet in packets:
        needed = packet.pts in stamps if packet.pts is not None else needed
        if keys_only and not needed:
            continue
        # Frames that are told apart by their order must all come.
        decoder.context.skip_frame = "DEFAULT" if needed or index.by_arrival else "NONREF"
        yield from decoder.decode(packet)
    yield from decoder.decode(None)


def _numbered(
    pictures: Iterator[av.VideoFrame], index: FrameIndex, stretch: Stretch
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Tell which frames the pictures are, and leave out those that were not asked for."""
    if index.by_arrival:
        stamps = index.stamps[index.order]
        wanted, number = set(stretch.frames), -1
        for picture in pictures:
            known = picture.key_frame and picture.pts is not None
            number = int(np.searchsorted(stamps, picture.pts)) if known else number + 1
            if number in wanted:
                yield number, picture
    else:
        stamps = index.stamps[index.order[stretch.frames]]
        numbers = dict(zip(stamps.tolist(), stretch.frames, strict=True))
        for picture in pictures:
            if picture.pts in numbers:
                yield numbers.pop(picture.pts), picture


def _resizer(width: int, height: int) -> Callable[[av.VideoFrame], np.ndarray]:
    reformatter = VideoReformatter()  # keeps its tables from one frame to the next

    def resize(picture: av.VideoFrame) -> np.ndarray:
        return reformatter.reformat(picture, width, height, "rgb24", interpolation=RESIZING).to_ndarray()

    return resize
