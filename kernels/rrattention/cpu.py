"""The three stages, fast on CPUs: plain PyTorch in large batched steps, nothing to compile.

What makes it fast, each point measured against its alternatives:

- Query blocks that keep equally many key blocks are one batch, whatever head they belong to: no padding.
- Scores are kept transposed, [keys, queries]. Both products then have the shape that CPU matrix libraries are fastest
  at, and the softmax reduces over the leading dimension, which vectorises over queries.
- A batch is no larger than the caches, and its buffers are made once: fresh memory costs more than the softmax does.
- Powers of two instead of `exp`, which is several times slower. Half precision is computed in float32, which is faster.

Shapes: B batch, H query heads, K key heads, G = H / K query heads to a key head, L length, D head dim, S stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from rrattention.blocks import BlockGrid, BlockSelection
from rrattention.config import RRConfig

SCORES_PER_THREAD = 1 << 18  # of one step: 1 MiB of float32
STEP_KEYS = 1024  # of one step for each query, at least; fewer would not keep the matrix products busy
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x log2 e)
LARGEST_EXPONENT = 80  # 2^80, times values, summed over a million keys, is far from overflow


@torch.no_grad()
def estimate(query: Tensor, key: Tensor, grid: BlockGrid, *, stride: int, scale: float) -> Tensor:
    """Score each key block for each query block: the attention mass that sampled queries give to pooled keys.

    Returns [B, H, query_blocks, key_blocks], float32 or the inputs' dtype where that is wider. A few query blocks at a
    time, so that memory is linear in the length.
    """
    accumulate = torch.promote_types(query.dtype, torch.float32)
    (batch, heads), key_heads, per_block = query.shape[:2], key.shape[1], grid.block_size // stride
    row = torch.arange(0, grid.query_blocks * grid.block_size, stride, device=query.device)
    row = row + torch.arange(heads, device=query.device)[:, None] % stride  # [H, samples]
    position = row + (grid.first_query_block * grid.block_size)[:, None, None]  # [B, H, samples]
    first_position, length = grid.first_position[:, None, None], grid.length[:, None, None]
    real = ((position >= first_position) & (position < length)).unflatten(1, (key_heads, -1))  # [B, K, G, samples]
    last_key = position.minimum(length - 1) if grid.causal else (length - 1).expand_as(position)  # that a sample sees
    last_key = last_key.unflatten(1, (key_heads, -1))
    first_key = torch.arange(0, grid.key_blocks * grid.block_size, stride, device=query.device)[:, None]  # [strides, 1]

    source = (position - first_position).clamp(0, query.shape[2] - 1)
    sequence, head = torch.arange(batch, device=query.device), torch.arange(heads, device=query.device)
    samples = query[sequence[:, None, None], head[:, None], source].to(accumulate)  # [B, H, samples, D]
    samples = (samples * (scale * LOG2_E)).unflatten(1, (key_heads, -1))
    pooled = _key_to_grid(key, grid).to(accumulate).unflatten(2, (-1, stride)).mean(dim=3)  # [B, K, strides, D]

    scores = samples.new_zeros(batch, heads, grid.query_blocks, grid.key_blocks)
    prefix_blocks = (grid.key_length - grid.query_length) // grid.block_size  # padding only makes it fewer
    step = max(1, _budget() // (batch * heads * per_block * len(first_key)))
    for start in range(0, grid.query_blocks, step):
        stop = min(start + step, grid.query_blocks)
        blocks = min(prefix_blocks + stop, grid.key_blocks) if grid.causal else grid.key_blocks  # none sees beyond
        chunk = slice(start * per_block, stop * per_block)
        sampled = samples[:, :, :, chunk].flatten(2, 3).mT.contiguous()  # [B, K, D, G * samples]
        logits = pooled[:, :, : blocks * per_block] @ sampled  # [B, K, strides, G * samples]

        # Every sample of the chunk sees the blocks before this one whole.
        border = min(prefix_blocks + start, blocks - 1) if grid.causal else blocks - 1
        unsure = slice(border * per_block if grid.kv_start is None else 0, blocks * per_block)
        hidden = first_key[unsure] > last_key[:, :, :, chunk].flatten(2, 3)[:, :, None]
        logits[:, :, unsure].masked_fill_(hidden, -torch.inf)

        logits.sub_(logits.amax(dim=2, keepdim=True)).exp2_()
        mass = logits.unflatten(2, (-1, per_block)).sum(dim=3)  # [B, K, blocks, G * samples]
        mass.div_(mass.sum(dim=2, keepdim=True)).masked_fill_(~real[:, :, :, chunk].flatten(2, 3)[:, :, None], 0.0)
        rows = mass.unflatten(3, (-1, stop - start, per_block)).sum(dim=5)  # [B, K, blocks, G, rows]
        scores[:, :, start:stop, :blocks] = rows.permute(0, 1, 3, 4, 2).flatten(1, 2)
    return scores


@torch.no_grad()
def select(scores: Tensor, grid: BlockGrid, config: RRConfig) -> BlockSelection:
    """Keep the smallest set of visible blocks that holds the mandatory ones and carries tau of the mass.

    Query blocks without any mass, which no query was sampled from, keep every block that they see.
    """
    visible, mandatory = grid.visible()[:, None], grid.mandatory()[:, None]  # [B, 1, query_blocks, key_blocks]
    total = scores.sum(dim=-1, keepdim=True)
    everything = total == 0
    if config.dense_last_block:
        everything = everything | grid.last_row()[:, None]
    if config.tau == 1.0:  # not left to sums: rounding could reach the total before the smallest blocks
        return BlockSelection.from_mask(visible.expand_as(scores), grid)

    if config.scope == "heads":  # one list for all heads, [B, query_blocks, H * key_blocks]
        mass = (scores / total.clamp(min=torch.finfo(scores.dtype).tiny)).transpose(1, 2).flatten(2)
        must = mandatory.expand_as(scores).transpose(1, 2).flatten(2)
        target = config.tau * mass.sum(dim=-1, keepdim=True)
    else:
        mass, must, target = scores, mandatory, config.tau * total
    given = mass.where(must, 0.0).sum(dim=-1, keepdim=True)
    largest, order = mass.masked_fill(must, 0.0).sort(dim=-1, descending=True, stable=True)
    carried = given + functional.pad(largest, (1, -1)).cumsum(dim=-1)  # before each is taken
    taken = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, carried < target)
    if config.scope == "heads":
        taken = taken.unflatten(2, (scores.shape[1], -1)).transpose(1, 2)
    return BlockSelection.from_mask((taken | mandatory | everything) & visible, grid)


@torch.no_grad()
def attend(query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, *, scale: float) -> Tensor:
    """Softmax attention of each query block over its kept blocks, in float32 at least.

    Returns [B, H, Lq, D] in the dtype of `query`; rows that see no key, padding among them, are zeros.
    """
    grid, size = selection.grid, selection.grid.block_size
    accumulate = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, _, dim), group = query.shape, query.shape[1] // key.shape[1]
    # [B * K * key_blocks, block * D]
    keys, values = (_key_to_grid(x, grid).to(accumulate).reshape(-1, size * dim) for x in (key, value))

    # From here on a row is one query block of one head and sequence: [B * H * query_blocks, ...].
    query_rows = _query_to_grid(query, grid).reshape(-1, size, dim)
    counts, indices = selection.counts.flatten(), selection.indices.flatten(0, 2)
    per_row = (batch, heads, grid.query_blocks)
    own_block = grid.query_block()[:, None, :, 0].expand(per_row).flatten()
    length = grid.length[:, None, None].expand(per_row).flatten()
    key_head = torch.arange(len(counts), dtype=torch.int32) // grid.query_blocks // group
    token = torch.arange(size)
    triangle = keys.new_zeros(size, size).masked_fill_(token[:, None] > token, -torch.inf)  # [keys, queries]

    room = max(1, _budget() // size**2)  # blocks of one step
    key_buffer, value_buffer = keys.new_empty(room, size * dim), keys.new_empty(room, size * dim)
    score_buffer = keys.new_empty(room, size, size)
    out = torch.zeros_like(query_rows)
    for count, rows in _batches(counts, room, max(1, STEP_KEYS // size)):
        queries = query_rows.index_select(0, rows).to(accumulate).mT.contiguous()  # [rows, D, block]
        queries *= scale * LOG2_E
        blocks = indices.index_select(0, rows)[:, :count]
        # Only the last block of a list can reach beyond the queries or the end. Queries beyond the end are no matter.
        if grid.causal:
            diagonal = blocks[:, -1] == own_block[rows]
            bias = triangle if diagonal.all() else triangle.where(diagonal[:, None, None], 0.0)
        else:
            beyond = blocks[:, -1:] * size + token >= length[rows, None]
            bias = keys.new_zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, :, None]  # [rows, keys, 1]

        blocks = blocks + key_head[rows, None] * grid.key_blocks
        mixed, total = keys.new_zeros(len(rows), size, dim), keys.new_zeros(len(rows), 1, size)
        peak, shifted = torch.full_like(total, -torch.inf), False
        steps = _ceil_div(count, max(1, room // len(rows)))
        for step, columns in enumerate(blocks.tensor_split(steps, dim=1)):
            listed = columns.flatten()
            step_keys = torch.index_select(keys, 0, listed, out=key_buffer[: len(listed)]).view(len(rows), -1, dim)
            step_values = torch.index_select(values, 0, listed, out=value_buffer[: len(listed)]).view_as(step_keys)
            scores = score_buffer[: len(listed)].view(len(rows), -1, size)  # [rows, keys, block]
            torch.bmm(step_keys, queries, out=scores)
            if step == steps - 1:
                scores[:, -size:] += bias
            # Scores are taken relative to the highest so far, but only where their powers could leave the range.
            highest = scores.amax(dim=1, keepdim=True)
            shifted = shifted or bool(highest.abs().amax() > LARGEST_EXPONENT)
            previous, peak = peak, peak.maximum(highest) if shifted else torch.zeros_like(peak)
            if shifted:
                fade = (previous - peak).exp2_()
                mixed, total = mixed.mul_(fade.mT), total.mul_(fade)
                scores.sub_(peak)
            total += scores.exp2_().sum(dim=1, keepdim=True)
            mixed.baddbmm_(scores.mT, step_values)
        out.index_copy_(0, rows, mixed.div_(total.mT).to(query.dtype))
    return _shift_rows(out.view(batch, heads, -1, dim), -_query_start(grid), query.shape[2])


def _batches(counts: Tensor, room: int, narrow: int) -> Iterator[tuple[int, Tensor]]:
    """Yield a number of blocks and rows that keep so many: as many rows as can take `narrow` blocks each in a step."""
    order = counts.argsort(stable=True)
    widths, sizes = counts[order].unique_consecutive(return_counts=True)
    for count, rows in zip(widths.tolist(), order.split(sizes.tolist()), strict=True):
        if count:
            at_once = _ceil_div(count, _ceil_div(count, narrow))  # blocks of a row, in steps of equal size
            yield from ((count, part) for part in rows.split(max(1, room // at_once)))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _budget() -> int:
    """How many scores to compute at a time."""
    return SCORES_PER_THREAD * torch.get_num_threads()


def _query_start(grid: BlockGrid) -> int | Tensor:
    """Which query row begins the first query block: negative where that block began before this call."""
    if grid.kv_start is None:
        return -((grid.key_length - grid.query_length) % grid.block_size)
    return grid.first_query_block * grid.block_size - grid.first_position


def _query_to_grid(query: Tensor, grid: BlockGrid) -> Tensor:
    return _shift_rows(query, _query_start(grid), grid.query_blocks * grid.block_size)


def _key_to_grid(key: Tensor, grid: BlockGrid) -> Tensor:
    return _shift_rows(key, 0 if grid.kv_start is None else grid.kv_start, grid.key_blocks * grid.block_size)


def _shift_rows(rows: Tensor, start: int | Tensor, length: int) -> Tensor:
    """Return `length` rows, of which row t of sequence b is `rows[b, :, t + start[b]]`, or zeros outside."""
    if isinstance(start, int):
        if start == 0 and length == rows.shape[2]:
            return rows
        return functional.pad(rows, (0, 0, -start, start + length - rows.shape[2]))
    source = torch.arange(length, device=rows.device) + start[:, None]  # [B, length]
    inside = (source >= 0) & (source < rows.shape[2])
    source = source.clamp(0, rows.shape[2] - 1)
    shifted = torch.stack([sequence.index_select(1, index) for sequence, index in zip(rows, source, strict=True)])
    return shifted.masked_fill_(~inside[:, None, :, None], 0.0)
