"""RRConfig: the few numbers that define an RRAttention call."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

Scope = Literal["row", "heads"]
Counted = Literal["all", "choice"]
Skipped = Literal["dropped", "pooled"]

# Tokens from which on sparse prefill wins, measured with benchmarks/prefill.py: see README.md.
MIN_TOKENS = {"cpu": 6144, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class RRConfig:
    """How blocks are scored, how many of them are kept, and what becomes of the others.

    The defaults lose less than the paper's rule, `paper()`, where both keep as many blocks, and `fine()` loses least;
    README.md has figures, and what each costs.

    block_size: tokens in a block; a multiple of `stride`.
    stride: tokens in a stride: one query is sampled, and the keys are averaged, over each.
    tau: the share of the estimated attention mass that the kept blocks carry, in (0, 1]; 1 keeps every visible block.
    scope: who shares one tau: "row" is one query block of one head, the paper's rule; "heads" is all heads of one
        query block, which drops blocks where they matter least over the heads.
    counted: of which mass tau is a share: of "all", as in the paper, where a sink that takes nearly everything leaves
        little to be kept of the rest; or of the blocks that there is a "choice" about, without the mandatory ones.
    skipped: what becomes of blocks that are not kept: "dropped", as in the paper, or "pooled": the mean key and the
        mean value of each stand for it, with the weight of as many keys as it has.
    sink: always keep the first key block.
    dense_last_block: the last query block of the call keeps every visible block.
    head_weights: for each layer of a model, how much worse it is to leave out mass of each of its query heads than of
        others, 1 on average: see `calibrate`. What a query block leaves out, weighted, is then up to 1 - tau of
        the mass that counts. None takes all heads alike.
    min_tokens: with fewer keys than this the call is dense; None is the length at which sparse was measured to win on
        the device of the call, see `MIN_TOKENS`.

    ValueError names the field that is wrong, and its value.
    """

    block_size: int = 128
    stride: int = 8
    tau: float = 0.95
    scope: Scope = "heads"
    counted: Counted = "choice"
    skipped: Skipped = "pooled"
    sink: bool = True
    dense_last_block: bool = True
    head_weights: tuple[tuple[float, ...], ...] | None = None
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
        for name, kind in (("scope", Scope), ("counted", Counted), ("skipped", Skipped)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.head_weights is not None:
            object.__setattr__(self, "head_weights", _rows(self.head_weights))  # JSON gives lists

    @classmethod
    def paper(cls, tau: float = 0.95) -> RRConfig:
        """Return the paper's rule: every query block of every head keeps its own `tau` of all mass, and no more."""
        return cls(tau=tau, scope="row", counted="all", skipped="dropped")

    @classmethod
    def fine(cls, tau: float = 0.95) -> RRConfig:
        """Return the rule that loses least for the blocks that it keeps: these are smaller, and scored more closely.

        To score them takes four times as long: at equal loss a call is hardly ever faster than by the default.
        """
        return cls(block_size=64, stride=4, tau=tau, counted="all")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them, equal to what was saved; weights only where there are some."""
        fields = asdict(self)
        weights = fields.pop("head_weights")
        return fields | ({"head_weights": [list(row) for row in weights]} if weights else {})

    def sparse(self, tokens: int, device: torch.device) -> bool:
        """Whether a prefill of so many tokens is long enough for `device` to gain by leaving out blocks."""
        return tokens >= self.least_tokens(device)

    def least_tokens(self, device: torch.device) -> int:
        """Return `min_tokens`, or what it is on `device` where nothing is set."""
        return MIN_TOKENS.get(device.type, MIN_TOKENS["cpu"]) if self.min_tokens is None else self.min_tokens

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


def _rows(weights: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Return `weights` as tuples; ValueError if they are no positive numbers, one for each head of each layer."""
    try:
        rows = tuple(tuple(float(weight) for weight in row) for row in weights)
    except (TypeError, OverflowError):
        raise ValueError(f"head_weights must be a row of numbers for each layer, got {weights!r}") from None
    wrong = [weight for row in rows for weight in row if not 0 < weight < math.inf]
    if wrong or len({len(row) for row in rows}) != 1 or not rows[0]:
        told = f"{wrong[0]!r} among them" if wrong else "rows of different lengths, or none"
        raise ValueError(f"head_weights must be positive, as many in each layer, got {told}")
    return rows


# By name; each takes `tau`.
RULES: dict[str, Callable[..., RRConfig]] = {"default": RRConfig, "paper": RRConfig.paper, "fine": RRConfig.fine}
