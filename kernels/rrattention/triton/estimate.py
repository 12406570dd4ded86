"""Block scores: the softmax of sampled queries over pooled keys, summed block by block as it is made.

A *unit* is what one head samples from one query block: block_size / stride rows. The units of a key head are numbered
query block by query block, head by head within, and a program takes as many as fill its tile, wherever they begin. So
no row of a tile is idle, however many heads share a key head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rrattention.blocks import BlockGrid
from rrattention.triton.common import LOG2_E
from rrattention.triton.launch import DTYPES, Launch, Specialization, launch_for
from rrattention.triton.pool import pool


@triton.jit
def _products(
    operands, column, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, MASKED: tl.constexpr
):
    """Multiply the samples with TILE_N mean keys; only where MASKED may some of these be hidden, or not exist."""
    samples, pooled, last_seen, strides = operands
    columns = tl.arange(0, TILE_N)
    dims = tl.arange(0, samples.shape[1])[None, :]
    keys = pooled + column * HEAD_DIM + (columns[:, None] * HEAD_DIM + dims)
    if MASKED:
        keys = tl.load(keys, mask=(columns < strides - column)[:, None] & (dims < HEAD_DIM), other=0.0)
    elif samples.shape[1] > HEAD_DIM:
        keys = tl.load(keys, mask=dims < HEAD_DIM, other=0.0)
    else:
        keys = tl.load(keys)  # [TILE_N, TILE_D]
    # Float32 is multiplied in TF32: the 10 bits of float16, enough to rank blocks. It means nothing to other types.
    products = tl.dot(samples, tl.trans(keys), input_precision="tf32")  # [TILE_M, TILE_N]
    if MASKED:
        products = tl.where(((column + columns) * STRIDE)[None, :] <= last_seen[:, None], products, float("-inf"))
    return products


@triton.jit
def _max_and_sum(
    state,
    operands,
    start,
    stop,
    scale,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take strides `start` to `stop` into every sample's softmax: its maximum (times `scale`) and its sum."""
    running_max, running_sum = state  # [TILE_M] both
    for column in range(start, stop, TILE_N):
        products = _products(operands, column, STRIDE, HEAD_DIM, TILE_N, MASKED)
        new_max = tl.maximum(running_max, tl.max(products, axis=1) * scale)
        weights = tl.exp2(products * scale - new_max[:, None])
        running_sum = running_sum * tl.exp2(running_max - new_max) + tl.sum(weights, axis=1)
        running_max = new_max
    return running_max, running_sum


