"""Draw the sample video that comes with the package: `python -m rrvideo.tiny.sample FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from .drawing import write_video
from .world import World, draw_world


def sample_world() -> World:
    """A minute in five scenes, which between them show every shape and every direction."""
    return draw_world(Random("sample 96"), 60, 5, shortest=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    world = sample_world()
    write_video(world, parser.parse_args().file, width=320, height=240, fps=15)
    for scene in world.scenes:
        print(f"{scene.start:5.1f} s  {scene.name} on {scene.background}, moving {scene.direction}")


if __name__ == "__main__":
    main()
