"""What kernels that attend share: which tile a program has, checked loads, and the step of an online softmax."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from rrattention.triton.launch import Launch

LOG2_E = 1 / math.log(2)


@triton.jit
def place(
    kv_start, heads, group, query_length, key_length, BLOCK: tl.constexpr, TILE_M: tl.constexpr, PADDED: tl.constexpr
):
    """Return where the tile of queries of this program lies, in a grid of (group, tiles, batch * key heads).

    batch, key_head, head: of the tile; 64-bit, as all that they are multiplied with.
    row: of the block grid, and query_block, its block of the sequence, which is `length` tokens long.
    tile_position: of its first row in the sequence, and first_row, the query that it is: negative before the first.
    """
    # One group of heads after the other: what runs at a time reads one head's keys and values, and meets in the cache.
    # The last tiles, which have the most to do where attention is causal, go first.
    key_heads = heads // group
    batch, key_head = tl.program_id(2) // key_heads, tl.program_id(2) % key_heads
    head = key_head * group + tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tile // (BLOCK // TILE_M)

    length = key_length
    if PADDED:
        length -= tl.load(kv_start + batch).to(tl.int32)
    first_position = length - query_length  # of query row 0
    query_block = tl.maximum(first_position, 0) // BLOCK + row
    tile_position = query_block * BLOCK + tile % (BLOCK // TILE_M) * TILE_M
    first_row = (tile_position - first_position).to(tl.int64)
    return (
        batch.to(tl.int64),
        key_head.to(tl.int64),
        head.to(tl.int64),
        row,
        length,
        query_block,
        tile_position,
        first_row,
    )


@triton.jit
def load_tile(rows, offsets, inside, CHECKED: tl.constexpr):
    """Load a tile from the pointer `rows` on; elements that are not `inside` are zeros."""
    if CHECKED:
        return tl.load(rows + offsets, mask=inside, other=0.0)
    return tl.load(rows + offsets)


@triton.jit
def online_softmax(query, key, value, state, scale, visible, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Take one tile of keys and values, both [TILE_N, D], into the running sums of a tile of queries [TILE_M, D].

    PRECISION is that of float32 products (three in TF32 are as exact as one in float32); other types do not care.
    """
    weighted_sum, running_sum, running_max = state  # [TILE_M, D], [TILE_M], [TILE_M]
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [TILE_M, TILE_N]
    if MASKED:
        scores = tl.where(visible, scores * scale, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
    else:  # scale is not negative: the scaled maximum is the maximum of the scaled, and one multiply-add does the rest
        new_max = tl.maximum(running_max, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_max[:, None])
    decay = tl.exp2(running_max - new_max)
    weighted_sum = tl.dot(weights.to(value.dtype), value, weighted_sum * decay[:, None], input_precision=PRECISION)
    return weighted_sum, running_sum * decay + tl.sum(weights, axis=1), new_max


def tile_constants(head_dim: int, block_size: int, launch: Launch, *, causal: bool, padded: bool) -> dict[str, Any]:
    """The compile-time constants that say how large a program's tiles are, and which keys its queries may see."""
    return {
        "HEAD_DIM": head_dim,
        "TILE_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK": block_size,
        "TILE_M": launch.tile_m,
        "TILE_N": launch.tile_n,
        "CAUSAL": causal,
        "PADDED": padded,
    }
