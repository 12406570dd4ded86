"""Launch configurations: tile sizes, warps and pipeline stages of each kernel, one table for all architectures.

`kernels/benchmarks/autotune.py` prints the lines of `TABLE` for the GPU that it runs on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}  # Triton's names


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is launched.

    tile_m, tile_n: rows and columns of a program's tile at most; where blocks are smaller, tiles are.
    num_warps, num_stages: warps of a program, and how many loads of its loop are in flight.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int

    def within(self, block_size: int) -> Launch:
        """Return this launch with tiles that fit into a block; fewer rows need fewer warps."""
        tile_m = min(self.tile_m, block_size)
        num_warps = max(1, self.num_warps * tile_m // self.tile_m)
        return Launch(tile_m, min(self.tile_n, block_size), num_warps, self.num_stages)


class Specialization(NamedTuple):
    """What the compiler needs to compile a kernel with no GPU present, as `triton.tools.compile` writes it.

    signature: the type of each argument that is not a constant: "*bf16:16" is a pointer and "i64:16" an integer that 16
        divides, "i32" one of which nothing is known.
    constants: the value of each `tl.constexpr`.
    launch: the warps and stages that the kernel is launched with.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Launch


# Gluon is experimental: these versions of Triton have the one that `hopper.py` is written in.
GLUON_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")

# Architecture (its name covers those up to the next), then (kernel, head dims up to, bits of an element).
TABLE: dict[int, dict[tuple[str, int, int], Launch]] = {
    80: {
        ("pool", 256, 16): Launch(32, 1, 4, 1),
        ("pool", 256, 32): Launch(32, 1, 4, 1),
        ("estimate", 64, 16): Launch(128, 64, 8, 3),
        ("estimate", 128, 16): Launch(128, 64, 8, 3),
        ("estimate", 256, 16): Launch(64, 64, 8, 2),
        ("estimate", 64, 32): Launch(64, 64, 4, 2),
        ("estimate", 128, 32): Launch(64, 32, 8, 2),
        ("estimate", 256, 32): Launch(32, 32, 4, 2),
        ("select", 256, 32): Launch(1, 1024, 4, 1),
        ("attend", 64, 16): Launch(128, 64, 8, 3),
        ("attend", 128, 16): Launch(128, 32, 8, 3),
        ("attend", 256, 16): Launch(64, 64, 8, 2),
        ("attend", 64, 32): Launch(64, 32, 8, 2),
        ("attend", 128, 32): Launch(16, 32, 8, 2),
        ("attend", 256, 32): Launch(16, 16, 8, 2),
        ("means", 128, 16): Launch(128, 32, 8, 2),
        ("means", 256, 16): Launch(64, 32, 8, 2),
        ("means", 128, 32): Launch(16, 32, 8, 2),
        ("means", 256, 32): Launch(16, 16, 8, 2),
        ("segments", 256, 16): Launch(64, 64, 4, 2),
        ("segments", 256, 32): Launch(64, 32, 8, 2),
    },
    86: {
        ("pool", 256, 16): Launch(32, 1, 4, 1),
        ("pool", 256, 32): Launch(32, 1, 4, 1),
        ("estimate", 64, 16): Launch(128, 64, 8, 3),
        ("estimate", 128, 16): Launch(128, 64, 8, 3),
        ("estimate", 256, 16): Launch(64, 64, 8, 2),
        ("estimate", 64, 32): Launch(64, 64, 4, 2),
        ("estimate", 128, 32): Launch(64, 32, 8, 2),
        ("estimate", 256, 32): Launch(32, 32, 4, 2),
        ("select", 256, 32): Launch(1, 1024, 4, 1),
        ("attend", 64, 16): Launch(128, 64, 8, 3),
        ("attend", 128, 16): Launch(128, 32, 8, 3),
        ("attend", 256, 16): Launch(64, 32, 8, 2),
        ("attend", 64, 32): Launch(64, 32, 8, 2),
        ("attend", 128, 32): Launch(16, 32, 8, 2),
        ("attend", 256, 32): Launch(16, 16, 8, 2),
        ("means", 128, 16): Launch(128, 32, 8, 2),
        ("means", 256, 16): Launch(64, 32, 8, 2),
        ("means", 128, 32): Launch(16, 32, 8, 2),
        ("means", 256, 32): Launch(16, 16, 8, 2),
        ("segments", 256, 16): Launch(64, 64, 4, 2),
        ("segments", 256, 32): Launch(64, 32, 8, 2),
    },
    90: {
        ("pool", 256, 16): Launch(32, 1, 4, 1),
        ("pool", 256, 32): Launch(32, 1, 4, 1),
        ("estimate", 64, 16): Launch(128, 64, 8, 3),
        ("estimate", 128, 16): Launch(128, 64, 8, 3),
        ("estimate", 256, 16): Launch(64, 64, 8, 2),
        ("estimate", 64, 32): Launch(64, 64, 4, 2),
        ("estimate", 128, 32): Launch(64, 32, 8, 2),
        ("estimate", 256, 32): Launch(64, 32, 8, 2),
        ("select", 256, 32): Launch(1, 1024, 4, 1),
        ("attend", 64, 16): Launch(128, 128, 8, 3),
        ("attend", 128, 16): Launch(128, 64, 8, 3),
        ("attend", 256, 16): Launch(64, 64, 8, 2),
        ("attend", 64, 32): Launch(64, 32, 8, 2),
        ("attend", 128, 32): Launch(16, 32, 8, 2),
        ("attend", 256, 32): Launch(16, 16, 8, 2),
        ("means", 128, 16): Launch(64, 32, 4, 3),
        ("means", 256, 16): Launch(64, 32, 8, 2),
        ("means", 128, 32): Launch(16, 32, 8, 2),
        ("means", 256, 32): Launch(16, 16, 8, 2),
        ("hopper", 64, 16): Launch(128, 128, 4, 4),  # in place of "attend"; warps of each of two groups
        ("hopper", 128, 16): Launch(128, 128, 4, 2),
        ("segments", 256, 16): Launch(64, 64, 4, 2),
        ("segments", 256, 32): Launch(64, 32, 8, 2),
    },
    100: {
        ("pool", 256, 16): Launch(32, 1, 4, 1),
        ("pool", 256, 32): Launch(32, 1, 4, 1),
        ("estimate", 64, 16): Launch(128, 64, 8, 3),
        ("estimate", 128, 16): Launch(128, 64, 8, 3),
        ("estimate", 256, 16): Launch(64, 64, 8, 2),
        ("estimate", 64, 32): Launch(64, 64, 4, 2),
        ("estimate", 128, 32): Launch(64, 32, 8, 2),
        ("estimate", 256, 32): Launch(32, 32, 4, 2),
        ("select", 256, 32): Launch(1, 1024, 4, 1),
        ("attend", 64, 16): Launch(128, 128, 8, 3),
        ("attend", 128, 16): Launch(128, 64, 8, 3),
        ("attend", 256, 16): Launch(64, 32, 8, 2),
        ("attend", 64, 32): Launch(64, 32, 8, 2),
        ("attend", 128, 32): Launch(16, 32, 8, 2),
        ("attend", 256, 32): Launch(16, 16, 8, 2),
        ("means", 128, 16): Launch(128, 32, 8, 2),
        ("means", 256, 16): Launch(64, 32, 8, 2),
        ("means", 128, 32): Launch(16, 32, 8, 2),
        ("means", 256, 32): Launch(16, 16, 8, 2),
        ("segments", 256, 16): Launch(64, 64, 4, 2),
        ("segments", 256, 32): Launch(64, 32, 8, 2),
    },
    120: {
        ("pool", 256, 16): Launch(32, 1, 4, 1),
        ("pool", 256, 32): Launch(32, 1, 4, 1),
        ("estimate", 64, 16): Launch(128, 64, 8, 3),
        ("estimate", 128, 16): Launch(128, 64, 8, 3),
        ("estimate", 256, 16): Launch(64, 64, 8, 2),
        ("estimate", 64, 32): Launch(64, 64, 4, 2),
        ("estimate", 128, 32): Launch(64, 32, 8, 2),
        ("estimate", 256, 32): Launch(32, 32, 4, 2),
        ("select", 256, 32): Launch(1, 1024, 4, 1),
        ("attend", 64, 16): Launch(128, 64, 8, 3),
        ("attend", 128, 16): Launch(128, 32, 8, 3),
        ("attend", 256, 16): Launch(64, 32, 8, 2),
        ("attend", 64, 32): Launch(64, 32, 8, 2),
        ("attend", 128, 32): Launch(16, 32, 8, 2),
        ("attend", 256, 32): Launch(16, 16, 8, 2),
        ("means", 128, 16): Launch(128, 32, 8, 2),
        ("means", 256, 16): Launch(64, 32, 8, 2),
        ("means", 128, 32): Launch(16, 32, 8, 2),
        ("means", 256, 32): Launch(16, 16, 8, 2),
        ("segments", 256, 16): Launch(64, 64, 4, 2),
        ("segments", 256, 32): Launch(64, 32, 8, 2),
    },
}


