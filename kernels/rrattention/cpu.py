"""The three stages, fast on CPUs: plain PyTorch in large batched steps, nothing to compile.

What makes it fast, each point measured against its alternatives:

- Kept blocks are copied to lie side by side, and PyTorch's own fused attention goes over them, for many query blocks at
  a time: lists of equal length are one batch, whatever head they belong to, without padding.
- What many query blocks keep, neighbours in one head and those of a group of heads, is copied once for all of them:
  where more queries see the same keys, that attention makes more of the processor.
- It passes over the keys several times, for some queries each time. So a list comes in parts that a core's own cache
  holds: on a server whose shared cache is busy with the work of others, reading them from there is what takes the time.
- It takes no mask there. The last block of each list, where one may be needed, and the means of what was left out are
  attended to apart. All these parts are joined by the logsumexps of their scores.
- A step works on what fits in the caches, and its buffers are made once: fresh memory costs more than copying does.

Estimates of half precision are made in float32. `attend` multiplies in the inputs' own dtype and sums in float32.

Shapes: B batch, H query heads, K key heads, G = H / K query heads to a key head, L length, D head dim, S stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from rrattention.blocks import BlockGrid, BlockSelection
from rrattention.config import RRConfig, Skipped

SCORES_PER_THREAD = 1 << 18  # of one step of `estimate`: 1 MiB of float32
COPIED_PER_THREAD = 1 << 18  # numbers of keys, and as many of values, of one step of `attend`
COPIED_PER_LIST = 1 << 16  # of which so many are for one list: 512 KiB of float32 with the values
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x log2 e)

# What scaled_dot_product_attention runs on CPUs. It also returns the logsumexp of each query's scores, [B, H, L].
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


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
    """Softmax attention of each query block over its kept blocks, as exact as PyTorch's own in the inputs' dtype.

    With `skipped="pooled"` the mean key and value of every whole block that is visible and not kept take part, too.
    Returns [B, H, Lq, D] in the dtype of `query`; rows that see no key, padding among them, are zeros.
    """
    grid, size = selection.grid, selection.grid.block_size
    (batch, heads, _, dim), group = query.shape, query.shape[1] // key.shape[1]
    blocks = tuple(_key_to_grid(x, grid).reshape(-1, size * dim) for x in (key, value))  # [B * K * key_blocks, ...]

    # From here on a row is one query block of one head and sequence, [B * H * query_blocks, ...].
    per_row = (batch, heads, grid.query_blocks)
    counts = selection.counts.flatten()
    key_head = torch.arange(len(counts)) // grid.query_blocks // group  # among those of all sequences
    first_block = (key_head * grid.key_blocks)[:, None]
    last = selection.indices.flatten(0, 2).gather(1, (counts[:, None].long() - 1).clamp(min=0))
    last = last.long().masked_fill_((counts == 0)[:, None], 0)  # [rows, 1]

    mixer = _Mixer(_query_to_grid(query, grid).reshape(-1, size, dim), scale)
    room, part = mixer.room, mixer.part

    # Only the last block of a list can reach beyond the queries or the end. Queries beyond the end are no matter.
    if grid.causal:
        own = grid.query_block()[:, None, :, 0].expand(per_row).flatten()
        on_diagonal = last[:, 0] == own  # but in a selection of the caller's own
        for causal, chosen in ((True, on_diagonal), (False, ~on_diagonal)):
            for rows in (chosen & (counts > 0)).nonzero()[:, 0].split(room):
                mixer.mix(rows[:, None], mixer.beside(blocks, first_block[rows] + last[rows]), causal=causal)
    else:
        length = grid.length[:, None, None].expand(per_row).flatten()[:, None]
        beyond = last * size + torch.arange(size) >= length  # [rows, keys of a block]
        for rows in counts.nonzero()[:, 0].split(room):
            mixer.mix(rows[:, None], mixer.beside(blocks, first_block[rows] + last[rows]), hidden=beyond[rows])
    if skipped == "pooled":
        means = tuple(_means(x.view(-1, grid.key_blocks, size, dim)) for x in blocks)  # [B * K, key_blocks, D]
        left_out = selection.left_out().flatten(0, 2)  # [rows, key_blocks]
        some = left_out.any(dim=1) & (counts > 0)
        for head in key_head[some].unique().tolist():
            for rows in (some & (key_head == head)).nonzero()[:, 0].split(room):
                reach = int(left_out[rows].any(dim=0).nonzero()[-1]) + 1
                seen = tuple(x[head, None, :reach].expand(len(rows), -1, -1) for x in means)
                mixer.mix(rows[:, None], [seen], hidden=~left_out[rows, :reach], stands_for=size)

    # What many queries keep is taken from their lists and attended to by them together, then what fewer do.
    kept = selection.mask().flatten(0, 2).scatter_(1, last, False)  # [rows, key_blocks]
    rows = torch.arange(len(counts)).view(-1, group, grid.query_blocks)  # of each key head
    for together in ((group, 2), (1, 8), (1, 2), (2, 1), (1, 1)):  # heads, query blocks
        windows = _windows(rows, *together)
        lists = kept[windows].all(dim=1)
        kept[windows.flatten()] &= ~lists.repeat_interleave(windows.shape[1], dim=0)
        for some, columns in _batches(lists, room, part):
            mixer.mix(windows[some], mixer.beside(blocks, first_block[windows[some, 0]] + columns))
    return _shift_rows(mixer.out.view(batch, heads, -1, dim), -_query_start(grid), query.shape[2])


class _Mixer:
    """The attention of `queries` [rows, block, D] over all keys that were mixed in so far: `out`, of the same shape.

    Rows that nothing was mixed into are zeros. A step has room for so many blocks of keys, and as many of values, of
    which a part are for one list.
    """

    def __init__(self, queries: Tensor, scale: float) -> None:
        self.queries, self.scale = queries, scale
        block = queries.shape[1] * queries.shape[2]
        self.room = max(1, COPIED_PER_THREAD * torch.get_num_threads() // block)
        self.part = max(1, COPIED_PER_LIST // block)
        self.buffers = queries.new_empty(2, self.room * block)
        self.out = torch.zeros_like(queries)
        accumulate = torch.promote_types(queries.dtype, torch.float32)
        self.logsumexp = torch.full(queries.shape[:2], -torch.inf, dtype=accumulate)  # of the scores of those keys

    def beside(self, sources: tuple[Tensor, ...], listed: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Copy the blocks of each of `sources` [blocks, block * D] that are `listed` [n, m], a part of m at a time.

        A copy, [n, part * block, D], lasts until the next one.
        """
        _, size, dim = self.queries.shape
        for columns in listed.split(self.part, dim=1):
            copies = tuple(buffer[: columns.numel() * size * dim].view(-1, size * dim) for buffer in self.buffers)
            for source, copy in zip(sources, copies, strict=True):
                torch.index_select(source, 0, columns.flatten(), out=copy)
            yield tuple(copy.view(len(columns), -1, dim) for copy in copies)

    def mix(
        self,
        rows: Tensor,
        parts: Iterable[tuple[Tensor, ...]],
        *,
        causal: bool = False,
        hidden: Tensor | None = None,
        stands_for: int = 1,
    ) -> None:
        """Let the query `rows` [n, g] attend to more keys and their values, [n, m, D] in each part, g rows to the same.

        `causal`: query t of a block sees keys 0 to t. `hidden` [n, m] are keys that none sees. Each key stands for so
        many that are alike.
        """
        (n, together), (_, size, dim) = rows.shape, self.queries.shape
        if not n:
            return
        flat = rows.flatten()
        queries = self.queries.index_select(0, flat).view(n, 1, together * size, dim)
        out, logsumexp = self.out.index_select(0, flat), self.logsumexp.index_select(0, flat)
        bias = None
        if hidden is not None:
            bias = torch.zeros(hidden.shape, dtype=queries.dtype).masked_fill_(hidden, -torch.inf)
            bias = bias[:, None, None].expand(-1, -1, queries.shape[2], -1)
        for keys, values in parts:
            more, scored = _fused(
                queries, keys[:, None], values[:, None], is_causal=causal, attn_mask=bias, scale=self.scale
            )
            scored = scored.reshape(-1, size) + math.log(stands_for)
            share = (scored - logsumexp).sigmoid_().to(out.dtype)
            out.lerp_(more.reshape(-1, size, dim), share[..., None])
            logsumexp = torch.logaddexp(logsumexp, scored)
        self.out.index_copy_(0, flat, out)
        self.logsumexp.index_copy_(0, flat, logsumexp)


