"""Which blocks are kept: the smallest set that carries tau, its threshold found by bisection on the value.

A program decides for one query block: of one head, or of all heads where they share tau. The largest blocks are those
above some value, and the bits of floats that are not negative are ordered as integers are. Every step halves the range
of bits and goes on to the nearest score in it, so that a few steps end at the exact one. Nothing is sorted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rrattention.blocks import BlockGrid, BlockSelection
from rrattention.config import RRConfig
from rrattention.triton.launch import Launch, Specialization, launch_for

INFINITY_BITS = tl.constexpr(0x7F800000)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def _load_mass(rows, row_exists, weight, columns, visible, own, SINK: tl.constexpr):
    """Load the mass of `columns`, [TILE_M, TILE_N]: mandatory ones are zeros, for there is nothing to decide."""
    optional = (columns < visible) & (columns != own)
    if SINK:
        optional &= columns != 0
    inside = row_exists[:, None] & optional[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=inside, other=0.0) * weight[:, None]


@triton.jit
def _split(
    value, rows, row_exists, weight, visible, own, SINK: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr
):
    """Return the mass above `value`, the largest block that is not above it, and the smallest that is (or infinity)."""
    above = tl.zeros([TILE_M, TILE_N], tl.float32)
    largest = tl.zeros([TILE_M, TILE_N], tl.float32)
    smallest = tl.full([TILE_M, TILE_N], float("inf"), tl.float32)
    for start in range(0, visible, TILE_N):
        mass = _load_mass(rows, row_exists, weight, start + tl.arange(0, TILE_N), visible, own, SINK)
        is_above = mass > value
        above += tl.where(is_above, mass, 0.0)
        largest = tl.where(is_above, largest, tl.maximum(largest, mass))
        smallest = tl.where(is_above, tl.minimum(smallest, mass), smallest)
    return tl.sum(above), tl.max(largest), tl.min(smallest)


@triton.jit(do_not_specialize=["heads", "query_length", "key_length", "query_blocks", "key_blocks"])
def _select_kernel(
    scores,
    indices,
    counts,
    kv_start,
    head_weights,
    heads,
    query_length,
    key_length,
    query_blocks,
    key_blocks,
    tau,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SINK: tl.constexpr,
    DENSE_LAST_BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    COUNT_ALL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    PADDED: tl.constexpr,
):
    """List the kept blocks of one query block, for one head or, where they are SHARED, all heads."""
    row = query_blocks - 1 - tl.program_id(0)  # where attention is causal, the last have the most to do
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) + tl.arange(0, TILE_M)
    head_exists = head < (heads if SHARED else tl.num_programs(1))
    head_row = (batch * heads + head) * query_blocks + row  # [TILE_M]
    rows = scores + head_row * key_blocks

    length = key_length
    if PADDED:
        length -= tl.load(kv_start + batch).to(tl.int32)
    own = tl.maximum(length - query_length, 0) // BLOCK + row
    visible = tl.cdiv(length, BLOCK)
    is_last = own == visible - 1
    exists = own < visible
    if CAUSAL:
        visible = own + 1
    visible = tl.where(exists, visible, 0)  # a shorter sequence of the batch has fewer query blocks
    own = tl.minimum(own, key_blocks - 1)

    # 1. The total, how much of it counts, how much of that is needed, and how much the mandatory blocks bring.
    weight = tl.full([TILE_M], 1.0, tl.float32)
    choice = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(0, visible, TILE_N):
        choice += _load_mass(rows, head_exists, weight, start + tl.arange(0, TILE_N), visible, own, SINK)
    counted = tl.sum(choice, axis=1)  # [TILE_M]
    mandatory = tl.load(rows + own, mask=head_exists, other=0.0)
    if SINK:
        mandatory += tl.where(own > 0, tl.load(rows, mask=head_exists, other=0.0), 0.0)
    total = counted + mandatory
    if SHARED:  # every head brings a mass of one
        weight = tl.div_rn(weight, tl.maximum(total, SMALLEST_NORMAL))
    if COUNT_ALL:
        counted = total
    needed = tau * tl.sum(counted * weight)
    if WEIGHTED:  # as much may be left out, but each head's by its weight
        left_out = (1.0 - tau) * tl.sum(counted * weight)
        weight *= tl.load(head_weights + head, mask=head_exists, other=0.0)
        needed = tl.sum(counted * weight) - left_out
    given = 0.0
    if COUNT_ALL:
        given = tl.sum(mandatory * weight)
    keep_all = tau == 1.0
    if DENSE_LAST_BLOCK:
        keep_all |= is_last
    needed = tl.where(keep_all, float("inf"), needed)

    # 2. The smallest value with too little mass above it: what is above is kept, and some of the blocks that equal it.
    low = 0
    high = INFINITY_BITS
    carried = given
    while low < high:
        middle = (low + (high - low) // 2).to(tl.float32, bitcast=True)
        above, largest, smallest = _split(middle, rows, head_exists, weight, visible, own, SINK, TILE_M, TILE_N)
        above += given
        if above >= needed:
            low = smallest.to(tl.int32, bitcast=True)
        else:
            high = largest.to(tl.int32, bitcast=True)
            carried = above
    threshold = high.to(tl.float32, bitcast=True)

    # 3. Equal blocks are taken in order: by head, then by column.
    in_head = tl.zeros([TILE_M, TILE_N], tl.int32)
    for start in range(0, visible, TILE_N):
        mass = _load_mass(rows, head_exists, weight, start + tl.arange(0, TILE_N), visible, own, SINK)
        in_head += (mass == threshold).to(tl.int32)
    in_head = tl.sum(in_head, axis=1)
    equal_before = tl.cumsum(in_head, axis=0) - in_head  # [TILE_M]

    # 4. The list.
    count = tl.zeros([TILE_M], tl.int32)
    for start in range(0, visible, TILE_N):
        columns = start + tl.arange(0, TILE_N)
        mass = _load_mass(rows, head_exists, weight, columns, visible, own, SINK)
        equal = (mass == threshold).to(tl.int32)
        rank = equal_before[:, None] + tl.cumsum(equal, axis=1) - equal
        kept = (mass > threshold) | ((mass == threshold) & (carried + rank * threshold < needed))
        kept |= (total == 0.0)[:, None] | (columns == own)[None, :]
        if SINK:
            kept |= (columns == 0)[None, :]
        kept &= head_exists[:, None] & (columns < visible)[None, :]
        listed = kept.to(tl.int32)
        place = count[:, None] + tl.cumsum(listed, axis=1) - listed
        lists = (indices + head_row * key_blocks)[:, None]
        tl.store(lists + place, tl.broadcast_to(columns[None, :], [TILE_M, TILE_N]), mask=kept)
        equal_before += tl.sum(equal, axis=1)
        count += tl.sum(listed, axis=1)
    tl.store(counts + head_row, count, mask=head_exists)


def _constants(
    heads: int,
    launch: Launch,
    config: RRConfig,
    *,
    causal: bool,
    sink: bool,
    block_size: int,
    padded: bool,
    weighted: bool,
) -> dict[str, Any]:
    shared = config.scope == "heads"
    tile_m = triton.next_power_of_2(heads) if shared else 1
    return {
        "BLOCK": block_size,
        "CAUSAL": causal,
        "SINK": sink,
        "DENSE_LAST_BLOCK": config.dense_last_block,
        "SHARED": shared,
        "COUNT_ALL": config.counted == "all",
        "WEIGHTED": weighted,
        "TILE_M": tile_m,
        "TILE_N": max(launch.tile_m * launch.tile_n // tile_m, 1),
        "PADDED": padded,
    }


def specialization(head_dim: int, dtype: torch.dtype, block_size: int, stride: int, launch: Launch) -> Specialization:
    """Return what the compiler needs for the kernel when 28 heads share tau in a causal call; see `Specialization`."""
    signature = {"scores": "*fp32:16", "indices": "*i32:16", "counts": "*i32:16", "head_weights": "*fp32:16"}
    integers = ("heads", "query_length", "key_length", "query_blocks", "key_blocks")
    signature |= dict.fromkeys(integers, "i32") | {"tau": "fp32"}
    config = RRConfig(block_size, stride)
    options = {"causal": True, "sink": True, "padded": False, "weighted": True}
    constants = _constants(28, launch, config, block_size=block_size, **options)
    return Specialization(_select_kernel, signature, constants | {"kv_start": None}, launch)


def select(scores: Tensor, grid: BlockGrid, config: RRConfig, head_weights: Tensor | None = None) -> BlockSelection:
    """Keep the smallest set of visible blocks that holds the mandatory ones and carries tau, as `reference.select`.

    scores [B, H, query_blocks, key_blocks] float32, zeros where a block is not visible; head_weights [H] float32. Of
    equal blocks the first are kept, by head, then by column. Sums are float32 in another order than the reference's:
    where sets carry tau to within rounding, another may be kept. ValueError: the scores are not float32, or there is no
    launch for the GPU.
    """
    if scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32 for Triton, got {scores.dtype}")
    launch = launch_for("select", scores)
    scores = scores.contiguous()
    indices = torch.empty_like(scores, dtype=torch.int32)
    counts = torch.empty_like(scores[..., 0], dtype=torch.int32)
    batch, heads = scores.shape[:2]
    _select_kernel[grid.query_blocks, 1 if config.scope == "heads" else heads, batch](
        scores,
        indices,
        counts,
        None if grid.kv_start is None else grid.kv_start.contiguous(),
        head_weights,
        heads,
        grid.query_length,
        grid.key_length,
        grid.query_blocks,
        grid.key_blocks,
        config.tau,
        **_constants(
            heads,
            launch,
            config,
            causal=grid.causal,
            sink=grid.sink,
            block_size=grid.block_size,
            padded=grid.kv_start is not None,
            weighted=head_weights is not None,
        ),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return BlockSelection(indices, counts, grid)
