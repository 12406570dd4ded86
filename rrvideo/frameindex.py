"""What is in a video file, found without decoding it: which frames, when, and from where each can be decoded."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from rrvideo.clock import format_time
from rrvideo.errors import VideoError

__all__ = ["FrameIndex", "Upright", "open_video", "packets_of", "scan"]

# Containers that hold their pictures themselves. Playlists (HLS, DASH, concat) and image sequences make FFmpeg open
# other files, whatever name they go by, and so are not among them.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif"
# What else goes by the name of a video, known by its first bytes.
OTHER_FILES = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"#EXTM3U", "a playlist"),
    (b"ffconcat", "a playlist"),
)
# The demuxer of a damaged file may fail and then go on; one that fails this often in a row has nothing more to give.
FAILURES_IN_A_ROW = 10
NARROW = 2**30 - 1  # no two numbers up to this are further apart than 32 bits can say


@dataclass(frozen=True, slots=True)
class Upright:
    """How a decoded picture is turned to the way it is shown: transposed first, then mirrored."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Upright:
        """Read a frame's display matrix, which moves (x, y) to (a x + c y, b x + d y)."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls()
        a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
        if abs(b) > abs(a):
            return cls(transpose=True, flip_rows=b < 0, flip_columns=c < 0)
        return cls(flip_rows=d < 0, flip_columns=a < 0)

    @property
    def rotation(self) -> int:
        """The clockwise turn in degrees: 0, 90, 180 or 270."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows else 0

    @property
    def mirrored(self) -> bool:
        """Whether no turn alone does it."""
        return self.transpose ^ self.flip_rows ^ self.flip_columns

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) of a picture after turning, and of a turned one before."""
        return (height, width) if self.transpose else (width, height)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Turn `image` [height, width, 3]."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        return np.ascontiguousarray(image[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1])


@dataclass(frozen=True, slots=True, eq=False)
class FrameIndex:
    """The packets of a file in decoding order, and its frames in the order in which they are shown.

    A frame is a picture that is shown and can be decoded; its number counts from 0. In a container without
    presentation times (H.264 in AVI) frames can only be told apart by the order in which they come: `by_arrival`.
    """

    path: str
    container: str
    codec: str
    width: int  # as shown, like the height
    height: int
    upright: Upright
    time_base: Fraction  # seconds
    fps: float
    duration: float  # seconds
    stamps: np.ndarray  # int32, or int64 where they need it, [packets]: presentation times in `time_base`
    keys: np.ndarray  # bool [packets]
    seeks: np.ndarray  # int64 [keyframes + 1], the decoding times of the first packet and of those of `keys`
    order: np.ndarray  # int32 [frames], the packet that holds the frame
    by_arrival: bool
    warnings: tuple[str, ...]

    def __fspath__(self) -> str:
        """The path of the file, so that an index stands for its file wherever a path is wanted."""
        return self.path

    def __len__(self) -> int:
        return len(self.order)

    @property
    def times(self) -> np.ndarray:
        """When frames are shown: seconds since the first one, float64 [frames]."""
        return _seconds(self.stamps[self.order], self.time_base)

    @property
    def rounding(self) -> float:
        """Seconds by which the container may have rounded the times of frames."""
        return min(0.0005, float(self.time_base) / 2)

    def starts(self, frames: Sequence[int]) -> np.ndarray:
        """The packets where decoding must start to get each of `frames`, int64 [frames]."""
        packets: np.ndarray = self.order.take(frames)
        key_packets = np.flatnonzero(self.keys) if self.keys.any() else np.array([0])
        group = np.searchsorted(key_packets, packets, side="right") - 1
        # In an open group, pictures that are shown before their keyframe build on the group before it too.
        group -= (self.stamps[key_packets[group]] > self.stamps[packets]) & (group > 0)
        return key_packets[group]

    def stops(self, frames: Sequence[int]) -> np.ndarray:
        """The packets after which each of `frames` can be had, int64 [frames]."""
        packets: np.ndarray = self.order.take(frames).astype(np.int64)
        if not self.by_arrival:
            return packets
        ends: np.ndarray = np.append(
            np.flatnonzero(self.keys)[1:] - 1, len(self.keys) - 1
        )  # of each group, its last packet
        return ends[np.searchsorted(ends, packets)]

    def seek_stamp(self, packet: int) -> int:
        """The decoding time of `packet`, which is the first one or a keyframe's."""
        return int(self.seeks[np.count_nonzero(self.keys[: packet + 1]) if packet else 0])

    @property
    def keyframes(self) -> np.ndarray:
        """The numbers of the frames that can be decoded alone, int64 [keyframes]."""
        return np.flatnonzero(self.keys[self.order])


