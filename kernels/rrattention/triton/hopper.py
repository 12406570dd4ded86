"""`attend` on Hopper GPUs, in Gluon: one warp fetches keys and values, and two groups of four warps attend to them.

In the Triton kernel the matrix units wait while it exponentiates. Here each group has one half of a block's queries and
goes at its own pace: while one exponentiates, the other's products run. Both read a ring of tiles in shared memory that
the copy engine fills: keys of a listed block, its values, keys of the next block, and so on. Each slot of the ring has
two barriers: with `ready` the engine says that its tile is there, with `free` the groups say that they have read it.

Programs, their order and what they compute are those of `attend`: the last block of a list goes first, under a mask.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rrattention.blocks import BlockGrid, BlockSelection
from rrattention.triton.common import LOG2_E
from rrattention.triton.launch import DTYPES, Launch, Specialization, launch_for

ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}

# Newer versions of Gluon have other names for the copies.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _fetch(tensor, batch, head, row, tile, ready):
    """Start to copy the rows of one head from `row` on; rows and columns past the tensor's end become zeros."""
    mbarrier.expect(ready, tensor.block_type.nbytes)
    _load(tensor, [batch, head, row, 0], ready, tile)


@gluon.jit
def _send(tensor, batch, head, row, ring, ready, free, item):
    """Fetch the next item of the ring as soon as both groups are done with what is in its slot."""
    slots: gl.constexpr = ring.shape[0]
    slot = item % slots
    mbarrier.wait(free.index(slot), item // slots + 1 & 1)  # the first round waits for nothing
    _fetch(tensor, batch, head, row, ring.index(slot), ready.index(slot))


@gluon.jit
def _received(ring, ready, item):
    """Wait for an item of the ring; return it as a matrix in shared memory, [BLOCK, TILE_D]."""
    slots: gl.constexpr = ring.shape[0]
    slot = item % slots
    mbarrier.wait(ready.index(slot), item // slots & 1)
    return ring.index(slot).reshape([ring.shape[3], ring.shape[4]])


@gluon.jit
def _release(free, item):
    mbarrier.arrive(free.index(item % free.shape[0]), count=1)


@gluon.jit
def _produce(shared, query, key, value, batch, head, key_head, first_row, listed, last, steps):
    """The warp that fetches: both halves of the queries, then keys and values of the last block and of all others."""
    query_tiles, ring, query_ready, ready, free = shared
    for half in gl.static_range(2):
        row = first_row + half * query_tiles.shape[3]
        _fetch(query, batch, head, row, query_tiles.index(half), query_ready.index(half))
    block = last
    for step in range(steps):
        following = gl.load(listed + step)  # early: the next copies wait for it
        row = block * ring.shape[3]
        _send(key, batch, key_head, row, ring, ready, free, 2 * step)
        _send(value, batch, key_head, row, ring, ready, free, 2 * step + 1)
        block = following


@gluon.jit
def _softmax(scores, scale, running_sum, running_max):
    """Return the weights of a tile of scores, the decay of what was summed before, and both running values."""
    new_max = gl.maximum(running_max, gl.max(scores, axis=1) * scale)  # scale is not negative
    weights = gl.exp2(scores * scale - new_max[:, None])
    decay = gl.exp2(running_max - new_max)
    return weights, decay, running_sum * decay + gl.sum(weights, axis=1), new_max


@gluon.jit
def _consume(half: gl.constexpr, shared, results, batch, head, row, first_row, real_rows, steps, seen, scale):
    """A group of warps: attention of one half of the queries, from the first product to the result."""
    query_tiles, ring, query_ready, ready, free = shared
    out, first_out, log_sums = results
    tile_m: gl.constexpr = query_tiles.shape[3]
    tile_n: gl.constexpr = ring.shape[3]
    tile_d: gl.constexpr = ring.shape[4]
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile_n, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile_d, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_sums, 2)
    of_rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    of_sum_rows: gl.constexpr = gl.SliceLayout(1, of_sums)

    query = query_tiles.index(half).reshape([tile_m, tile_d])
    no_scores = gl.zeros([tile_m, tile_n], gl.float32, of_scores)
    weighted_sum = gl.zeros([tile_m, tile_d], gl.float32, of_sums)
    running_sum = gl.zeros([tile_m], gl.float32, of_rows)
    # The first maximum is finite so that rows that see nothing yet need no special case: exp2(-inf - finite) is 0.
    running_max = gl.full([tile_m], -1e38, gl.float32, of_rows)
    rows = half * tile_m + gl.arange(0, tile_m, of_rows)
    columns = gl.arange(0, tile_n, gl.SliceLayout(0, of_scores))

    mbarrier.wait(query_ready.index(half), 0)
    keys = _received(ring, ready, 0)
    scores = warpgroup_mma(query, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    _release(free, 0)
    scores = gl.where(columns[None, :] < (rows + seen)[:, None], scores * scale, float("-inf"))
    weights, _, running_sum, running_max = _softmax(scores, 1.0, running_sum, running_max)
    weights = gl.convert_layout(weights.to(query.dtype), of_weights)

    for step in range(1, steps):
        # The scores of this block, then the sum over the block before: one wait for the matrix units less.
        keys = _received(ring, ready, 2 * step)
        scores = warpgroup_mma(query, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        values = _received(ring, ready, 2 * step - 1)
        weighted_sum = warpgroup_mma(weights, values, weighted_sum, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        _release(free, 2 * step)
        new_weights, decay, running_sum, running_max = _softmax(scores, scale, running_sum, running_max)
        weighted_sum = warpgroup_mma_wait(0, deps=[weighted_sum])
        _release(free, 2 * step - 1)
        weights = gl.convert_layout(new_weights.to(query.dtype), of_weights)
        weighted_sum *= gl.convert_layout(decay, of_sum_rows)[:, None]

    values = _received(ring, ready, 2 * steps - 1)
    weighted_sum = warpgroup_mma(weights, values, weighted_sum, is_async=True)
    weighted_sum = warpgroup_mma_wait(0, deps=[weighted_sum])
    running_sum = gl.where(running_sum == 0, 1.0, running_sum)  # of rows that see nothing
    result = weighted_sum * gl.convert_layout(1 / running_sum, of_sum_rows)[:, None]
    query.store(result.to(query.dtype))  # its tile serves the result on its way out
    fence_async_shared()
    if row == 0:
        _store(first_out, [batch, head, first_row + half * tile_m, 0], query_tiles.index(half))
    else:
        _store(out, [batch, head, first_row + half * tile_m, 0], query_tiles.index(half))
    gl.store(log_sums + rows, running_max + gl.log2(running_sum), mask=rows < real_rows)
    tma.store_wait(0)


# Lengths change from call to call: no new kernel for those that 16 divides, or that are 1.
@gluon.jit(do_not_specialize=["prefix", "query_length", "query_blocks", "key_blocks"])
def _hopper_kernel(
    query,
    key,
    value,
    out,
    first_out,
    indices,
    counts,
    log_sums,
    key_heads,
    prefix,
    query_length,
    query_blocks,
    key_blocks,
    scale,
    STAGES: gl.constexpr,
):
    slots: gl.constexpr = 2 * STAGES
    tile_m: gl.constexpr = query.block_type.shape[2]  # half a block of queries
    block_size: gl.constexpr = key.block_type.shape[2]
    tile_d: gl.constexpr = key.block_type.shape[3]
    group = gl.num_programs(0)
    batch, key_head = gl.program_id(2) // key_heads, gl.program_id(2) % key_heads
    head = key_head * group + gl.program_id(0)
    row = gl.num_programs(1) - 1 - gl.program_id(1)
    list_row = (batch * key_heads * group + head).to(gl.int64) * query_blocks + row
    listed = indices + list_row * key_blocks
    count = gl.load(counts + list_row)
    last = gl.where(count > 0, gl.load(listed + gl.maximum(count - 1, 0)), 0)  # an empty list: a block that none sees
    steps = gl.maximum(count, 1)

    # After an uneven prefix the first block begins before the first query. Its tile begins with that query and ends
    # past the block: `first_out` ends with the block, and what belongs to the next is not stored.
    block_end = (prefix // block_size + row + 1) * block_size - prefix  # counted from the first query, as all rows
    first_row = gl.maximum(block_end - block_size, 0)
    real_rows = gl.minimum(block_end, query_length) - first_row
    # Row r sees the columns of the last block before r + seen.
    seen = gl.where(count > 0, prefix + first_row - last * block_size + 1, -2 * block_size)
    log_sums += (batch * key_heads * group + head).to(gl.int64) * query_length + first_row

    query_tiles = gl.allocate_shared_memory(query.dtype, [2, 1, 1, tile_m, tile_d], query.layout)
    ring = gl.allocate_shared_memory(key.dtype, [slots, 1, 1, block_size, tile_d], key.layout)
    query_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(query_ready.index(half), count=1)
    for slot in gl.static_range(slots):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)  # one of each group

    shared = (query_tiles, ring, query_ready, ready, free)
    results = (out, first_out, log_sums)
    gl.warp_specialize(
        [
            (_consume, (0, shared, results, batch, head, row, first_row, real_rows, steps, seen, scale)),
            (_consume, (1, shared, results, batch, head, row, first_row, real_rows, steps, seen, scale)),
            (_produce, (shared, query, key, value, batch, head, key_head, first_row, listed, last, steps)),
        ],
        [4, 1],
        [240, 24],
    )


def covers(query: Tensor, key: Tensor, value: Tensor, grid: BlockGrid) -> bool:
    """Whether the kernel is for such a call: causal, no padding, blocks of 128, and rows that lie in 16-byte steps."""
    return (
        query.dtype in ELEMENTS
        and 32 < query.shape[3] <= 128
        and query.shape[3] % 8 == 0
        and grid.block_size == 128
        and grid.causal
        and grid.kv_start is None
        and all(_in_steps(tensor) for tensor in (query, key, value))
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sums: Tensor | None,
    selection: BlockSelection,
    *,
    scale: float,
) -> None:
    """Fill `out`, laid out as `query`, and where it is wanted `log_sums`, for a call that the kernel `covers`.

    log_sums [B, H, Lq] float32 gets the logarithm, to base 2, of each query's weights. `scale` is not negative.
    """
    grid = selection.grid
    if log_sums is None:
        log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    batch, heads, query_length, head_dim = query.shape
    launch = launch_for("hopper", query, head_dim)
    prefix = grid.key_length - query_length
    first_out = out[:, :, : grid.block_size - prefix % grid.block_size]
    _hopper_kernel[heads // key.shape[1], grid.query_blocks, batch * key.shape[1]](
        _descriptor(query, launch.tile_m // 2),
        _descriptor(key, launch.tile_n),
        _descriptor(value, launch.tile_n),
        _descriptor(out, launch.tile_m // 2),
        _descriptor(first_out, launch.tile_m // 2),
        selection.indices.contiguous(),
        selection.counts.contiguous(),
        log_sums,
        key.shape[1],
        prefix,
        query_length,
        grid.query_blocks,
        grid.key_blocks,
        scale * LOG2_E,
        STAGES=launch.num_stages,
        num_warps=launch.num_warps,
    )


def specialization(head_dim: int, dtype: torch.dtype, block_size: int, stride: int, launch: Launch) -> Specialization:
    """Return what the compiler needs for the kernel as a causal prefill launches it; see `Specialization`."""
    rows = dict.fromkeys(("query", "out", "first_out"), launch.tile_m // 2)
    rows |= dict.fromkeys(("key", "value"), launch.tile_n)
    signature = {}
    for name, each in rows.items():
        shape, layout = _tile(each, head_dim, dtype)
        signature[name] = f"tensordesc<{DTYPES[dtype]}{shape},{layout!r}>"
    signature |= {"indices": "*i32:16", "counts": "*i32:16", "log_sums": "*fp32:16", "scale": "fp32"}
    integers = ("key_heads", "prefix", "query_length", "query_blocks", "key_blocks")
    signature |= dict.fromkeys(integers, "i32")
    return Specialization(_hopper_kernel, signature, {"STAGES": launch.num_stages}, launch)


def _in_steps(tensor: Tensor) -> bool:
    """Whether the copy engine can take the tensor: rows without gaps in them that begin at multiples of 16 bytes."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride()[:3], strict=False) if size > 1]
    return (
        tensor.stride(3) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * tensor.itemsize % 16 == 0 for stride in strides)
    )


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Describe a [B, H, L, D] tensor to the copy engine, which takes `rows` of one head at a time."""
    shape, layout = _tile(rows, tensor.shape[3], tensor.dtype)
    # The stride of a dimension of one element means nothing, and may be one that the engine does not take.
    strides = [stride if size > 1 else 64 for size, stride in zip(tensor.shape, tensor.stride()[:3], strict=False)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], shape, layout)


@cache
def _tile(rows: int, head_dim: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    """Return the shape of a tile of one head's rows, zeros where they are no power of two wide, and its layout."""
    shape = [1, 1, rows, max(64, triton.next_power_of_2(head_dim))]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, ELEMENTS[dtype])
