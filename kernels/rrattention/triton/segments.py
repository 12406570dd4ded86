"""How much queries look at each segment of the keys: the logsumexp of its scores, in one walk over the keys.

The shares that segments have of a query's attention are the softmax of these numbers. No score reaches memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rrattention.triton.common import LOG2_E
from rrattention.triton.launch import DTYPES, Launch, Specialization, launch_for


@triton.jit(do_not_specialize=["query_length", "key_length", "segments"])
def _segments_kernel(
    query,
    key,
    starts,
    out,
    query_head_stride,
    query_stride,
    key_head_stride,
    key_stride,
    group,
    query_length,
    key_length,
    segments,
    scale,
    HEAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    LN_2: tl.constexpr,
):
    """Walk over one segment of one key head's keys, with TILE_M of the queries of all heads that share it."""
    segment, key_head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)  # head by head of the group
    real = rows < group * query_length
    heads, tokens = key_head * group + rows // query_length, rows % query_length
    last_seen = key_length - query_length + tokens
    dims = tl.arange(0, TILE_D)[None, :]
    offsets = heads * query_head_stride + tokens.to(tl.int64) * query_stride
    queries = tl.load(query + offsets[:, None] + dims, mask=real[:, None] & (dims < HEAD_DIM), other=0.0)

    key += key_head * key_head_stride
    start = tl.load(starts + segment)
    stop = tl.load(starts + segment + 1, mask=segment + 1 < segments, other=key_length)
    running_max, running_sum = tl.full([TILE_M], float("-inf"), tl.float32), tl.zeros([TILE_M], tl.float32)
    for column in range(start, stop, TILE_N):
        columns = column + tl.arange(0, TILE_N)
        inside = (columns < stop)[:, None] & (dims < HEAD_DIM)
        keys = tl.load(key + columns.to(tl.int64)[:, None] * key_stride + dims, mask=inside, other=0.0)
        # Float32 is multiplied in TF32, the 10 bits of float16: enough to tell where queries look.
        scores = tl.dot(queries, tl.trans(keys), input_precision="tf32") * scale  # [TILE_M, TILE_N]
        visible = (columns < stop)[None, :] & (columns[None, :] <= last_seen[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        subtracted = tl.where(new_max == float("-inf"), 0.0, new_max)  # where nothing is seen so far: no inf - inf
        running_sum = running_sum * tl.exp2(running_max - subtracted)
        running_sum += tl.sum(tl.exp2(scores - subtracted[:, None]), axis=1)
        running_max = new_max
    out += (heads * query_length + tokens) * segments + segment
    tl.store(out, (running_max + tl.log2(running_sum)) * LN_2, mask=real)


def _constants(head_dim: int, launch: Launch) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim,
        "TILE_M": launch.tile_m,
        "TILE_N": launch.tile_n,
        "TILE_D": max(16, triton.next_power_of_2(head_dim)),
        "LN_2": 1 / LOG2_E,
    }


def specialization(head_dim: int, dtype: torch.dtype, block_size: int, stride: int, launch: Launch) -> Specialization:
    """Return what the compiler needs for the kernel, which knows no blocks and strides; see `Specialization`."""
    pointer = f"*{DTYPES[dtype]}:16"
    signature = {"query": pointer, "key": pointer, "starts": "*i32:16", "out": "*fp32:16", "scale": "fp32"}
    signature |= {name: "i32:16" for name in _segments_kernel.arg_names if name.endswith("_stride")}
    signature |= dict.fromkeys(("group", "query_length", "key_length", "segments"), "i32")
    return Specialization(_segments_kernel, signature, _constants(head_dim, launch), launch)


def segment_logsumexp(query: Tensor, key: Tensor, starts: Tensor, *, scale: float) -> Tensor:
    """Return the logsumexp of the scores of each segment of keys, for each query: -inf where it sees none of them.

    query [H, Lq, D] and key [K, Lk, D] in float16, bfloat16 or float32; the last query is the last key's own, and
    attention is causal. starts, [segments] int32, is where segments begin: each ends where the next one begins, and the
    last one with the keys. Returns float32 [H, Lq, segments], natural logarithms. ValueError: there is no launch for
    the dtype, head dim or GPU.
    """
    query, key = (each if each.stride(2) == 1 else each.contiguous() for each in (query, key))
    (heads, query_length, head_dim), (key_heads, key_length, _) = query.shape, key.shape
    group, segments = heads // key_heads, len(starts)
    launch = launch_for("segments", query, head_dim)
    out = torch.empty(heads, query_length, segments, dtype=torch.float32, device=query.device)
    _segments_kernel[triton.cdiv(group * query_length, launch.tile_m), segments, key_heads](
        query,
        key,
        starts,
        out,
        *query.stride()[:2],
        *key.stride()[:2],
        group,
        query_length,
        key_length,
        segments,
        scale * LOG2_E,
        **_constants(head_dim, launch),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out
