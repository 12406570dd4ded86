"""Other ways to choose blocks, in short PyTorch written from their papers: what RRAttention is compared with.

    RRAttention     round-robin queries against pooled keys: by our rule, by the paper's, and by what lies between
    XAttention      antidiagonal scoring (arXiv 2503.16428, section 2.1)
    FlexPrefill     the last block of queries speaks for all others (arXiv 2502.20766, algorithms 1 to 4)
    oracle          the true mass of every block: what an estimate could reach at best under the same rule
    random          as many blocks in each row as RRAttention keeps there, drawn at random

Each is a `Method`: from query [B, H, L, D] and key [B, K, L, D] of one unpadded causal call to a `BlockSelection`.
All but FlexPrefill and random score the blocks of a `BlockGrid` and share `rrattention.select`, which is XAttention's
own rule too: the sink, the diagonal, then largest first up to tau. Left out, so that all have the same knobs:
XAttention's search for a tau of each head, and FlexPrefill's least number of blocks.

Shapes: B batch, H query heads, K key heads, L length, D head dim, M query blocks, N key blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rrattention import BlockGrid, BlockSelection, RRConfig, estimate, select
from rrattention.config import Counted, Scope, Skipped

FINE = RRConfig.fine()
FLEX_TAU = 0.1  # FlexPrefill's bound on the divergence up to which pooled queries and keys are believed

Method = Callable[[Tensor, Tensor, BlockGrid, RRConfig, float], BlockSelection]  # query, key, grid, config, scale


def rrattention(query: Tensor, key: Tensor, grid: BlockGrid, config: RRConfig, scale: float) -> BlockSelection:
    """What `rr_attention` keeps under `config`."""
    return _select(estimate(query, key, config=config, scale=scale), grid, config)


class Way(NamedTuple):
    """How blocks are chosen, what becomes of the others, and how large blocks and strides are."""

    choose: Method
    skipped: Skipped = "dropped"
    block_size: int = 128
    stride: int = 8
    weighted: bool = False  # each head by the weight that a checkpoint was found to give it

    def config(self, tau: float, head_weights: Sequence[float] | None = None) -> RRConfig:
        """The settings that `choose` is called with in a layer of these `head_weights`, sparse at any length."""
        weights = (tuple(head_weights),) if self.weighted and head_weights else None
        return RRConfig(self.block_size, self.stride, tau=tau, head_weights=weights, min_tokens=0)


def by(scope: Scope, counted: Counted, method: Method) -> Method:
    """The same method where `scope` says who shares one tau, and `counted` of which mass it is a share."""

    def keep(query: Tensor, key: Tensor, grid: BlockGrid, config: RRConfig, scale: float) -> BlockSelection:
        return method(query, key, grid, replace(config, scope=scope, counted=counted), scale)

    return keep


def xattention(stride: int) -> Method:
    """Antidiagonal scoring with tiles of `stride` x `stride`."""

    def keep(query: Tensor, key: Tensor, grid: BlockGrid, config: RRConfig, scale: float) -> BlockSelection:
        return _select(antidiagonal_scores(query, key, grid, scale=scale, stride=stride), grid, config)

    return keep


def antidiagonal_scores(query: Tensor, key: Tensor, grid: BlockGrid, *, scale: float, stride: int) -> Tensor:
    """Score blocks [B, H, M, N]: softmax over the mean logits on each tile's antidiagonal, summed block by block."""
    length, size = grid.query_length, grid.block_size
    padding = (0, 0, 0, -length % size)
    query, key = functional.pad(query.float(), padding), functional.pad(key.float(), padding)
    # Query stride - 1 - l of a tile meets its key l: one product of concatenated rows sums the whole antidiagonal.
    rows = query.unflatten(2, (-1, stride)).flip(3).flatten(3)  # [B, H, strides, stride * D]
    columns = key.unflatten(2, (-1, stride)).flatten(3)  # [B, K, strides, stride * D]
    tile = torch.arange(rows.shape[2], device=query.device)
    mass = _causal_softmax(rows, columns, tile, scale / stride)
    mass = mass.masked_fill(tile[:, None] * stride >= length, 0.0)
    per_block = size // stride
    return mass.unflatten(3, (-1, per_block)).sum(4).unflatten(2, (-1, per_block)).sum(3)


def oracle(query: Tensor, key: Tensor, grid: BlockGrid, config: RRConfig, scale: float) -> BlockSelection:
    """The best choice of blocks by their mass: the smallest set that really carries tau."""
    return _select(block_mass(query, key, grid, scale=scale), grid, config)


def block_mass(query: Tensor, key: Tensor, grid: BlockGrid, *, scale: float) -> Tensor:
    """The true attention mass of blocks, [B, H, M, N] float32, summed over the rows of the query block."""
    size, length = grid.block_size, grid.query_length
    mass = torch.zeros(*query.shape[:2], grid.query_blocks, grid.key_blocks, device=query.device)
    for m in range(grid.query_blocks):
        stop = min((m + 1) * size, length)
        row = torch.arange(m * size, stop, device=query.device)
        weights = _causal_softmax(query[:, :, m * size : stop].float(), key[:, :, :stop].float(), row, scale)
        mass[:, :, m, : m + 1] = _sum_blocks(weights.sum(dim=2), size)
    return mass


