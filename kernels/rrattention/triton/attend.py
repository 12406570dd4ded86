"""Attention over listed blocks: a FlashAttention-style loop over each query block's ascending list of key blocks.

A program holds one tile of queries of one head. What needs a mask (the diagonal, the sequence's last block) can only be
the last block of a list: that one goes first, and all the others go through a loop without masks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rrattention.blocks import BlockSelection
from rrattention.triton.launch import DTYPES, Launch, Specialization, launch_for

LOG2_E = 1 / math.log(2)


@triton.jit
def _load_tile(rows, offsets, inside, CHECKED: tl.constexpr):
    """Load a tile from the pointer `rows` on; elements that are not `inside` are zeros."""
    if CHECKED:
        return tl.load(rows + offsets, mask=inside, other=0.0)
    return tl.load(rows + offsets)


@triton.jit
def _online_softmax(query, key, value, state, scale, visible, MASKED: tl.constexpr):
    """Take one tile of keys and values, both [TILE_N, D], into the running sums of a tile of queries [TILE_M, D]."""
    weighted_sum, running_sum, running_max = state  # [TILE_M, D], [TILE_M], [TILE_M]
    # Three TF32 products are as exact as one in float32; the setting means nothing to other types.
    scores = tl.dot(query, tl.trans(key), input_precision="tf32x3")  # [TILE_M, TILE_N]
    if MASKED:
        scores = tl.where(visible, scores * scale, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
    else:  # scale is not negative: the scaled maximum is the maximum of the scaled, and one multiply-add does the rest
        new_max = tl.maximum(running_max, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_max[:, None])
    decay = tl.exp2(running_max - new_max)
    weighted_sum = tl.dot(weights.to(value.dtype), value, weighted_sum * decay[:, None], input_precision="tf32x3")
    return weighted_sum, running_sum * decay + tl.sum(weights, axis=1), new_max


# Lengths change from call to call: no new kernel for those that 16 divides, or that are 1.
@triton.jit(do_not_specialize=["query_length", "key_length", "query_blocks", "key_blocks"])
def _attend_kernel(
    query,
    key,
    value,
    out,
    indices,
    counts,
    kv_start,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    out_batch_stride,
    out_head_stride,
    out_stride,
    heads,
    group,
    query_length,
    key_length,
    query_blocks,
    key_blocks,
    scale,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,  # HEAD_DIM or the next power of two
    BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
):
    # One group of heads after the other: what runs at a time reads one head's keys and values, and meets in the cache.
    # The last tiles, which have the most to do where attention is causal, go first.
    key_heads = heads // group
    batch, key_head = tl.program_id(2) // key_heads, tl.program_id(2) % key_heads
    head = key_head * group + tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tile // (BLOCK // TILE_M)  # of the block grid

    length = key_length
    if PADDED:
        length -= tl.load(kv_start + batch).to(tl.int32)
    first_position = length - query_length  # of query row 0
    query_block = tl.maximum(first_position, 0) // BLOCK + row
    tile_position = query_block * BLOCK + tile % (BLOCK // TILE_M) * TILE_M

    list_row = (batch * heads + head).to(tl.int64) * query_blocks + row
    listed = indices + list_row * key_blocks
    count = tl.load(counts + list_row)

    # Pointers to position 0 of the sequence, 64-bit; offsets inside a tile, 32-bit.
    dims = tl.arange(0, TILE_D)
    rows_m, rows_n = tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    real_dims = dims[None, :] < HEAD_DIM
    batch, key_head, first_key = batch.to(tl.int64), key_head.to(tl.int64), (key_length - length).to(tl.int64)
    first_key = batch * key_batch_stride + key_head * key_head_stride + first_key * key_stride
    key, value = key + first_key, value + first_key  # laid out alike
    offsets = rows_n[:, None] * key_stride + dims[None, :]

    # A tile may begin before the first query (after an uneven prefix) and end after the last.
    first_row = tile_position - first_position
    real_queries = ((first_row + rows_m >= 0) & (first_row + rows_m < query_length))[:, None] & real_dims
    first_row, head = first_row.to(tl.int64), head.to(tl.int64)
    query += batch * query_batch_stride + head * query_head_stride + first_row * query_stride
    query_tile = tl.load(query + rows_m[:, None] * query_stride + dims[None, :], mask=real_queries, other=0.0)

    # The first maximum is finite so that rows that see nothing yet need no special case: exp2(-inf - finite) is 0.
    state = (
        tl.zeros([TILE_M, TILE_D], tl.float32),
        tl.zeros([TILE_M], tl.float32),
        tl.full([TILE_M], -1e38, tl.float32),
    )
    # The last block of the list, up to the last key that a query of this tile sees.
    block = tl.load(listed + tl.maximum(count - 1, 0))
    end = tl.minimum((block + 1) * BLOCK, length)
    if CAUSAL:
        end = tl.minimum(end, tile_position + TILE_M)
    for offset in range(0, tl.where(count > 0, end - block * BLOCK, 0), TILE_N):
        start = block * BLOCK + offset
        positions = start + rows_n
        inside = (positions < length)[:, None] & real_dims
        if CAUSAL:  # real queries lie inside the sequence, and so does what they may see
            visible = (start - tile_position + rows_n)[None, :] <= rows_m[:, None]
        else:
            visible = (positions < length)[None, :]
        key_tile = _load_tile(key + start.to(tl.int64) * key_stride, offsets, inside, CHECKED=True)
        value_tile = _load_tile(value + start.to(tl.int64) * key_stride, offsets, inside, CHECKED=True)
        state = _online_softmax(query_tile, key_tile, value_tile, state, scale, visible, MASKED=True)

    parts: tl.constexpr = BLOCK // TILE_N
    block = tl.load(listed)
    for step in range((count - 1) * parts):
        start = (block * BLOCK + step % parts * TILE_N).to(tl.int64)
        block = tl.load(listed + (step + 1) // parts)  # early: the next addresses wait for it
        key_tile = _load_tile(key + start * key_stride, offsets, real_dims, CHECKED=TILE_D != HEAD_DIM)
        value_tile = _load_tile(value + start * key_stride, offsets, real_dims, CHECKED=TILE_D != HEAD_DIM)
        state = _online_softmax(query_tile, key_tile, value_tile, state, scale, real_dims, MASKED=False)

    weighted_sum, running_sum, _ = state
    result = weighted_sum / tl.where(running_sum == 0, 1.0, running_sum)[:, None]
    out += batch * out_batch_stride + head * out_head_stride + first_row * out_stride
    tl.store(out + rows_m[:, None] * out_stride + dims[None, :], result.to(out.dtype.element_ty), mask=real_queries)


def _constants(head_dim: int, block_size: int, launch: Launch, *, causal: bool, padded: bool) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim,
        "TILE_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK": block_size,
        "TILE_M": launch.tile_m,
        "TILE_N": launch.tile_n,
        "CAUSAL": causal,
        "PADDED": padded,
    }


def specialization(head_dim: int, dtype: torch.dtype, block_size: int, stride: int, launch: Launch) -> Specialization:
    """Return what the compiler needs for the kernel as a causal prefill launches it; see `Specialization`.

    Every kernel file has this function, for the compilation gate. `launch` comes from the table as it is, `stride` is
    that of the estimate.
    """
    launch = launch.within(block_size)
    pointer = f"*{DTYPES[dtype]}:16"
    signature = dict.fromkeys(("query", "key", "value", "out"), pointer)
    signature |= {"indices": "*i32:16", "counts": "*i32:16"}
    signature |= {name: "i32:16" for name in _attend_kernel.arg_names if name.endswith("_stride")}
    signature |= dict.fromkeys(("heads", "group", "query_length", "key_length", "query_blocks", "key_blocks"), "i32")
    signature |= {"scale": "fp32"}
    constants = _constants(head_dim, block_size, launch, causal=True, padded=False)
    return Specialization(_attend_kernel, signature, constants | {"kv_start": None}, launch)


def attend(query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, *, scale: float) -> Tensor:
    """Softmax attention of each query block over its listed blocks, in float32, as `reference.attend`.

    query [B, H, Lq, D], key and value [B, K, Lk, D] in float16, bfloat16 or float32, any strides. The lists are
    ascending, as `BlockSelection` says. Returns [B, H, Lq, D] in the layout of `query`; rows that see no key are zeros.
    ValueError: there is no launch for the dtype, head dim or GPU, or the block size is no power of two from 16 on.
    """
    grid = selection.grid
    if grid.block_size < 16 or grid.block_size & (grid.block_size - 1):
        raise ValueError(f"block_size must be a power of two of at least 16, got {grid.block_size}")
    launch = launch_for("attend", query, query.shape[3]).within(grid.block_size)
    if scale < 0:  # the kernel takes the maximum before it scales
        query, scale = -query, -scale
    query = query if query.stride(3) == 1 else query.contiguous()
    if key.stride(3) != 1 or key.stride() != value.stride():
        key, value = key.contiguous(), value.contiguous()
    # Padding rows belong to no query block: no program writes them.
    out = torch.empty_like(query) if grid.kv_start is None else torch.zeros_like(query)
    indices, counts = selection.indices.contiguous(), selection.counts.contiguous()

    batch, heads, query_length, head_dim = query.shape
    group, tiles = heads // key.shape[1], grid.query_blocks * (grid.block_size // launch.tile_m)
    _attend_kernel[group, tiles, batch * key.shape[1]](
        query,
        key,
        value,
        out,
        indices,
        counts,
        None if grid.kv_start is None else grid.kv_start.contiguous(),
        *query.stride()[:3],
        *key.stride()[:3],
        *out.stride()[:3],
        heads,
        group,
        query_length,
        key.shape[2],
        grid.query_blocks,
        grid.key_blocks,
        scale * LOG2_E,
        **_constants(head_dim, grid.block_size, launch, causal=grid.causal, padded=grid.kv_start is not None),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out
