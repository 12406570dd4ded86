"""Mean keys: one pass over K, from [batch, kv_heads, Lk, D] to [batch, kv_heads, Lk / stride, D]."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rrattention.blocks import BlockGrid
from rrattention.triton.launch import DTYPES, Launch, Specialization, launch_for


@triton.jit(do_not_specialize=["key_length", "strides"])
def _pool_kernel(
    key,
    pooled,
    kv_start,
    key_length,
    strides,
    key_batch_stride,
    key_head_stride,
    key_stride,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Average TILE_M strides of keys of one key head."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = 0
    if PADDED:
        start = tl.load(kv_start + batch).to(tl.int32)
    dims = tl.arange(0, TILE_D)[None, :]
    columns = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)[:, None]

    key += batch * key_batch_stride + head * key_head_stride
    total = tl.zeros([TILE_M, TILE_D], tl.float32)
    for member in tl.static_range(STRIDE):  # rows past the last key count as zeros
        rows = start + columns * STRIDE + member
        inside = (rows < key_length) & (dims < HEAD_DIM)
        total += tl.load(key + rows.to(tl.int64) * key_stride + dims, mask=inside, other=0.0).to(tl.float32)

    pooled += (batch * tl.num_programs(1) + head) * strides * HEAD_DIM
    mean = (total / STRIDE).to(pooled.dtype.element_ty)
    tl.store(pooled + columns * HEAD_DIM + dims, mean, mask=(columns < strides) & (dims < HEAD_DIM))


def _constants(head_dim: int, stride: int, launch: Launch, *, padded: bool) -> dict[str, Any]:
    return {
        "STRIDE": stride,
        "HEAD_DIM": head_dim,
        "TILE_M": launch.tile_m,
        "TILE_D": triton.next_power_of_2(head_dim),
        "PADDED": padded,
    }


def specialization(head_dim: int, dtype: torch.dtype, block_size: int, stride: int, launch: Launch) -> Specialization:
    """Return what the compiler needs for the kernel as an unpadded call launches it; see `Specialization`."""
    pointer = f"*{DTYPES[dtype]}:16"
    signature = {"key": pointer, "pooled": pointer, "key_length": "i32", "strides": "i32"}
    signature |= {name: "i32:16" for name in _pool_kernel.arg_names if name.endswith("_stride")}
    constants = _constants(head_dim, stride, launch, padded=False)
    return Specialization(_pool_kernel, signature, constants | {"kv_start": None}, launch)


def pool(key: Tensor, grid: BlockGrid, *, stride: int) -> Tensor:
    """Average the keys of every stride, counted from each sequence's first valid key, in float32.

    key [B, K, Lk, D] with rows of any stride; returns [B, K, ceil(Lk / stride), D] in its dtype. A stride that the
    sequence ends in is averaged as if zeros followed, and those after it are zeros.
    """
    batch, heads, key_length, head_dim = key.shape
    key = key if key.stride(3) == 1 else key.contiguous()
    launch = launch_for("pool", key, head_dim)
    strides = -(-key_length // stride)
    pooled = torch.empty(batch, heads, strides, head_dim, dtype=key.dtype, device=key.device)
    _pool_kernel[triton.cdiv(strides, launch.tile_m), heads, batch](
        key,
        pooled,
        None if grid.kv_start is None else grid.kv_start.contiguous(),
        key_length,
        strides,
        *key.stride()[:3],
        **_constants(head_dim, stride, launch, padded=grid.kv_start is not None),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return pooled
