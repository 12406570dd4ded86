"""Small test videos whose frames carry their own number, so that a test can tell *which* frame it was given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

GRID = 4  # 16 blocks: numbers up to 65535


def numbered_frames(count: int, *, width: int = 128, height: int = 96) -> Iterator[np.ndarray]:
    """Frames 0 to count - 1, RGB uint8 [height, width, 3]: the bits of the number as dark and bright blocks.

    The blocks are large, so the number survives encoding and resizing; they are in the four colours of the
    frame's corners, so that a swapped channel shows.
    """
    rows = np.arange(height) * GRID // height
    columns = np.arange(width) * GRID // width
    block = rows[:, None] * GRID + columns[None, :]
    for number in range(count):
        bright = (number >> block) & 1 == 1
        yield np.where(bright[..., None], (250, 200, 150), (10, 40, 70)).astype(np.uint8)


def number_of(image: np.ndarray) -> int:
    """The number that the frame carries; `image` is RGB uint8 [height, width, 3] of any size."""
    height, width, _ = image.shape
    rows = (2 * np.arange(GRID) + 1) * height // (2 * GRID)
    columns = (2 * np.arange(GRID) + 1) * width // (2 * GRID)
    bits = image[np.ix_(rows, columns)].mean(axis=-1).ravel() > 120
    return int(sum(1 << position for position, bit in enumerate(bits) if bit))


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    fps: Fraction | int = 24,
    codec: str = "libx264",
    gop: int = 12,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    audio: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode `frames` (RGB uint8 [height, width, 3]) into `path`, whose suffix says the container; returns `path`.

    `pts` are the frames' times in units of `time_base`, for a variable frame rate or a late start; without them the
    frames are `1 / fps` apart. `rotation` is the display matrix's angle, counter-clockwise, and `mirrored` says
    that the picture was mirrored left to right before. `audio` adds a tone.
    """
    frames = iter(frames)
    first = next(frames)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p" if first.shape[0] % 2 == 0 == first.shape[1] % 2 else "yuv444p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = time_base or 1 / Fraction(fps)
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for number, image in enumerate([first, *frames]):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _mux_tone(container, sound, seconds=2)
    return path


def _mux_tone(container: av.container.OutputContainer, stream: av.AudioStream, *, seconds: int) -> None:
    wave = np.sin(np.arange(16000 * seconds) * 0.1).astype(np.float32)
    for start in range(0, len(wave), 1024):
        chunk = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
        chunk.sample_rate, chunk.pts = 16000, start
        container.mux(stream.encode(chunk))
    container.mux(stream.encode())
