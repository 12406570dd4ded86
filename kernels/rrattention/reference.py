"""RRAttention in plain PyTorch: the specification that every other backend is compared with.

    estimate   sample one query and average the keys in every stride, softmax between them, sum the mass block by block
    select     the smallest set of blocks that carries tau of that mass
    attend     exact softmax attention over the kept blocks, and over one mean key and value for each of the others

Written to be read, not to be fast. Memory grows with (length / stride)^2 in `estimate` and with length elsewhere:
`attend` gathers the kept blocks of one query block at a time. All sums are float32, or float64 for float64 inputs.

Shapes: B batch, H query heads, K key heads, G = H / K query heads to a key head, L length, D head dim, S stride.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rrattention.blocks import BlockGrid, BlockSelection
from rrattention.config import RRConfig, Skipped


def estimate(query: Tensor, key: Tensor, grid: BlockGrid, *, stride: int, scale: float) -> Tensor:
    """Score each key block for each query block: the attention mass that sampled queries give to pooled keys.

    Returns [B, H, query_blocks, key_blocks], float32 or the inputs' dtype where that is wider, in units of sampled
    queries: a full row sums to block_size / stride.
    """
    accumulate = torch.promote_types(query.dtype, torch.float32)
    query = _query_to_grid(query, grid)
    key = _key_to_grid(key, grid).to(accumulate)

    # 1. Sample: head h looks at row h mod S of every stride, so that S heads together see every row.
    heads = torch.arange(query.shape[1], device=query.device)
    rows = torch.arange(0, query.shape[2], stride, device=query.device) + heads[:, None] % stride  # [H, samples]
    samples = query[:, heads[:, None], rows].to(accumulate)  # [B, H, samples, D]

    # 2. Pool: the mean key of every stride. Past the last key are zeros.
    pooled = key.unflatten(2, (-1, stride)).mean(dim=3)  # [B, K, strides, D]

    # 3. Softmax over the strides whose first key the sampled query may see.
    position = rows + (grid.first_query_block * grid.block_size)[:, None, None]  # [B, H, samples]
    first_key = torch.arange(0, key.shape[2], stride, device=query.device)  # [strides]
    seen = first_key < grid.length[:, None, None, None]
    if grid.causal:
        seen = seen & (first_key <= position[..., None])
    grouped = samples.unflatten(1, (key.shape[1], -1))  # [B, K, G, samples, D]
    logits = scale * torch.einsum("bkgid, bkjd -> bkgij", grouped, pooled).flatten(1, 2)  # [B, H, samples, strides]
    mass = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    # Samples that fell outside this call's queries say nothing.
    real = (position >= grid.first_position[:, None, None]) & (position < grid.length[:, None, None])
    mass = mass.masked_fill(~real[..., None], 0.0)

    # 4. Sum block by block.
    per_block = grid.block_size // stride
    columns = mass.unflatten(3, (grid.key_blocks, per_block)).sum(dim=4)
    return columns.unflatten(2, (grid.query_blocks, per_block)).sum(dim=3)


def select(scores: Tensor, grid: BlockGrid, config: RRConfig, head_weights: Tensor | None = None) -> BlockSelection:
    """Keep the smallest set of visible blocks that holds the mandatory ones and carries tau of the mass that counts.

    With `head_weights` [H] the smallest of those that leave out up to 1 - tau of it, each head's by its weight.
    `scores` are those of `estimate`. A query block that no query was sampled from (it has fewer rows than a stride)
    keeps every block that it sees, and so does the last one with `dense_last_block`.
    """
    heads = scores.shape[1]
    visible = grid.visible()[:, None].expand_as(scores)
    mandatory = grid.mandatory()[:, None].expand_as(scores)
    total = scores.sum(dim=-1, keepdim=True)
    counted = scores if config.counted == "all" else scores.masked_fill(mandatory, 0.0)

    if config.tau == 1.0:
        kept = visible  # not left to sums: rounding could reach the total before the smallest blocks
    elif config.scope == "row":
        kept = _smallest_set(
            counted, mandatory, config.tau, None if head_weights is None else head_weights[:, None, None]
        )
    else:
        # Every head brings a mass of one to its query block, and all the heads' blocks compete for tau of what counts.
        share = (counted / total.clamp(min=torch.finfo(scores.dtype).tiny)).transpose(1, 2).flatten(2)
        weights = None if head_weights is None else head_weights.repeat_interleave(grid.key_blocks)
        pool = _smallest_set(share, mandatory.transpose(1, 2).flatten(2), config.tau, weights)
        kept = pool.unflatten(2, (heads, -1)).transpose(1, 2)

    everything = total == 0
    if config.dense_last_block:
        everything = everything | grid.last_row()[:, None]
    return BlockSelection.from_mask((kept | everything) & visible, grid)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float,
    skipped: Skipped = "dropped",
) -> Tensor:
    """Softmax attention of each query block over its kept blocks, in float32 at least, one query block at a time.

    With `skipped="pooled"` the mean key and the mean value of every whole block that is visible and not kept take part,
    too, with the weight of `block_size` keys. Returns [B, H, Lq, D] in the dtype of `query`; rows that see no key,
    padding among them, are zeros.
    """
    grid, size = selection.grid, selection.grid.block_size
    accumulate = torch.promote_types(query.dtype, torch.float32)
    query_blocks = _query_to_grid(query, grid).unflatten(2, (-1, size))  # [B, H, query_blocks, block, D]
    # One block of zeros past the end, which no query sees: where a head's list is shorter than the longest, it goes on
    # with that one.
    key_blocks = _key_to_grid(key, grid, spare=1).unflatten(2, (-1, size))  # [B, K, key_blocks + 1, block, D]
    value_blocks = _key_to_grid(value, grid, spare=1).unflatten(2, (-1, size))

    row = torch.arange(size, device=query.device)
    query_position = grid.query_block() * size + row  # [B, query_blocks, block]
    length = grid.length[:, None, None, None]
    sequence = torch.arange(query.shape[0], device=query.device)[:, None, None]
    key_head = torch.arange(query.shape[1], device=query.device)[:, None] // (query.shape[1] // key.shape[1])

    mean_keys, mean_values = (x[:, key_head[:, 0]].to(accumulate).mean(dim=3) for x in (key_blocks, value_blocks))
    stands_in = selection.left_out()  # [B, H, query_blocks, key_blocks]

    out = torch.zeros_like(query_blocks)
    for m, width in enumerate(selection.counts.amax(dim=(0, 1)).tolist()):
        listed = torch.arange(width, device=query.device) < selection.counts[:, :, m, None]
        blocks = selection.indices[:, :, m, :width].long().where(listed, grid.key_blocks)  # [B, H, width]
        keys = key_blocks[sequence, key_head, blocks].flatten(2, 3).to(accumulate)  # [B, H, width * block, D]
        values = value_blocks[sequence, key_head, blocks].flatten(2, 3).to(accumulate)
        key_position = (blocks[..., None] * size + row).flatten(2)[:, :, None]  # [B, H, 1, width * block]
        hidden = key_position >= length
        if grid.causal:
            hidden = hidden | (key_position > query_position[:, None, m, :, None])

        queries = scale * query_blocks[:, :, m].to(accumulate)
        scores = queries @ keys.mT  # [B, H, block, width * block]
        if skipped == "pooled":  # exp(score + log(size)) is the weight of `size` keys
            scores = torch.cat([scores, queries @ mean_keys[:, :, :-1].mT + math.log(size)], dim=-1)
            values = torch.cat([values, mean_values[:, :, :-1]], dim=2)
            mean_hidden = ~stands_in[:, :, m, None].expand(-1, -1, size, -1)
            hidden = torch.cat([hidden.expand(-1, -1, size, -1), mean_hidden], dim=-1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0.0)
        out[:, :, m] = (weights @ values).to(query.dtype)
    return _shift_rows(out.flatten(2, 3), grid.first_position - grid.first_query_block * size, query.shape[2])


def _smallest_set(mass: Tensor, mandatory: Tensor, tau: float, weights: Tensor | None) -> Tensor:
    """The fewest entries of the last dimension that hold the mandatory ones and carry tau of the mass, as bool.

    With `weights` those that leave out up to 1 - tau of it, by its weight.
    """
    enough = tau * mass.sum(dim=-1, keepdim=True)
    if weights is not None:
        out = (1 - tau) * mass.sum(dim=-1, keepdim=True)
        mass = mass * weights
        enough = mass.sum(dim=-1, keepdim=True) - out
    order = mass.masked_fill(mandatory, torch.inf).argsort(dim=-1, descending=True, stable=True)
    carried = mass.gather(-1, order).cumsum(dim=-1)
    needed = functional.pad(carried[..., :-1], (1, 0)) < enough  # while those ranked higher do not carry enough
    return torch.zeros_like(mandatory).scatter(-1, order, needed) | mandatory


def _query_to_grid(query: Tensor, grid: BlockGrid) -> Tensor:
    """Lay query rows out so that whole blocks begin at multiples of the block size."""
    start = grid.first_query_block * grid.block_size - grid.first_position
    return _shift_rows(query, start, grid.query_blocks * grid.block_size)


def _key_to_grid(key: Tensor, grid: BlockGrid, spare: int = 0) -> Tensor:
    """Lay keys or values out so that row 0 is position 0, with `spare` blocks of zeros after the last."""
    return _shift_rows(key, grid.key_length - grid.length, (grid.key_blocks + spare) * grid.block_size)


def _shift_rows(rows: Tensor, start: Tensor, length: int) -> Tensor:
    """Return `length` rows, of which row t of sequence b is `rows[b, :, t + start[b]]`, or zeros outside."""
    source = torch.arange(length, device=rows.device) + start[:, None]  # [B, length]
    inside = (source >= 0) & (source < rows.shape[2])
    index = source.clamp(0, rows.shape[2] - 1)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    return rows.gather(2, index).masked_fill(~inside[:, None, :, None], 0.0)
