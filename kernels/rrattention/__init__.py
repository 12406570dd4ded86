"""RRAttention: block-sparse attention for prefill that picks its blocks with round-robin sampled queries.

    from rrattention import RRConfig, rr_attention
    out = rr_attention(q, k, v, config=RRConfig(tau=0.95))

`rrattention.transformers` plugs it into Hugging Face decoders.
"""

from rrattention.api import BACKENDS, attend, estimate, rr_attention, select
from rrattention.blocks import BlockGrid, BlockSelection, BlockStats
from rrattention.config import RRConfig
from rrattention.dense import dense_attention

__all__ = [
    "BACKENDS",
    "BlockGrid",
    "BlockSelection",
    "BlockStats",
    "RRConfig",
    "attend",
    "dense_attention",
    "estimate",
    "rr_attention",
    "select",
]
