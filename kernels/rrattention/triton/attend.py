"""Attention over listed blocks: a FlashAttention-style loop over each query block's ascending list of key blocks.

A program holds one tile of queries of one head. What needs a mask (the diagonal, the sequence's last block) can only be
the last block of a list: that one goes first, and all the others go through a loop without masks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rrattention.blocks import BlockSelection
from rrattention.config import Skipped
from rrattention.triton.common import LOG2_E, load_tile, online_softmax, place, tile_constants
from rrattention.triton.launch import DTYPES, Launch, Specialization, launch_for, takes_gluon
from rrattention.triton.means import add_means


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
    log_sums,
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
    LOG_SUMS: tl.constexpr,
):
    batch, key_head, head, row, length, _, tile_position, first_row = place(
        kv_start, heads, group, query_length, key_length, BLOCK, TILE_M, PADDED
    )
    list_row = (batch * heads + head) * query_blocks + row
    listed = indices + list_row * key_blocks
    count = tl.load(counts + list_row)

    # Pointers to position 0 of the sequence, 64-bit; offsets inside a tile, 32-bit.
    dims = tl.arange(0, TILE_D)
    rows_m, rows_n = tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    real_dims = dims[None, :] < HEAD_DIM
    first_key = batch * key_batch_stride + key_head * key_head_stride + (key_length - length).to(tl.int64) * key_stride
    key, value = key + first_key, value + first_key  # laid out alike
    offsets = rows_n[:, None] * key_stride + dims[None, :]

    # A tile may begin before the first query (after an uneven prefix) and end after the last.
    real_rows = (first_row + rows_m >= 0) & (first_row + rows_m < query_length)
    real_queries = real_rows[:, None] & real_dims
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
        key_tile = load_tile(key + start.to(tl.int64) * key_stride, offsets, inside, CHECKED=True)
        value_tile = load_tile(value + start.to(tl.int64) * key_stride, offsets, inside, CHECKED=True)
        state = online_softmax(query_tile, key_tile, value_tile, state, scale, visible, MASKED=True, PRECISION="tf32x3")

    parts: tl.constexpr = BLOCK // TILE_N
    block = tl.load(listed)
    for step in range((count - 1) * parts):
        start = (block * BLOCK + step % parts * TILE_N).to(tl.int64)
        block = tl.load(listed + (step + 1) // parts)  # early: the next addresses wait for it
        key_tile = load_tile(key + start * key_stride, offsets, real_dims, CHECKED=TILE_D != HEAD_DIM)
        value_tile = load_tile(value + start * key_stride, offsets, real_dims, CHECKED=TILE_D != HEAD_DIM)
        state = online_softmax(
            query_tile, key_tile, value_tile, state, scale, real_dims, MASKED=False, PRECISION="tf32x3"
        )

    weighted_sum, running_sum, running_max = state
    running_sum = tl.where(running_sum == 0, 1.0, running_sum)  # of rows that see nothing
    result = weighted_sum / running_sum[:, None]
    out += batch * out_batch_stride + head * out_head_stride + first_row * out_stride
    tl.store(out + rows_m[:, None] * out_stride + dims[None, :], result.to(out.dtype.element_ty), mask=real_queries)
    if LOG_SUMS:
        log_sums += (batch * heads + head) * query_length + first_row
        tl.store(log_sums + rows_m, running_max + tl.log2(running_sum), mask=real_rows)


def specialization(head_dim: int, dtype: torch.dtype, block_size: int, stride: int, launch: Launch) -> Specialization:
    """Return what the compiler needs for the kernel as a causal prefill launches it; see `Specialization`.

    Every kernel file has this function, for the compilation gate. `launch` comes from the table as it is, `stride` is
    that of the estimate.
    """
    launch = launch.within(block_size)
    pointer = f"*{DTYPES[dtype]}:16"
    signature = dict.fromkeys(("query", "key", "value", "out"), pointer)
    signature |= {"indices": "*i32:16", "counts": "*i32:16", "log_sums": "*fp32:16"}
    signature |= {name: "i32:16" for name in _attend_kernel.arg_names if name.endswith("_stride")}
    signature |= dict.fromkeys(("heads", "group", "query_length", "key_length", "query_blocks", "key_blocks"), "i32")
    signature |= {"scale": "fp32"}
    constants = tile_constants(head_dim, block_size, launch, causal=True, padded=False)
    return Specialization(_attend_kernel, signature, constants | {"LOG_SUMS": True, "kv_start": None}, launch)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float,
    skipped: Skipped = "dropped",
) -> Tensor:
    """Softmax attention of each query block over its listed blocks, in float32, as `reference.attend`.

    query [B, H, Lq, D], key and value [B, K, Lk, D] in float16, bfloat16 or float32, any strides. The lists are
    ascending, as `BlockSelection` says. Returns [B, H, Lq, D] in the layout of `query`; rows that see no key are zeros.
    ValueError: there is no launch for the dtype, head dim or GPU, or the block size is no power of two from 16 on.
    """
    grid = selection.grid
    if grid.block_size < 16 or grid.block_size & (grid.block_size - 1):
        raise ValueError(f"block_size must be a power of two of at least 16, got {grid.block_size}")
    if scale < 0:  # the kernel takes the maximum before it scales
        query, scale = -query, -scale
    query = query if query.stride(3) == 1 else query.contiguous()
    if key.stride(3) != 1 or key.stride() != value.stride():
        key, value = key.contiguous(), value.contiguous()
    # Padding rows belong to no query block: no program writes them.
    out = torch.empty_like(query) if grid.kv_start is None else torch.zeros_like(query)
    log_sums = query.new_empty(query.shape[:3], dtype=torch.float32) if skipped == "pooled" else None
    launch = _launch
    if takes_gluon(query):
        from rrattention.triton import hopper

        if hopper.covers(query, key, value, grid):
            launch = hopper.attend
    launch(query, key, value, out, log_sums, selection, scale=scale)
    if log_sums is not None:
        add_means(query, key, value, out, log_sums, selection, scale=scale)
    return out


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sums: Tensor | None,
    selection: BlockSelection,
    *,
    scale: float,
) -> None:
    """Fill `out`, laid out as `query`, and where they are wanted `log_sums`; `scale` is not negative."""
    grid = selection.grid
    launch = launch_for("attend", query, query.shape[3]).within(grid.block_size)
    batch, heads, query_length, head_dim = query.shape
    group, tiles = heads // key.shape[1], grid.query_blocks * (grid.block_size // launch.tile_m)
    _attend_kernel[group, tiles, batch * key.shape[1]](
        query,
        key,
        value,
        out,
        selection.indices.contiguous(),
        selection.counts.contiguous(),
        None if grid.kv_start is None else grid.kv_start.contiguous(),
        log_sums,
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
        LOG_SUMS=log_sums is not None,
        **tile_constants(head_dim, grid.block_size, launch, causal=grid.causal, padded=grid.kv_start is not None),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
