"""The three stages, fast on CPUs: plain PyTorch in large batched steps, nothing to compile.

What makes it fast, each point measured against its alternatives:

- `attend` is matrix products, for whose speed it is enough that a block of queries meets a few blocks of keys at a
  time. PyTorch's own fused attention wants a thousand queries to the same keys, which no two lists offer.
- Kept blocks are copied to lie side by side, a few of each list: what a step reads and writes stays in the caches.
- Threads of our own share the lists, and each runs PyTorch without further threads: none waits for another before all
  is done. PyTorch's threads meet at the end of every operation, which costs most where something else needs the cores.
- No maximum is looked for, unless keys outweigh the others by far: scores are taken relative to that of one key that
  every query sees.
- The large buffers of a thread are made once in a call: fresh memory costs more than copying does.

Half precision is worked on in float32.

Shapes: B batch, H query heads, K key heads, G = H / K query heads to a key head, L length, D head dim, S stride.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from rrattention.blocks import BlockGrid, BlockSelection
from rrattention.config import RRConfig, Skipped

SCORES_PER_THREAD = 1 << 18  # of one step of `estimate`: 1 MiB of float32
LISTS_PER_STEP = 8  # of one step of `attend` in one thread
KEYS_PER_STEP = 512  # of each of these lists
MOST_WEIGHT = 2.0**60  # of the keys of one step together, before others are compared with them
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x log2 e)


@torch.no_grad()
def estimate(query: Tensor, key: Tensor, grid: BlockGrid, *, stride: int, scale: float) -> Tensor:
    """Score each key block for each query block: the attention mass that sampled queries give to pooled keys.

    Returns [B, H, query_blocks, key_blocks], float32 or the inputs' dtype where that is wider. A few query blocks at a
    time, so that beside these scores memory is linear in the length.
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
def select(scores: Tensor, grid: BlockGrid, config: RRConfig, head_weights: Tensor | None = None) -> BlockSelection:
    """Keep the smallest set of visible blocks that holds the mandatory ones and carries tau of the mass that counts.

    With `head_weights` [H] the smallest of those that leave out up to 1 - tau of it, each head's by its weight.
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
    counted = mass.sum(dim=-1, keepdim=True)
    target = config.tau * counted
    if head_weights is not None:
        shared = config.scope == "heads"
        mass = mass * (head_weights.repeat_interleave(grid.key_blocks) if shared else head_weights[:, None, None])
        target = mass.sum(dim=-1, keepdim=True) - (1 - config.tau) * counted
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
    """Softmax attention of each query block over its kept blocks, in float32 or the inputs' dtype where that is wider.

    `selection` lists visible blocks only. With `skipped="pooled"` the mean key and value of every whole block that is
    visible and not kept take part, too. Returns [B, H, Lq, D] in the dtype of `query`; rows that see no key, padding
    among them, are zeros.
    """
    grid, size = selection.grid, selection.grid.block_size
    (batch, heads, _, dim), group = query.shape, query.shape[1] // key.shape[1]
    accumulate, device = torch.promote_types(query.dtype, torch.float32), query.device
    sources = tuple(_key_to_grid(x, grid).reshape(-1, size * dim) for x in (key, value))  # [B * K * key_blocks, ...]

    # From here on a row is one query block of one head and sequence, [B * H * query_blocks, ...].
    queries = _query_to_grid(query, grid).reshape(-1, size, dim)
    out = torch.zeros_like(queries)
    indices, counts = selection.indices.flatten(0, 2), selection.counts.flatten().long()
    key_head = torch.arange(len(counts), device=device) // grid.query_blocks // group  # among those of all sequences
    first_block = (key_head * grid.key_blocks)[:, None]
    per_row = (batch, heads, grid.query_blocks)
    query_block, length = (
        x.expand(per_row).flatten()[:, None] for x in (grid.query_block()[:, None, :, 0], grid.length[:, None, None])
    )
    if skipped == "pooled":
        means = tuple(x.view(-1, size, dim).mean(dim=1, dtype=accumulate) for x in sources)  # [B * K * key_blocks, D]
        left_out = selection.left_out().flatten(0, 2)  # [rows, key_blocks]

    def attend_rows(rows: Tensor, buffers: _Buffers) -> Tensor:
        """Attend with the query blocks `rows` [n], the first of which has the longest list."""
        n, kept, offset = len(rows), counts[rows, None], first_block[rows]
        columns = torch.arange(int(kept[0]), device=device)
        last = indices[rows[:, None], kept - 1].long()
        blocks = indices[rows[:, None], columns].long().where(columns < kept, last)  # [n, most]
        keys, values = buffers.beside(sources, offset + last)
        scaled = queries[rows].to(accumulate) * (scale * LOG2_E)
        softmax = _Softmax(scaled, keys[:, :1], buffers)  # every query sees the first key of its last block

        # Only the last block of a list can reach beyond the queries or the end. Queries beyond the end are no matter.
        token = torch.arange(size, device=device)
        reach = query_block[rows] * size + token if grid.causal else length[rows] - 1  # [n, queries or 1]
        position = last * size + token
        softmax.add(keys, values, hidden=position[:, None] > reach[:, :, None])
        for part in columns[:-1].split(max(1, KEYS_PER_STEP // size)):
            spare = part >= kept - 1  # shorter lists have ended
            hidden = spare.repeat_interleave(size, dim=1)[:, None] if spare.any() else None
            softmax.add(*buffers.beside(sources, offset + blocks[:, part]), hidden=hidden)
        if skipped == "pooled":
            without = left_out[rows]
            for part in without.any(dim=0).nonzero()[:, 0].split(KEYS_PER_STEP):
                stand_ins = (x[(offset + part).flatten()].view(n, -1, dim) for x in means)
                softmax.add(*stand_ins, hidden=~without[:, None, part], times=size)
        return softmax.result()

    order = counts.argsort(descending=True, stable=True)[: int(counts.count_nonzero())]
    threads = torch.get_num_threads()
    groups = iter(order.split(min(LISTS_PER_STEP, len(order) // (4 * threads) + 1)) if len(order) else ())

    def work() -> None:
        with torch.inference_mode():  # each thread has its own mode
            buffers = _Buffers(size, dim, accumulate, device)
            for rows in groups:  # whichever are next: threads need not be equally fast
                out.index_copy_(0, rows, attend_rows(rows, buffers).to(out.dtype))

    try:
        _in_threads(work, threads)
    finally:
        deque(groups, maxlen=0)  # after a failure the other threads find nothing more to do
    return _shift_rows(out.view(batch, heads, -1, dim), -_query_start(grid), query.shape[2])


class _Buffers:
    """What one thread of `attend` works in, for LISTS_PER_STEP lists and KEYS_PER_STEP keys, or a block, of each."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        keys = max(KEYS_PER_STEP, size)
        self.copies = torch.empty(2, LISTS_PER_STEP * keys // size, size * dim, dtype=dtype, device=device)
        self.scores = torch.empty(LISTS_PER_STEP * size * keys, dtype=dtype, device=device)
        self.dim = dim

    def beside(self, sources: tuple[Tensor, Tensor], listed: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the blocks of both `sources` [blocks, block * D] that are `listed` [n, m]: [n, m * block, D] each.

        The copies last until the next ones.
        """
        flat = listed.flatten()
        for source, copy in zip(sources, self.copies[:, : len(flat)], strict=True):
            if source.dtype == copy.dtype:
                torch.index_select(source, 0, flat, out=copy)
            else:
                copy.copy_(source.index_select(0, flat))
        keys, values = self.copies[:, : len(flat)].view(2, len(listed), -1, self.dim)
        return keys, values


class _Softmax:
    """The attention of `queries` [n, T, D] over keys that are added a few at a time; scores are base-2 logarithms.

    The weight of a key is taken relative to one whose score is `top` [n, T, 1], at first that of `common` [n, 1, D],
    which every query must see. Where keys come that outweigh it by far, theirs takes its place.
    """

    def __init__(self, queries: Tensor, common: Tensor, buffers: _Buffers) -> None:
        self.queries, self.buffer = queries, buffers.scores
        self.top = queries @ common.mT
        self.total = torch.zeros_like(self.top)
        self.sum = torch.zeros_like(queries)

    def add(self, keys: Tensor, values: Tensor, *, hidden: Tensor | None = None, times: int = 1) -> None:
        """Add keys and their values, [n, m, D]; none sees those that are `hidden` [n, T or 1, m].

        Each key counts as `times` equal ones.
        """
        weights = self._scores(keys, hidden, math.log2(times) - self.top).exp2_()
        totals = weights.sum(dim=2, keepdim=True)
        if (totals > MOST_WEIGHT).any():
            # From zero: sums that begin at a `top` far away are rounded as coarsely as it is.
            scores = self._scores(keys, hidden, torch.full_like(self.top, math.log2(times)))
            top = scores.amax(dim=2, keepdim=True).maximum(self.top)
            shrink = (self.top - top).exp2_()
            self.top, self.total, self.sum = top, self.total * shrink, self.sum * shrink
            weights = scores.sub_(top).exp2_()
            totals = weights.sum(dim=2, keepdim=True)
        self.total += totals
        self.sum.baddbmm_(weights, values)

    def result(self) -> Tensor:
        """[n, T, D]."""
        return self.sum.div_(self.total)

    def _scores(self, keys: Tensor, hidden: Tensor | None, more: Tensor) -> Tensor:
        """The scores of `keys` and `more` [n, T, 1], together [n, T, m]; they last until the next ones."""
        (n, length, _), m = self.queries.shape, keys.shape[1]
        scores = self.buffer[: n * length * m].view(n, length, m)
        torch.baddbmm(more, self.queries, keys.mT, out=scores)
        return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _in_threads(work: Callable[[], None], threads: int) -> None:
    """Run `work` so many times at once, each in a thread where PyTorch starts no others; once, in the caller's own.

    What goes wrong in one of them is raised at once, without waiting for the others.
    """
    if threads == 1:
        work()
    else:
        pool = _threads(threads)
        for done in as_completed([pool.submit(work) for _ in range(threads)]):
            done.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """So many threads that run PyTorch without further threads; they are kept for the next call."""
    everywhere, ready = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first use of PyTorch copies the program's number: it must come before
        torch.set_num_threads(1)  # sets this thread's number, and the program's
        ready.wait()

    pool = ThreadPoolExecutor(count, "rrattention", initializer=begin)
    try:
        for _ in range(count):
            pool.submit(int)
        ready.wait()
    except BaseException:
        ready.abort()  # those that have begun wait for the others
        raise
    finally:
        torch.set_num_threads(everywhere)
    return pool


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