def scan(path: str | os.PathLike[str]) -> FrameIndex:
    """Read all packets of a video file and decode its first frame.

    Times and counts come from the packets, for what a container says about itself may be wrong.
    Raises `VideoError` if the file is no video or none of its frames can be decoded.
    """
    first = _first_frame(path)
    upright, packets = Upright.of(first), _Packets()
    width, height = upright.size(first.width, first.height)
    with open_video(path) as (container, stream):
        reached, warnings = _read_packets(container, stream, packets)
        facts: dict[str, Any] = {
            "container": container.format.name.split(",")[0],
            "codec": stream.codec_context.codec.name,
            "time_base": stream.time_base,
        }
        declared, reordered = float(stream.average_rate or 0), bool(stream.codec_context.has_b_frames)
        early = _ends_early(container, stream, reached)
    # The container, which holds an index of its own, is closed by now: an hour has a hundred thousand packets.
    stamps, keys, shown = packets.arrays()
    order = _display_order(stamps, keys, shown)
    if not len(order):
        raise VideoError(f"no frame of {Path(path).name} is whole", "copy or download it again")
    times = stamps[order]
    fps, duration = _pace(times, packets.lengths[order[-1]], declared, facts["time_base"])
    if cut_off := int(np.count_nonzero(shown)) - len(order):
        warnings.append(f"{cut_off} frames at the start build on missing pictures: they are left out")
    warnings += [*early, *_holes(_seconds(times, facts["time_base"]))]
    return FrameIndex(
        path=os.fspath(path),
        **facts,
        width=width,
        height=height,
        upright=upright,
        fps=fps,
        duration=duration,
        stamps=stamps,
        keys=keys,
        seeks=np.array(packets.seeks),
        order=order,
        by_arrival=reordered and bool((stamps[1:] > stamps[:-1]).all()),
        warnings=tuple(warnings),
    )


@contextmanager
def open_video(path: str | os.PathLike[str]) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a video file and its main video stream; other local files and the network are out of its reach.

    Raises `VideoError` if the file is no video or has only sound.
    """
    file = Path(path)
    head = _first_bytes(file)
    # `file:` keeps a name such as `concat:a|b` from being read as an address.
    source, options = f"file:{file.absolute()}", {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(source, options=options)
    except av.FFmpegError as error:
        if head[4:8] == b"ftyp":
            hint = "its end, where an mp4 file keeps its index, is missing: copy or download it again"
            raise VideoError(f"{file.name} is incomplete or damaged", hint) from error
        hint = "mp4, mov, mkv, webm, avi, ts, mpeg, flv, wmv, ogv and gif files can be"
        raise VideoError(f"{file.name} cannot be read as a video", hint) from error
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise VideoError(f"{file.name} holds no video, only sound")
        yield container, stream


def packets_of(container: av.container.InputContainer, *streams: av.VideoStream) -> Iterator[av.Packet]:
    """Demux `streams`, or all; goes on after a damaged place where the container lets it."""
    failures = 0
    while failures < FAILURES_IN_A_ROW:
        try:
            for packet in container.demux(*streams):
                failures = 0
                if packet.size:  # an empty packet repeats a picture (AVI), or stands for the end
                    yield packet
            return
        except av.FFmpegError:
            failures += 1


def _first_bytes(file: Path) -> bytes:
    if not file.is_file():
        if file.exists():
            raise VideoError(f"{file} is not a file")
        hint = "addresses are not opened: download the video first" if ":/" in str(file) else ""
        raise VideoError(f"there is no file {file}", hint)
    try:
        with file.open("rb") as opened:
            head = opened.read(16)
    except OSError as error:
        raise VideoError(f"{file} cannot be read: {error.strerror}") from error
    if not head:
        raise VideoError(f"{file.name} is empty", "copy or download it again")
    for signature, kind in OTHER_FILES:
        if head.startswith(signature):
            raise VideoError(f"{file.name} is {kind}, not a video")
    return head


def _first_frame(path: str | os.PathLike[str]) -> av.VideoFrame:
    with open_video(path) as (container, stream):
        for packet in chain(packets_of(container, stream), [None]):
            try:
                for frame in stream.codec_context.decode(packet):
                    return frame
            except av.FFmpegError:  # a damaged packet; a later one may do
                continue
    raise VideoError(f"no frame of {Path(path).name} can be decoded", "it is damaged, incomplete or encrypted")


@dataclass(slots=True)
class _Packets:
    """What is known of each packet of a stream, in decoding order; times and lengths are in its `time_base`."""

    stamps: array[int] = field(default_factory=partial(array, "i"))
    lengths: array[int] = field(default_factory=partial(array, "i"))
    keys: array[int] = field(default_factory=partial(array, "b"))  # 0 or 1
    shown: array[int] = field(default_factory=partial(array, "b"))  # 0 or 1
    seeks: array[int] = field(default_factory=partial(array, "q"))  # decoding times of the first and of keyframes

    def add(self, packet: av.Packet, stamp: int) -> None:
        length, decoded = packet.duration or 0, stamp if packet.dts is None else packet.dts
        if max(abs(stamp), length) > NARROW and self.stamps.typecode == "i":
            self.stamps, self.lengths = array("q", self.stamps), array("q", self.lengths)
        self.stamps.append(stamp)
        self.lengths.append(length)
        self.keys.append(packet.is_keyframe)
        # is_discard: an edit list hides the picture, although others may build on it.
        self.shown.append(not (packet.is_corrupt or packet.is_discard))
        self.seeks.extend([decoded] * (packet.is_keyframe + (not self.seeks)))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stamps, keys and which are shown; views, for freed memory does not always go back to the system."""
        return np.asarray(self.stamps), np.asarray(self.keys).view(bool), np.asarray(self.shown).view(bool)


