"""RRConfig: the few numbers that define an RRAttention call."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

Scope = Literal["row", "heads"]

# Tokens from which on sparse prefill wins, measured with benchmarks/prefill.py: see README.md.
MIN_TOKENS = {"cpu": 2560, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class RRConfig:
    """How blocks are scored and how many of them are kept.

    block_size: tokens in a block; a multiple of `stride`.
    stride: tokens in a stride: one query is sampled, and the keys are averaged, over each.
    tau: the share of the estimated attention mass that the kept blocks carry, in (0, 1]; 1 keeps every visible block.
    scope: who shares one tau: "row" is one query block of one head, the paper's rule; "heads" is all heads of one
        query block, which drops blocks where they matter least over the heads.
    sink: always keep the first key block.
    dense_last_block: the last query block of the call keeps every visible block.
    min_tokens: with fewer keys than this the call is dense; None is the length at which sparse was measured to win on
        the device of the call, see `MIN_TOKENS`.

    ValueError names the field that is wrong, and its value.
    """

    block_size: int = 128
    stride: int = 8
    tau: float = 0.95
    scope: Scope = "row"
    sink: bool = True
    dense_last_block: bool = True
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("stride", 1), ("block_size", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            if name == "min_tokens" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.block_size % self.stride:
            raise ValueError(f"block_size must be a multiple of stride {self.stride}, got {self.block_size}")
        if not isinstance(self.tau, int | float) or not 0 < self.tau <= 1:
            raise ValueError(f"tau must lie in (0, 1], got {self.tau!r}")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, got {self.scope!r}")

    @classmethod
    def paper(cls, tau: float = 0.95) -> RRConfig:
        """Return the paper's rule: every query block of every head keeps its own `tau` of the mass."""
        return cls(tau=tau, scope="row")

    def sparse(self, tokens: int, device: torch.device) -> bool:
        """Whether a prefill of so many tokens is long enough for `device` to gain by leaving out blocks."""
        least = MIN_TOKENS.get(device.type, MIN_TOKENS["cpu"]) if self.min_tokens is None else self.min_tokens
        return tokens >= least

    def for_chunk(self, *, total_tokens: int, last: bool, device: torch.device) -> RRConfig:
        """Return this rule for one chunk of a prefill of `total_tokens` tokens, so that it selects what one call would.

        Two choices belong to the whole prefill and not to a chunk: whether it is long enough to be sparse, and which
        query block is the last. Chunks begin at multiples of `block_size`; the last one may be ragged.
        """
        return replace(
            self,
            min_tokens=0 if self.sparse(total_tokens, device) else sys.maxsize,
            dense_last_block=self.dense_last_block and last,
        )
