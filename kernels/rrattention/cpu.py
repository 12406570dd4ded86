"""The three stages, fast on CPUs: plain PyTorch in large batched steps, nothing to compile.

What makes it fast, each point measured against its alternatives:

- Query blocks that keep equally many key blocks are one batch, whatever head they belong to: no padding.
- Scores are kept transposed, [keys, queries]. Both products then have the shape that CPU matrix libraries are fastest
  at, and the softmax reduces over the leading dimension, which vectorises over queries.
- A step works on what fits in the caches, and its buffers are made once: fresh memory costs more than the softmax does.
- Powers of two instead of `exp`, which is several times slower, and relative to the highest score only where they would
  leave the range of float32 otherwise.

Half precision is computed in float32: bfloat16 products are faster, but they round the scores.

Shapes: B batch, H query heads, K key heads, G = H / K query heads to a key head, L length, D head dim, S stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from rrattention.blocks import BlockGrid, BlockSelection
from rrattention.config import RRConfig, Skipped

SCORES_PER_THREAD = 1 << 18  # of one step: 1 MiB of float32
STEP_KEYS = 1024  # of one step for each query, at least; fewer would not keep the matrix products busy
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x log2 e)
LARGEST_EXPONENT = 80  # of a sum of powers, either sign: float32 then keeps all that matters, values in it too


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
    last_key = position if grid.causal else (length - 1).expand_as(position)  # that a sample sees
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
    """Keep the smallest set of visible blocks that holds the mandatory ones and carries tau of the mass that counts.

    Query blocks without any mass, which no query was sampled from, keep every block that they see.
    """
    visible, mandatory = grid.visible()[:, None], grid.mandatory()[:, None]  # [B, 1, query_blocks, key_blocks]
    total = scores.sum(dim=-1, keepdim=True)
    everything = total == 0
    if config.dense_last_block:
        everything = everything | grid.last_row()[:, None]
    if config.tau == 1.0:  # not left to sums: rounding could reach the total before the smallest blocks
        return BlockSelection.from_mask(visible.expand_as(scores), grid)

    mass, must = scores, mandatory
    if config.counted == "choice":
        mass = mass.masked_fill(must, 0.0)
    if config.scope == "heads":  # one list for all heads, [B, query_blocks, H * key_blocks]
        mass = (mass / total.clamp(min=torch.finfo(scores.dtype).tiny)).transpose(1, 2).flatten(2)
        must = mandatory.expand_as(scores).transpose(1, 2).flatten(2)
    target = config.tau * mass.sum(dim=-1, keepdim=True)
    given = mass.where(must, 0.0).sum(dim=-1, keepdim=True)
    largest, order = mass.masked_fill(must, 0.0).sort(dim=-1, descending=True, stable=True)
    carried = given + functional.pad(largest, (1, -1)).cumsum(dim=-1)  # before each is taken
    taken = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, carried < target)
    if config.scope == "heads":
        taken = taken.unflatten(2, (scores.shape[1], -1)).transpose(1, 2)
    return BlockSelection.from_mask((taken | mandatory | everything) & visible, grid)


@torch.no_grad()
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float,
    skipped: Skipped = "dropped",
) -> Tensor:
    """Softmax attention of each query block over its kept blocks, in float32 at least.

    With `skipped="pooled"` the mean key and value of every whole block that is visible and not kept take part, too.
    Returns [B, H, Lq, D] in the dtype of `query`; rows that see no key, padding among them, are zeros.
    """
    grid, size = selection.grid, selection.grid.block_size
    accumulate = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, _, dim), group = query.shape, query.shape[1] // key.shape[1]
    room = max(1, _budget() // size**2)  # blocks of one step
    keys, values = (_key_to_grid(x, grid).to(accumulate).reshape(-1, size, dim) for x in (key, value))
    mixer = _Mixer(keys, values, room)
    means = None
    if skipped == "pooled":
        mean_keys, mean_values = (x.mean(dim=1).view(-1, grid.key_blocks, dim) for x in (keys, values))  # [B * K, ...]
        left_out = selection.left_out().flatten(0, 2)  # [B * H * query_blocks, key_blocks]

    # From here on a row is one query block of one head and sequence, and rows that keep equally many blocks are
    # neighbours: [B * H * query_blocks, ...].
    query_rows = _query_to_grid(query, grid).reshape(-1, size, dim)
    counts, order = selection.counts.flatten().sort(stable=True)
    indices = selection.indices.flatten(0, 2).index_select(0, order)
    last = indices.gather(1, counts[:, None].long().sub(1).clamp(min=0))  # [rows, 1]
    first_block = order // grid.query_blocks // group * grid.key_blocks  # of the row's key head, among all
    blocks = indices + first_block.to(torch.int32)[:, None]

    # Only the last block of a list can reach beyond the queries or the end. Queries beyond the end are no matter.
    token = torch.arange(size)
    per_row = (batch, heads, grid.query_blocks)
    if grid.causal:
        own = grid.query_block()[:, None, :, 0].expand(per_row).flatten()[order, None]
        on_diagonal = (last == own) | (counts == 0)[:, None]  # [rows, 1]
        hidden = (token[:, None] > token)[None]  # [1, keys of a block, queries of a block]
        if not on_diagonal.all():  # a selection of the caller's own
            hidden = hidden & on_diagonal[:, None]
    else:
        length = grid.length[:, None, None].expand(per_row).flatten()[order, None]
        hidden = (last * size + token >= length)[:, :, None]  # [rows, keys of a block, 1]
    bias = keys.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

    out, shifted = torch.zeros_like(query_rows), False
    for count, part in _batches(counts, room, max(1, STEP_KEYS // size)):
        queries = query_rows.index_select(0, order[part]).to(accumulate).mT.contiguous()  # [rows, D, block]
        queries *= scale * LOG2_E
        listed = queries, blocks[part, :count], bias if len(bias) == 1 else bias[part]
        if skipped == "pooled":
            rows = order[part]
            key_head = rows // grid.query_blocks // group
            hidden_means = left_out[rows].logical_not_()[:, :, None]
            means = mean_keys[key_head], mean_values[key_head], hidden_means
        mixed, total = mixer.mix(*listed, means, shifted=shifted)
        if not shifted and not total.log2().abs().amax() < LARGEST_EXPONENT:  # NaN and infinity included
            shifted = True  # and stays so: where one batch needs it, others do
            mixed, total = mixer.mix(*listed, means, shifted=True)
        out.index_copy_(0, order[part], mixed.div_(total.mT).to(query.dtype))
    return _shift_rows(out.view(batch, heads, -1, dim), -_query_start(grid), query.shape[2])


class _Mixer:
    """Keys and values in blocks, [blocks, block, D], and buffers for `room` blocks of them at a time."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        (_, self.size, self.dim), self.room = keys.shape, room
        self.keys, self.values = keys.flatten(1), values.flatten(1)
        self.key_buffer, self.value_buffer = (self.keys.new_empty(room, self.size * self.dim) for _ in range(2))
        self.score_buffer = keys.new_empty(room, self.size, self.size)

    def mix(
        self,
        queries: Tensor,
        blocks: Tensor,
        bias: Tensor,
        means: tuple[Tensor, Tensor, Tensor] | None,
        *,
        shifted: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of 2^score * value over the listed blocks, [rows, block, D], and of 2^score, [rows, 1, block].

        queries [rows, D, block], blocks [rows, n]; `bias` is added to the scores of the last, [block, block] each.
        `means` are keys and values [rows, n, D] that stand for a block each, and which of them do not, [rows, n, 1].
        With `shifted`, scores are taken relative to each query's highest: their powers then never leave the range.
        """
        rows = len(blocks)
        mixed, total = queries.new_zeros(rows, self.size, self.dim), queries.new_zeros(rows, 1, self.size)
        peak = torch.full_like(total, -torch.inf)
        for scores, values in self._steps(queries, blocks, bias, means):
            if shifted:
                previous, peak = peak, peak.maximum(scores.amax(dim=1, keepdim=True))
                fade = (previous - peak).exp2_()
                mixed, total = mixed.mul_(fade.mT), total.mul_(fade)
                scores.sub_(peak)
            total += scores.exp2_().sum(dim=1, keepdim=True)
            mixed.baddbmm_(scores.mT, values)
        return mixed, total

    def _steps(
        self, queries: Tensor, blocks: Tensor, bias: Tensor, means: tuple[Tensor, Tensor, Tensor] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scores, [rows, keys, block], and the values [rows, keys, D] that they weigh; see `mix`."""
        rows, count = blocks.shape
        steps = math.ceil(count / max(1, self.room // rows))
        for step, columns in enumerate(blocks.tensor_split(steps, dim=1)):
            listed = columns.flatten()
            keys = torch.index_select(self.keys, 0, listed, out=self.key_buffer[: len(listed)]).view(rows, -1, self.dim)
            values = torch.index_select(self.values, 0, listed, out=self.value_buffer[: len(listed)]).view_as(keys)
            scores = self.score_buffer[: len(listed)].view(rows, -1, self.size)
            torch.bmm(keys, queries, out=scores)
            if step == steps - 1:
                scores[:, -self.size :] += bias
            yield scores, values
        if means is not None:
            mean_keys, mean_values, hidden = means
            scores = torch.bmm(mean_keys, queries).add_(math.log2(self.size))  # of as many keys as a block has
            yield scores.masked_fill_(hidden, -torch.inf), mean_values


def _batches(counts: Tensor, room: int, narrow: int) -> Iterator[tuple[int, slice]]:
    """Yield the runs of equal `counts`, cut so that a step has room for `narrow` blocks of each row, or for all."""
    start = 0
    for count, rows in zip(*(x.tolist() for x in counts.unique_consecutive(return_counts=True)), strict=True):
        if count:
            at_once = math.ceil(count / math.ceil(count / narrow))  # blocks of a row, in steps of equal size
            batch = room // at_once
            batch = max(batch - batch % torch.get_num_threads(), 1)  # every thread gets equally many matrices
            yield from ((count, slice(at, min(at + batch, start + rows))) for at in range(start, start + rows, batch))
        start += rows


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
