"""The vision tower's attention: all segments of one length in one batched call.

A vision tower attends within segments only: one temporal step, or one window of it. For attention functions that it
does not know, transformers calls once per segment, in a Python loop. A function whose name contains "flash" is called
once instead, with all segments end to end and the cumulative lengths of them. Ours needs no package and no GPU for
that: it lays equal segments side by side as a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["SEGMENT_ATTENTION", "segment_attention", "use_segment_attention"]

SEGMENT_ATTENTION = "rrvideo_flash_segments"


def use_segment_attention(model: Any) -> None:
    """Make the vision tower of `model`, a transformers model with a `vision_config`, call `segment_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    # After loading: asked for while loading, a name with "flash" in it would be looked up as a kernel package.
    model.set_attn_implementation({"vision_config": SEGMENT_ATTENTION})


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each segment; the signature is that of transformers' attention functions.

    query, key and value are `[1, heads, tokens, D]`, `cu_seq_lens_q` `[segments + 1]` holds the borders of the segments
    and `max_length_q` the longest one's length. Returns `[1, tokens, heads, D]` and no weights.
    """
    _, heads, tokens, head_dim = query.shape
    segments = cu_seq_lens_q.numel() - 1
    if segments * max_length_q == tokens:  # all are as long as the longest; known without waiting for the device
        q, k, v = (x[0].unflatten(1, (segments, max_length_q)).transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # [segments, heads, length, D]
        return out.transpose(1, 2).reshape(1, tokens, heads, head_dim), None

    out = query.new_empty(1, tokens, heads, head_dim)
    starts, lengths = cu_seq_lens_q[:-1].long(), cu_seq_lens_q.diff()
    for length in lengths.unique().tolist():  # four at most for a windowed video: inner, right, bottom, corner
        index = starts[lengths == length, None] + torch.arange(length, device=starts.device)  # [segments, length]
        q, k, v = (x[0][:, index].transpose(0, 1) for x in (query, key, value))  # [segments, heads, length, D]
        out[0, index] = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    return out, None
