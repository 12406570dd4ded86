"""Exact attention over every visible key, by PyTorch's own kernels: what a sparse call is measured against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

FLASH_HEAD_DIM = 256  # up to which PyTorch's flash attention goes
QUERY_CHUNK = 256  # queries of one masked call, so that no mask of size Lq x Lk exists


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool = True, kv_start: Tensor | None = None
) -> Tensor:
    """Attend to every valid key; the last query is the last key's own (with torch's `is_causal` the first one is).

    query [B, H, Lq, D], key and value [B, K, Lk, D], kv_start [B] as in `rr_attention`; returns [B, H, Lq, D], zeros in
    rows of padding.
    """
    if scale <= 0:  # with which PyTorch's causal attention gives NaN on a CPU
        query, scale = query * scale, 1.0
    (key_heads, key_length), query_length = key.shape[1:3], query.shape[2]
    group = query.shape[1] // key_heads
    if kv_start is None and (not causal or query_length in (1, key_length)):
        return scaled_dot_product_attention(
            query, key, value, scale=scale, is_causal=causal and query_length > 1, enable_gqa=group > 1
        )
    flash = query.is_cuda and query.dtype.itemsize == 2 and query.shape[3] == value.shape[3] <= FLASH_HEAD_DIM
    if kv_start is None and flash:
        from torch.nn.attention.bias import causal_lower_right  # imports Triton, which not everybody needs

        bias = causal_lower_right(query_length, key_length)  # for flash attention this is no mask but a rule
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=group > 1)

    first = torch.zeros(1, device=query.device, dtype=torch.long) if kv_start is None else kv_start
    first = first[:, None, None, None]
    chunks = []
    for start in range(0, query_length, QUERY_CHUNK):
        chunk = query[:, :, start : start + QUERY_CHUNK]
        # A group's heads become rows over their one key head: masked grouped attention would repeat K and V on a GPU.
        folded = chunk.unflatten(1, (key_heads, group)).flatten(2, 3)  # [B, K, group * rows, D]
        stop = start + chunk.shape[2] + key_length - query_length
        row = torch.arange(stop - chunk.shape[2], stop, device=query.device).repeat(group)[:, None]
        column = torch.arange(stop if causal else key_length, device=query.device)
        mask = column >= first  # [B, 1, 1, columns]
        if causal:
            mask = mask & (column <= row)  # [B, 1, group * rows, columns]
        seen = len(column)
        out = scaled_dot_product_attention(folded, key[:, :, :seen], value[:, :, :seen], attn_mask=mask, scale=scale)
        chunks.append(out.masked_fill(row < first, 0.0).unflatten(2, (group, -1)).flatten(1, 2))
    return torch.cat(chunks, dim=2)
