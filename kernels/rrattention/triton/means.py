"""What stands for blocks that are left out: a mean key and a mean value each, with the weight of as many keys.

`attend` goes first and says, beside its result, how much weight each query gave away; this goes on from there. Means
are one row for a block of keys: all of them together cost hardly more than a few blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rrattention.blocks import BlockSelection
from rrattention.triton.common import LOG2_E, load_tile, online_softmax, place, tile_constants
from rrattention.triton.launch import DTYPES, Launch, Specialization, launch_for
from rrattention.triton.pool import pool

STRIDE = 16  # keys that are averaged at a time: the smallest block


@triton.jit(do_not_specialize=["query_length", "key_length", "query_blocks", "key_blocks", "means"])
def _means_kernel(
    query,
    mean_key,
    mean_value,
    out,
    log_sums,
    indices,
    counts,
    kv_start,
    query_batch_stride,
    query_head_stride,
    query_stride,
    out_batch_stride,
    out_head_stride,
    out_stride,
    heads,
    group,
    query_length,
    key_length,
    query_blocks,
    key_blocks,
    means,
    scale,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Take the means of the blocks that are left out into one tile of queries of one head."""
    batch, key_head, head, row, length, query_block, _, first_row = place(
        kv_start, heads, group, query_length, key_length, BLOCK, TILE_M, PADDED
    )
    dims, rows_m, rows_n = tl.arange(0, TILE_D), tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    real_dims = dims[None, :] < HEAD_DIM
    real_rows = (first_row + rows_m >= 0) & (first_row + rows_m < query_length)
    real = real_rows[:, None] & real_dims

    query += batch * query_batch_stride + head * query_head_stride + first_row * query_stride
    query_tile = tl.load(query + rows_m[:, None] * query_stride + dims[None, :], mask=real, other=0.0)
    out += batch * out_batch_stride + head * out_head_stride + first_row * out_stride
    out += rows_m[:, None] * out_stride + dims[None, :]
    log_sums += (batch * heads + head) * query_length + first_row
    # What was attended to has a weight of one; a mean then has that of its score, and not of BLOCK times as much.
    state = (
        tl.load(out, mask=real, other=0.0).to(tl.float32),
        tl.full([TILE_M], 1.0, tl.float32),
        tl.load(log_sums + rows_m, mask=real_rows, other=0.0) - tl.log2(BLOCK * 1.0),
    )
    first_mean = (batch * (heads // group) + key_head) * means * HEAD_DIM  # means of a key head
    mean_key, mean_value = mean_key + first_mean, mean_value + first_mean
    offsets = rows_n[:, None] * HEAD_DIM + dims[None, :]
    end = length // BLOCK
    if CAUSAL:
        end = tl.minimum(end, query_block)  # the query block's own is listed, and it sees none beyond
    list_row = (batch * heads + head) * query_blocks + row
    listed, count = indices + list_row * key_blocks, tl.load(counts + list_row)
    for start in range(0, end, TILE_N):
        # Lists ascend: what these columns have of theirs lies together, and the next ones have what follows.
        blocks = start + rows_n
        entries = tl.load(listed + rows_n, mask=rows_n < count, other=key_blocks)
        is_listed = tl.max((entries[None, :] == blocks[:, None]).to(tl.int32), axis=1) != 0
        passed = tl.sum((entries < start + TILE_N).to(tl.int32))
        listed, count = listed + passed, count - passed
        inside = (blocks < end)[:, None] & real_dims
        key_tile = load_tile(mean_key + start * HEAD_DIM, offsets, inside, CHECKED=True)
        value_tile = load_tile(mean_value + start * HEAD_DIM, offsets, inside, CHECKED=True)
        visible = ((blocks < end) & ~is_listed)[None, :]
        # A mean is no exact answer anyhow: TF32 will do for it.
        state = online_softmax(query_tile, key_tile, value_tile, state, scale, visible, MASKED=True, PRECISION="tf32")

    weighted_sum, running_sum, _ = state
    tl.store(out, (weighted_sum / running_sum[:, None]).to(out.dtype.element_ty), mask=real)


def specialization(head_dim: int, dtype: torch.dtype, block_size: int, stride: int, launch: Launch) -> Specialization:
    """Return what the compiler needs for the kernel as a causal prefill launches it; see `Specialization`."""
    launch = launch.within(block_size)
    signature = dict.fromkeys(("query", "mean_key", "mean_value", "out"), f"*{DTYPES[dtype]}:16")
    signature |= {"log_sums": "*fp32:16", "indices": "*i32:16", "counts": "*i32:16", "scale": "fp32"}
    signature |= {name: "i32:16" for name in _means_kernel.arg_names if name.endswith("_stride")}
    integers = ("heads", "group", "query_length", "key_length", "query_blocks", "key_blocks", "means")
    signature |= dict.fromkeys(integers, "i32")
    constants = tile_constants(head_dim, block_size, launch, causal=True, padded=False)
    return Specialization(_means_kernel, signature, constants | {"kv_start": None}, launch)


def add_means(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, selection: BlockSelection, *, scale: float
) -> None:
    """Add to `out`, attention over the listed blocks, the means of whole blocks that are visible and not listed.

    Tensors as in `attend`; log_sums [B, H, Lq] float32 is the logarithm, to base 2, of the weight that each query gave.
    """
    grid = selection.grid
    whole = grid.key_length // grid.block_size  # blocks, at most
    if whole == 0:
        return
    launch = launch_for("means", query, query.shape[3]).within(grid.block_size)
    mean_key, mean_value = (_block_means(x, selection, whole) for x in (key, value))
    batch, heads, query_length, head_dim = query.shape
    group, tiles = heads // key.shape[1], grid.query_blocks * (grid.block_size // launch.tile_m)
    _means_kernel[group, tiles, batch * key.shape[1]](
        query,
        mean_key,
        mean_value,
        out,
        log_sums,
        selection.indices.contiguous(),
        selection.counts.contiguous(),
        None if grid.kv_start is None else grid.kv_start.contiguous(),
        *query.stride()[:3],
        *out.stride()[:3],
        heads,
        group,
        query_length,
        grid.key_length,
        grid.query_blocks,
        grid.key_blocks,
        whole,
        scale * LOG2_E,
        **tile_constants(head_dim, grid.block_size, launch, causal=grid.causal, padded=grid.kv_start is not None),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _block_means(rows: Tensor, selection: BlockSelection, blocks: int) -> Tensor:
    """The mean row of each of the first `blocks` blocks, [B, K, blocks, D]; those of a sequence's end mean nothing."""
    grid = selection.grid
    parts = pool(rows, grid, stride=STRIDE)[:, :, : blocks * (grid.block_size // STRIDE)]
    return parts.unflatten(2, (blocks, -1)).mean(dim=3, dtype=torch.float32).to(rows.dtype)
