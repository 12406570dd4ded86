"""The reference backend's stages, what to call them with, and dense attention by rows to hold them against."""

import itertools
import math
from functools import partial

import torch

import rrattention
from rrattention import RRConfig

# By itself a CPU takes its fast backend; what is held here is the specification.
attend, estimate, rr_attention, select = (
    partial(stage, backend="reference")
    for stage in (rrattention.attend, rrattention.estimate, rrattention.rr_attention, rrattention.select)
)

SMALL = RRConfig(block_size=16, stride=4, tau=0.8, min_tokens=0)

# (Lq, Lk, kv_start of two sequences or None): whole, ragged, single, prefixed on and off the grid, padded, both.
SHAPES = [
    (64, 64, None),
    (61, 61, None),
    (1, 1, None),
    (1, 50, None),
    (33, 81, None),
    (30, 75, None),
    (70, 70, (0, 23)),
    (40, 75, (5, 50)),
    (3, 40, (0, 38)),
]
SHAPE_IDS = [f"Lq{lq}-Lk{lk}-start{start}" for lq, lk, start in SHAPES]


def make_qkv(query_length, key_length, *, heads=6, kv_heads=2, dim=8, batch=2, dtype=torch.float64, sharpness=2.0):
    generator = torch.Generator().manual_seed(query_length * 1000 + key_length)
    q = torch.randn(batch, heads, query_length, dim, generator=generator, dtype=torch.float64) * sharpness
    k = torch.randn(batch, kv_heads, key_length, dim, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, key_length, dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def starts(kv_start):
    return None if kv_start is None else torch.tensor(kv_start)


def attention_by_rows(q, k, v, *, causal=True, kv_start=None, allowed=None):
    """Dense attention in float64, one query at a time; `allowed(b, h, query position, key position)` narrows it."""
    out = torch.zeros_like(q, dtype=torch.float64)
    shift = k.shape[2] - q.shape[2]
    for b, h, r in itertools.product(*map(range, q.shape[:3])):
        start = int(kv_start[b]) if kv_start is not None else 0
        position = r + shift - start
        if position < 0:
            continue
        g = h // (q.shape[1] // k.shape[1])
        last = position + 1 if causal else k.shape[2] - start
        seen = [p for p in range(last) if allowed is None or allowed(b, h, position, p)]
        keys, values = k[b, g, start:].double()[seen], v[b, g, start:].double()[seen]
        out[b, h, r] = torch.softmax(keys @ q[b, h, r].double() / math.sqrt(q.shape[3]), dim=0) @ values
    return out
