"""How much queries look at each segment of the keys: the logsumexp of its scores, in one walk over the keys.

The shares that segments have of a query's attention are the softmax of these numbers. No score reaches memory.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    addresses,
    starts,
    out,
    query_pass_stride,
    query_head_stride,
    query_stride,
    key_head_stride,
    key_stride,
    key_heads,
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
    """Walk over one segment of one pass's key head, with TILE_M of the queries of all heads that share it."""
    segment, number, key_head = tl.program_id(1), tl.program_id(2) // key_heads, tl.program_id(2) % key_heads
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)  # head by head of the group
    real = rows < group * query_length
    heads, tokens = key_head * group + rows // query_length, rows % query_length
    last_seen = key_length - query_length + tokens
    dims = tl.arange(0, TILE_D)[None, :]
    query += number.to(tl.int64) * query_pass_stride
    offsets = heads.to(tl.int64) * query_head_stride + tokens.to(tl.int64) * query_stride
    queries = tl.load(query + offsets[:, None] + dims, mask=real[:, None] & (dims < HEAD_DIM), other=0.0)

    key = tl.load(addresses + number).to(tl.pointer_type(query.dtype.element_ty))
    key = tl.multiple_of(key, 16) + key_head.to(tl.int64) * key_head_stride
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
    row = (number.to(tl.int64) * key_heads * group + heads) * query_length + tokens
    out += row * segments + segment
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
    signature = {"query": f"*{DTYPES[dtype]}:16", "addresses": "*i64:16", "starts": "*i32:16", "out": "*fp32:16"}
    signature |= {name: "i32:16" for name in _segments_kernel.arg_names if name.endswith("_stride")}
    signature |= dict.fromkeys(("key_heads", "group", "query_length", "key_length", "segments"), "i32")
    signature["scale"] = "fp32"
    return Specialization(_segments_kernel, signature, _constants(head_dim, launch), launch)


def segment_logsumexp(query: Tensor, keys: Sequence[Tensor], starts: Tensor, *, scale: float) -> Tensor:
    """Return the logsumexp of the scores of each segment of keys, for each query: -inf where it sees none of them.

    query [N, H, Lq, D] are those of N passes, layers of a model say, and `keys` are theirs: N tensors [K, Lk, D] of
    equal strides, in the same of float16, bfloat16 and float32. In each pass the last query is the last key's own, and
    attention is causal. starts, [segments] int32, is where segments begin: each ends where the next one begins, and the
    last one with the keys. Returns float32 [N, H, Lq, segments], natural logarithms. ValueError: there is no launch for
    the dtype, head dim or GPU, or keys are laid out differently.
    """
    # One launch for all: a host takes longer to tell a GPU of fourteen than the GPU does for them.
    if query.stride(3) != 1:
        query = query.contiguous()
    keys = [key if key.stride(2) == 1 and key.data_ptr() % 16 == 0 else key.contiguous() for key in keys]
    if len({(key.shape, key.stride()) for key in keys}) > 1:
        raise ValueError("the keys of passes that are looked at in one go must have the same shape and strides")
    (passes, heads, query_length, head_dim), (key_heads, key_length, _) = query.shape, keys[0].shape
    group, segments = heads // key_heads, len(starts)
    launch = launch_for("segments", query, head_dim)
    addresses = torch.tensor([key.data_ptr() for key in keys]).to(query.device, non_blocking=True)
    out = torch.empty(passes, heads, query_length, segments, dtype=torch.float32, device=query.device)
    _segments_kernel[triton.cdiv(group * query_length, launch.tile_m), segments, passes * key_heads](
        query,
        addresses,
        starts,
        out,
        *query.stride()[:3],
        *keys[0].stride()[:2],
        key_heads,
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