def random_blocks(query: Tensor, key: Tensor, grid: BlockGrid, config: RRConfig, scale: float) -> BlockSelection:
    """As many blocks in each row as RRAttention keeps there: the mandatory ones, and others drawn at random."""
    counts = rrattention(query, key, grid, config, scale).counts
    random = torch.Generator(query.device).manual_seed(0)
    order = torch.rand(*counts.shape, grid.key_blocks, generator=random, device=query.device)
    order = order.masked_fill(grid.mandatory()[:, None], 2.0).masked_fill(~grid.visible()[:, None], -1.0)
    rank = order.argsort(dim=-1, descending=True).argsort(dim=-1)
    return BlockSelection.from_mask(rank < counts[..., None], grid)


def flexprefill(query: Tensor, key: Tensor, grid: BlockGrid, config: RRConfig, scale: float) -> BlockSelection:
    """Let the last block of queries choose: its columns and distances, or pooled scores where they agree with it.

    A head is *query-aware* where pooled queries and keys spread the last block's mass nearly as it really spreads:
    then the smallest set over its whole map carries tau of the pooled mass. Else it is *vertical-slash*: the columns
    and the distances that carry tau of the last block's mass, each, are kept for all queries. Columns and distances are
    counted in blocks here.
    """
    size, length, tau = grid.block_size, grid.query_length, config.tau
    first = (grid.query_blocks - 1) * size
    row = torch.arange(first, length, device=query.device)
    weights = _causal_softmax(query[:, :, first:].float(), key.float(), row, scale)  # [B, H, rows, L]
    columns = _sum_blocks(weights.mean(dim=2), size)  # [B, H, N], sums to 1

    pooled_query, pooled_key = _mean_blocks(query.float(), size), _mean_blocks(key.float(), size)
    block = torch.arange(grid.query_blocks, device=query.device)
    pooled = _causal_softmax(pooled_query, pooled_key, block, scale)  # [B, H, M, N]
    query_aware = _divergence(pooled[:, :, -1], columns).sqrt() < FLEX_TAU  # [B, H]
    aware = _smallest_set(pooled.flatten(2), tau).unflatten(2, pooled.shape[2:])

    distance = row[:, None] - torch.arange(length, device=query.device)  # [rows, L]
    slashes = torch.zeros_like(columns).index_add_(
        2, distance.clamp(min=0).flatten() // size, weights.flatten(2) / len(row)
    )
    vertical, slash = _smallest_set(columns, tau), _smallest_set(slashes, tau)  # [B, H, N]
    apart = (block[:, None] - block).clamp(min=0)  # [M, N]
    # Distances of one block lie on two diagonals of tiles.
    lines = vertical[:, :, None] | slash[:, :, apart] | slash[:, :, (apart - 1).clamp(min=0)]

    kept = torch.where(query_aware[..., None, None], aware, lines) | grid.mandatory()[:, None]
    if config.dense_last_block:
        kept = kept | grid.last_row()[:, None]
    return BlockSelection.from_mask(kept & grid.visible()[:, None], grid)


METHODS = {
    "RRAttention": Way(by("heads", "choice", rrattention), "pooled"),
    "RRAttention fine": Way(by("heads", "all", rrattention), "pooled", FINE.block_size, FINE.stride),
    "RRAttention weighted": Way(by("heads", "choice", rrattention), "pooled", weighted=True),
    "RRAttention fine weighted": Way(by("heads", "all", rrattention), "pooled", FINE.block_size, FINE.stride, True),
    "RRAttention dropped": Way(by("heads", "choice", rrattention)),
    "RRAttention all": Way(by("heads", "all", rrattention)),
    "RRAttention paper": Way(by("row", "all", rrattention)),
    "XAttention 8": Way(by("row", "all", xattention(8))),
    "XAttention 16": Way(by("row", "all", xattention(16))),
    "FlexPrefill": Way(flexprefill),
    "oracle": Way(by("heads", "choice", oracle), "pooled"),
    "oracle paper": Way(by("row", "all", oracle)),
    "random": Way(by("row", "all", random_blocks)),
}


def _select(scores: Tensor, grid: BlockGrid, config: RRConfig) -> BlockSelection:
    return select(scores, grid.query_length, grid.key_length, config=config)


def _causal_softmax(query: Tensor, key: Tensor, row: Tensor, scale: float) -> Tensor:
    """Attention weights [B, H, rows, columns] of queries at positions `row` over all keys that they may see."""
    grouped = query.unflatten(1, (key.shape[1], -1))  # [B, K, H / K, rows, D]
    logits = scale * torch.einsum("bkgid, bkjd -> bkgij", grouped, key).flatten(1, 2)
    hidden = torch.arange(key.shape[2], device=key.device) > row[:, None]
    return logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)


def _sum_blocks(mass: Tensor, size: int) -> Tensor:
    """Sum the last dimension block by block."""
    return functional.pad(mass, (0, -mass.shape[-1] % size)).unflatten(-1, (-1, size)).sum(dim=-1)


def _mean_blocks(rows: Tensor, size: int) -> Tensor:
    """The mean row of every block, [B, H, blocks, D]; a ragged last block is averaged over what it has."""
    sums = _sum_blocks(rows.mT, size).mT
    counts = _sum_blocks(rows.new_ones(rows.shape[2]), size)
    return sums / counts[:, None]


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence over the last dimension, in nats."""
    middle = (p + q) / 2
    terms = [torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q)]
    return (terms[0] + terms[1]).sum(dim=-1) / 2


def _smallest_set(mass: Tensor, tau: float) -> Tensor:
    """The fewest entries of the last dimension that carry tau of its sum, as bool."""
    value, order = mass.sort(dim=-1, descending=True)
    before = value.cumsum(dim=-1) - value
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, before < tau * mass.sum(dim=-1, keepdim=True))