@triton.jit
def _store_block_sums(
    target,
    log_sum,
    operands,
    start,
    stop,
    scale,
    PER_BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Walk strides `start` to `stop` again and write their mass, summed over a unit's samples and a block's strides."""
    rows, row_exists, key_blocks = target
    UNITS: tl.constexpr = rows.shape[0]
    BLOCKS: tl.constexpr = TILE_N // PER_BLOCK
    for column in range(start, stop, TILE_N):
        products = _products(operands, column, STRIDE, HEAD_DIM, TILE_N, MASKED)
        mass = tl.exp2(products * scale - log_sum[:, None])
        mass = tl.reshape(mass, [UNITS, PER_BLOCK, BLOCKS, PER_BLOCK])
        by_block = tl.sum(tl.sum(mass, axis=3), axis=1)  # [UNITS, BLOCKS]
        blocks = column // PER_BLOCK + tl.arange(0, BLOCKS)
        inside = row_exists[:, None] & (blocks < key_blocks)[None, :]
        tl.store(rows[:, None] + blocks[None, :], by_block, mask=inside)


@triton.jit(do_not_specialize=["query_length", "key_length", "query_blocks", "key_blocks", "strides"])
def _estimate_kernel(
    query,
    pooled,
    scores,
    kv_start,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_heads,
    group,
    query_length,
    key_length,
    query_blocks,
    key_blocks,
    strides,
    scale,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Score all key blocks for as many units of one key head as TILE_M rows hold."""
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE
    UNITS: tl.constexpr = TILE_M // PER_BLOCK
    # Where attention is causal, the last units have the most to do: they go first.
    sequence_head = tl.program_id(0)
    first_unit = (tl.num_programs(1) - 1 - tl.program_id(1)) * UNITS
    batch, key_head = (sequence_head // key_heads).to(tl.int64), sequence_head % key_heads

    length = key_length
    if PADDED:
        length -= tl.load(kv_start + batch).to(tl.int32)
    first_position = length - query_length  # of query row 0; negative where that is padding
    first_block = tl.maximum(first_position, 0) // BLOCK

    # 1. Samples: head h looks at row h mod STRIDE of every stride. Some may lie outside this call's queries.
    samples_m = tl.arange(0, TILE_M)
    units = first_unit + samples_m // PER_BLOCK
    heads = key_head * group + units % group
    positions = (first_block + units // group) * BLOCK + samples_m % PER_BLOCK * STRIDE + heads % STRIDE
    real = (positions >= first_position) & (positions < length)
    dims = tl.arange(0, TILE_D)[None, :]
    offsets = heads.to(tl.int64) * query_head_stride + (positions - first_position).to(tl.int64) * query_stride
    query += batch * query_batch_stride
    samples = tl.load(query + offsets[:, None] + dims, mask=real[:, None] & (dims < HEAD_DIM), other=0.0)

    # 2. What they see: every sample sees all strides up to `whole`, and none from `seen` on.
    seen = tl.cdiv(length, STRIDE)
    whole = seen
    last_seen = tl.zeros([TILE_M], tl.int32) + length - 1
    first_own = first_block + first_unit // group
    if CAUSAL:
        last_own = first_block + (first_unit + UNITS - 1) // group
        whole = tl.minimum(seen, first_own * PER_BLOCK)
        seen = tl.minimum(seen, (last_own + 1) * PER_BLOCK)
        last_seen = positions
    seen = tl.where(first_own * BLOCK < length, seen, 0)  # else the sequence ended before these units
    whole = tl.minimum(whole, seen) // TILE_N * TILE_N

    # 3. Softmax, in two walks: the maximum and the sum first.
    operands = samples, pooled + (batch * key_heads + key_head) * strides * HEAD_DIM, last_seen, strides
    state = tl.full([TILE_M], float("-inf"), tl.float32), tl.zeros([TILE_M], tl.float32)
    state = _max_and_sum(state, operands, 0, whole, scale, STRIDE, HEAD_DIM, TILE_N, MASKED=False)
    running_max, running_sum = _max_and_sum(state, operands, whole, seen, scale, STRIDE, HEAD_DIM, TILE_N, MASKED=True)
    # Samples that are not real say nothing: 2^(x - inf) is 0.
    log_sum = tl.where(real, running_max + tl.log2(running_sum), float("inf"))

    # 4. Sum block by block.
    units = first_unit + tl.arange(0, UNITS)
    heads = key_head * group + units % group
    rows = scores + ((batch * key_heads * group + heads) * query_blocks + units // group) * key_blocks
    target = rows, units < query_blocks * group, key_blocks
    _store_block_sums(target, log_sum, operands, 0, whole, scale, PER_BLOCK, STRIDE, HEAD_DIM, TILE_N, MASKED=False)
    _store_block_sums(target, log_sum, operands, whole, seen, scale, PER_BLOCK, STRIDE, HEAD_DIM, TILE_N, MASKED=True)


def _constants(
    head_dim: int, block_size: int, stride: int, launch: Launch, *, causal: bool, padded: bool
) -> dict[str, Any]:
    per_block = block_size // stride
    return {
        "BLOCK": block_size,
        "STRIDE": stride,
        "HEAD_DIM": head_dim,
        "TILE_M": max(launch.tile_m, per_block),
        "TILE_N": max(launch.tile_n, per_block),
        "TILE_D": max(16, triton.next_power_of_2(head_dim)),
        "CAUSAL": causal,
        "PADDED": padded,
    }


def specialization(head_dim: int, dtype: torch.dtype, block_size: int, stride: int, launch: Launch) -> Specialization:
    """Return what the compiler needs for the kernel as a causal prefill launches it; see `Specialization`."""
    pointer = f"*{DTYPES[dtype]}:16"
    signature = {"query": pointer, "pooled": pointer, "scores": "*fp32:16", "scale": "fp32"}
    signature |= {name: "i32:16" for name in _estimate_kernel.arg_names if name.endswith("_stride")}
    integers = ("key_heads", "group", "query_length", "key_length", "query_blocks", "key_blocks", "strides")
    signature |= dict.fromkeys(integers, "i32")
    constants = _constants(head_dim, block_size, stride, launch, causal=True, padded=False)
    return Specialization(_estimate_kernel, signature, constants | {"kv_start": None}, launch)


def estimate(query: Tensor, key: Tensor, grid: BlockGrid, *, stride: int, scale: float) -> Tensor:
    """Score each key block for each query block, as `reference.estimate` does.

    Mean keys are rounded to the dtype of `key`, and float32 is multiplied in TF32; all sums are float32.

    query [B, H, Lq, D] and key [B, K, Lk, D] in float16, bfloat16 or float32, any strides; returns float32
    [B, H, query_blocks, key_blocks]. ValueError: there is no launch for the dtype, head dim or GPU, or
    block_size / stride is no power of two.
    """
    per_block = grid.block_size // stride
    if per_block & (per_block - 1):
        raise ValueError(f"block_size / stride must be a power of two for Triton, got {grid.block_size} / {stride}")
    if scale < 0:  # the kernel takes the maximum before it scales
        query, scale = -query, -scale
    query = query if query.stride(3) == 1 else query.contiguous()
    pooled = pool(key, grid, stride=stride)

    batch, heads, query_length, head_dim = query.shape
    key_heads, strides = pooled.shape[1:3]
    launch = launch_for("estimate", query, head_dim)
    constants = _constants(
        head_dim, grid.block_size, stride, launch, causal=grid.causal, padded=grid.kv_start is not None
    )
    group = heads // key_heads
    chunks = triton.cdiv(grid.query_blocks * group * per_block, constants["TILE_M"])
    # Zeros: only blocks that a program's samples may see are written.
    scores = torch.zeros(batch, heads, grid.query_blocks, grid.key_blocks, dtype=torch.float32, device=query.device)
    _estimate_kernel[batch * key_heads, chunks](
        query,
        pooled,
        scores,
        None if grid.kv_start is None else grid.kv_start.contiguous(),
        *query.stride()[:3],
        key_heads,
        group,
        query_length,
        key.shape[2],
        grid.query_blocks,
        grid.key_blocks,
        strides,
        scale * LOG2_E,
        **constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return scores