def _means(blocks: Tensor) -> Tensor:
    return blocks.mean(dim=2, dtype=torch.promote_types(blocks.dtype, torch.float32)).to(blocks.dtype)


def _windows(rows: Tensor, heads: int, blocks: int) -> Tensor:
    """Sets of so many heads and neighbouring blocks of `rows` [B * K, G, query_blocks]: [sets, rows], none in two."""
    if heads > rows.shape[1] or blocks > rows.shape[2]:
        return rows.new_empty(0, heads * blocks)
    return rows.unfold(1, heads, heads).unfold(2, blocks, blocks).flatten(3).flatten(0, 2)


def _batches(kept: Tensor, room: int, part: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield which lists of `kept` [lists, blocks] to go through, [n], and as many blocks of each, [n, m].

    First what of each makes whole parts, then the rest. A part of each of the n takes no more than the `room`.
    """
    blocks, counts = kept.nonzero()[:, 1], kept.sum(dim=1)
    starts, whole = counts.cumsum(dim=0) - counts, counts // part * part
    for taken, begins in ((whole, starts), (counts - whole, starts + whole)):
        lengths, order = taken.sort(stable=True)
        lengths, many = lengths.unique_consecutive(return_counts=True)
        for length, lists in zip(lengths.tolist(), order.split(many.tolist()), strict=True):
            if length:
                for some in lists.split(max(1, room // min(length, part))):
                    yield some, blocks[begins[some, None] + torch.arange(length)]


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