def launch_for(kernel: str, like: Tensor, head_dim: int = 1) -> Launch:
    """Return the launch of `kernel` for tensors of the device and dtype of `like`.

    Kernels that know no head dim leave it out. CPU tensors, which the interpreter takes, get any entry. ValueError: no
    entry covers the dtype, the head dim or the GPU.
    """
    launches = TABLE[_architecture_of(like.device.index) if like.is_cuda else 80]
    return launches[key_for(launches, kernel, head_dim, like.dtype)]


def takes_gluon(like: Tensor) -> bool:
    """Whether `hopper.py` can be imported and run for tensors of the device of `like`."""
    hopper = like.is_cuda and _architecture_of(like.device.index) == 90
    return hopper and triton.__version__.startswith(GLUON_VERSIONS)


def key_for(
    launches: Mapping[tuple[str, int, int], Launch], kernel: str, head_dim: int, dtype: torch.dtype
) -> tuple[str, int, int]:
    """Return which of one architecture's `launches` is meant: that of the smallest head dim that covers `head_dim`."""
    if dtype not in DTYPES:
        raise ValueError(f"Triton kernels take float16, bfloat16 or float32, got {dtype}")
    bits = 8 * dtype.itemsize
    covering = [dim for name, dim, width in launches if (name, width) == (kernel, bits) and dim >= head_dim]
    if not covering:
        raise ValueError(f"{kernel} has no launch for head dim {head_dim} in {dtype}")
    return kernel, min(covering), bits


@cache
def _architecture_of(device_index: int) -> int:
    """The newest architecture of the table that is no newer than the GPU's."""
    major, minor = torch.cuda.get_device_capability(device_index)
    covering = [each for each in TABLE if each <= 10 * major + minor]
    if not covering:
        raise ValueError(f"Triton kernels need compute capability 8.0 or newer, got {major}.{minor}")
    return max(covering)