def _read_packets(
    container: av.container.InputContainer, stream: av.VideoStream, packets: _Packets
) -> tuple[float, list[str]]:
    """Read `stream` into `packets`; returns the last moment of any stream in seconds, and warnings."""
    reached, clock, damaged, timeless, warnings = 0.0, -math.inf, 0, 0, list[str]()
    ticks: dict[int, float] = {}  # of each stream, in seconds; to ask every packet takes longer than to read it
    for packet in packets_of(container):
        pts, own = packet.pts, packet.stream_index == stream.index
        if pts is None:
            timeless += own
            continue
        tick = ticks.get(packet.stream_index) or ticks.setdefault(packet.stream_index, float(packet.time_base))
        reached = max(reached, (pts + (packet.duration or 0)) * tick)
        if not own:
            continue
        if packet.dts is not None:
            if packet.dts * tick < clock - 1.0:
                warnings.append(f"the clock of the file jumps back at {format_time(reached)}: the rest is left out")
                break
            clock = packet.dts * tick
        damaged += packet.is_corrupt
        packets.add(packet, pts)
    # The second field of an interlaced picture may come in a packet without a time; other pictures may not.
    if timeless > 1.5 * len(packets.stamps):
        raise VideoError(f"most pictures of {Path(container.name).name} carry no times", "copy it into an mp4 file")
    if damaged:
        warnings.append(f"damaged packets: {damaged}; the pictures near them may be wrong")
    return reached, warnings


def _display_order(stamps: np.ndarray, keys: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The packets of the frames in display order, int32 [frames]."""
    # What comes before the first keyframe, in the file or on the screen, builds on pictures that were cut off.
    first = int(keys.argmax())  # 0 without any
    usable = shown & (stamps >= stamps[first : first + 1])
    usable[:first] = False
    order: np.ndarray = np.flatnonzero(usable).astype(np.int32)
    return order[np.argsort(stamps[order], kind="stable")]


def _seconds(stamps: np.ndarray, time_base: Fraction) -> np.ndarray:
    """From the first of `stamps` to each."""
    return (stamps - stamps[:1].astype(np.int64)) * time_base.numerator / time_base.denominator


def _pace(stamps: np.ndarray, last_length: int, declared: float, time_base: Fraction) -> tuple[float, float]:
    """The frames per second and the seconds that a file lasts, of whose frames `stamps` are the times.

    The declared rate is kept where the frames bear it out, because it is exact where their times are rounded.
    """
    if not last_length:
        last_length = round(np.median(np.diff(stamps))) if len(stamps) > 1 else round(1 / (declared or 25) / time_base)
    duration = float((int(stamps[-1] - stamps[0]) + last_length) * time_base)
    measured = len(stamps) / duration
    return declared if abs(declared - measured) <= 0.01 * measured else measured, duration


def _ends_early(container: av.container.InputContainer, stream: av.VideoStream, reached: float) -> list[str]:
    stated = [float((container.duration or 0) / av.time_base), float((stream.duration or 0) * stream.time_base)]
    if stream.average_rate:
        stated.append(float(stream.frames / stream.average_rate))
    if max(stated) - reached <= max(0.5, 0.01 * max(stated)):
        return []
    return [f"the file ends early, at {format_time(reached)} of {format_time(max(stated))}: the rest is lost"]


def _holes(times: np.ndarray) -> list[str]:
    """Gaps in a video of constant frame rate; in others, long pauses between pictures are as they should be."""
    steps = np.diff(times)
    typical = np.median(steps) if len(steps) else 0.0
    if not len(steps) or np.mean(abs(steps - typical) < 0.25 * typical) < 0.9:
        return []
    holes = np.flatnonzero(steps > max(1.0, 10 * typical))
    return [f"no frames between {format_time(times[i])} and {format_time(times[i + 1])}: they are lost" for i in holes]
