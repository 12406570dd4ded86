"""Show the embedded model's world: draw it at any moment, size and device, or write it to a video file.

Training, tests and samples all see the world through here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, World

__all__ = ["parameters", "render", "write_video"]

CROSSING = 8.0  # seconds: where a scene lasts longer, its shape starts again, so that its motion shows at any length


def parameters(world: World, times: Sequence[float]) -> np.ndarray:
    """What each frame shows, as numbers: [frames, 10] of colour (3), background (3), shape, x, y, radius."""
    rows = []
    scenes = iter(world.scenes)
    scene = next(scenes)
    for time in times:
        while time >= scene.end - 1e-6 and scene is not world.scenes[-1]:
            scene = next(scenes)
        progress = (time - scene.start) / min(CROSSING, scene.end - scene.start) % 1 - 0.5
        right, down = DIRECTIONS[scene.direction]
        x, y = scene.x + right * progress * scene.travel, scene.y + down * progress * scene.travel
        shape = SHAPES.index(scene.shape)
        rows.append((*COLOURS[scene.colour], *BACKGROUNDS[scene.background], shape, x, y, scene.radius))
    return np.asarray(rows, dtype=np.float32)


def render(
    frames: torch.Tensor,
    height: int,
    width: int,
    *,
    softness: float | torch.Tensor = 1.0,
    stretch: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Draw frames from their `parameters` [..., 10]: float RGB in 0..255, [..., height, width, 3], on their device.

    `softness` is the width of the shapes' edges in pixels; `stretch` makes shapes that much wider than high, as a
    resize to a multiple of 28 pixels does.
    """
    colour, background, shape, x, y, radius = frames[..., None, None, :].split((3, 3, 1, 1, 1, 1), dim=-1)
    rows = torch.arange(height, device=frames.device, dtype=frames.dtype)[:, None, None] + 0.5
    columns = torch.arange(width, device=frames.device, dtype=frames.dtype)[None, :, None] + 0.5
    down, right = rows - y * height, (columns - x * width) / stretch
    distance = torch.hypot(down, right)
    angle = torch.atan2(down, right) + math.pi / 2  # from straight up, where every shape points
    size = radius * torch.as_tensor(width / stretch).clamp(max=height)
    coverage = ((_boundary(shape, angle) * size - distance) / softness + 0.5).clamp(0, 1)
    return background + (colour - background) * coverage


def _boundary(shape: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """How far from its centre each shape reaches in the direction of `angle`, for a radius of about 1."""
    square = math.cos(math.pi / 4) / torch.cos(_fold(angle, 4)) * 1.2
    triangle = math.cos(math.pi / 3) / torch.cos(_fold(angle + math.pi / 3, 3)) * 1.25
    # A star's edge is the straight line from a tip (1, 0) to a notch.
    notch_x, notch_y = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    side = _fold(angle, 5).abs()
    star = notch_y / (notch_y * torch.cos(side) + (1 - notch_x) * torch.sin(side)) * 1.3
    radii = torch.where(shape == SHAPES.index("square"), square, torch.ones_like(angle))
    radii = torch.where(shape == SHAPES.index("triangle"), triangle, radii)
    return torch.where(shape == SHAPES.index("star"), star, radii)


def _fold(angle: torch.Tensor, corners: int) -> torch.Tensor:
    """Bring an angle into the sector around its nearest multiple of a turn / corners."""
    sector = 2 * math.pi / corners
    return angle - sector * torch.round(angle / sector)


def write_video(world: World, path: str | Path, *, width: int, height: int, fps: int = 25, gop: int = 50) -> None:
    """Encode the world as H.264 (4:2:0, x264's default quality) at the given size and frame rate."""
    import av

    times = world.scenes[0].start + np.arange(round(world.duration * fps)) / fps
    described = torch.from_numpy(parameters(world, times.tolist()))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"g": str(gop), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        with _one_thread():
            for frame in described:
                picture = render(frame, height, width).round().to(torch.uint8).numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Do without other threads: a frame is many small steps, in each of which they would wait for one another.

    Where other programs keep the cores busy, that was measured to take a hundred times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
