"""Where blocks lie, which of them a query block may see, and which of them were kept.

Blocks and strides are counted from a sequence's first valid key, so that a left-padded sequence is cut exactly as it
would be alone, and a chunk over a cached prefix exactly as in one call over everything. A *position* below is that
count: position 0 is tensor column `kv_start`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rrattention.config import RRConfig


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The blocks of one call: `query_blocks` rows by `key_blocks` columns for every sequence of the batch.

    The last query is the last key's own, so query row r has position `r + first_position`. Row m of the grid is query
    block `first_query_block + m`. Sequences padded on the left have fewer blocks, and rows without a block at the end.
    Nothing here synchronises the device.
    """

    batch: int
    query_length: int
    key_length: int
    block_size: int
    causal: bool
    sink: bool
    device: torch.device
    kv_start: Tensor | None = None  # [batch], the first valid key of each sequence; None is 0 for all

    @classmethod
    def of(
        cls,
        like: Tensor,
        query_length: int,
        key_length: int,
        config: RRConfig,
        *,
        causal: bool = True,
        kv_start: Tensor | None = None,
    ) -> BlockGrid:
        """Lay the blocks of a call that has the batch and the device of `like`; ValueError names what does not fit."""
        if not 1 <= query_length <= key_length:
            raise ValueError(f"the query length must lie between 1 and the key length {key_length}, got {query_length}")
        if kv_start is not None:  # its values stay on the device: reading them would wait for it
            integers = kv_start.dtype in (torch.int32, torch.int64)
            if kv_start.shape != like.shape[:1] or not integers or kv_start.device != like.device:
                raise ValueError(
                    f"kv_start must be [{like.shape[0]}] int32 or int64 on {like.device}, "
                    f"got {list(kv_start.shape)} {kv_start.dtype} on {kv_start.device}"
                )
        return cls(
            batch=like.shape[0],
            query_length=query_length,
            key_length=key_length,
            block_size=config.block_size,
            causal=causal,
            sink=config.sink,
            device=like.device,
            kv_start=kv_start,
        )

    @property
    def length(self) -> Tensor:
        """Valid keys of each sequence, [batch] int64."""
        length = torch.full((self.batch,), self.key_length, device=self.device)
        return length if self.kv_start is None else length - self.kv_start

    @property
    def first_position(self) -> Tensor:
        """Position of query row 0, [batch] int64; negative where that row is padding."""
        return self.length - self.query_length

    @property
    def first_query_block(self) -> Tensor:
        """The block of the first query that is not padding, [batch] int64."""
        return self.first_position.clamp(min=0) // self.block_size

    @property
    def key_blocks(self) -> int:
        return -(-self.key_length // self.block_size)

    @property
    def query_blocks(self) -> int:
        prefix = self.key_length - self.query_length
        if self.kv_start is None:
            return self.key_blocks - prefix // self.block_size
        # A bound that holds wherever the padding makes the blocks begin, so that its value need not be read.
        return min((self.query_length + self.block_size - 2) // self.block_size + 1, self.key_blocks)

    def query_block(self) -> Tensor:
        """The query block of each row, [batch, query_blocks, 1] int64."""
        rows = torch.arange(self.query_blocks, device=self.device)
        return (self.first_query_block[:, None] + rows)[:, :, None]

    def visible(self) -> Tensor:
        """Which key blocks a query block may see, [batch, query_blocks, key_blocks] bool."""
        query_block, key_block = self.query_block(), torch.arange(self.key_blocks, device=self.device)
        length = self.length[:, None, None]
        visible = (query_block * self.block_size < length) & (key_block * self.block_size < length)
        return visible & (key_block <= query_block) if self.causal else visible

    def mandatory(self) -> Tensor:
        """The visible blocks that are always kept: the sink and the query block's own, as `visible`."""
        key_block = torch.arange(self.key_blocks, device=self.device)
        own = key_block == self.query_block()
        return self.visible() & (own | (key_block == 0) if self.sink else own)

    def last_row(self) -> Tensor:
        """Which row holds the last query block, [batch, query_blocks, 1] bool."""
        return self.query_block() == (self.length[:, None, None] - 1) // self.block_size

    def totals(self, heads: int) -> tuple[Tensor, Tensor]:
        """How many blocks `heads` heads may see, and how many are mandatory: 0-dimensional int64 tensors."""
        if self.kv_start is not None:
            return self.visible().sum() * heads, self.mandatory().sum() * heads
        # Without padding they are known here: a GPU is spared some twenty small kernels in each layer.
        first, rows = self.key_blocks - self.query_blocks, self.query_blocks
        visible = rows * (first + 1 + self.key_blocks) // 2 if self.causal else rows * self.key_blocks
        mandatory = rows + (rows - (first == 0) if self.sink else 0)
        counts = (blocks * self.batch * heads for blocks in (visible, mandatory))
        total, always = (torch.full((), count, device=self.device) for count in counts)
        return total, always

    def dense_stats(self, heads: int) -> BlockStats:
        """The counts of a call of `heads` query heads that keeps every visible block."""
        visible, mandatory = self.totals(heads)
        return BlockStats(visible, visible, mandatory)


@dataclass(frozen=True, slots=True)
class BlockStats:
    """Blocks over batch, heads and query blocks, as 0-dimensional int64 tensors on the device. They add up."""

    kept: Tensor
    visible: Tensor
    mandatory: Tensor

    def density(self, *, mandatory: bool = True) -> Tensor:
        """Kept over visible blocks, a 0-dimensional tensor; `mandatory=False` leaves those blocks out of both.

        Where nothing is left to choose from, everything was kept: 1.
        """
        spared = 0 if mandatory else self.mandatory
        choices = self.visible - spared
        return torch.where(choices > 0, (self.kept - spared) / choices, 1.0)

    def __add__(self, other: BlockStats) -> BlockStats:
        return BlockStats(self.kept + other.kept, self.visible + other.visible, self.mandatory + other.mandatory)


@dataclass(frozen=True, slots=True)
class BlockSelection:
    """The key blocks that each query block of each head attends to, of those that it sees (`BlockGrid.visible`).

    indices: ascending block numbers, [batch, heads, query_blocks, key_blocks] int32; only the first `counts` of a row
        mean anything.
    counts: [batch, heads, query_blocks] int32; 0 for a row without a query block.
    """

    indices: Tensor
    counts: Tensor
    grid: BlockGrid

    @classmethod
    def from_mask(cls, kept: Tensor, grid: BlockGrid) -> BlockSelection:
        """Make the lists from `kept`, [batch, heads, query_blocks, key_blocks] bool."""
        blocks = torch.arange(grid.key_blocks, device=kept.device, dtype=torch.int32)
        indices = torch.where(kept, blocks, grid.key_blocks).sort(dim=-1).values
        return cls(indices.to(torch.int32), kept.sum(dim=-1, dtype=torch.int32), grid)

    def mask(self) -> Tensor:
        """The same selection as [batch, heads, query_blocks, key_blocks] bool."""
        columns = torch.arange(self.indices.shape[-1], device=self.indices.device)
        listed = columns < self.counts[..., None]
        targets = self.indices.long().where(listed, self.grid.key_blocks)  # unlisted entries go to a spare column
        kept = listed.new_zeros(*self.indices.shape[:-1], self.grid.key_blocks + 1)
        return kept.scatter_(-1, targets, True)[..., :-1]

    def left_out(self) -> Tensor:
        """The blocks that are not kept though all queries see every key of them, and they are whole, as `mask`."""
        grid = self.grid
        block = torch.arange(grid.key_blocks, device=grid.device)
        whole = (block + 1) * grid.block_size <= grid.length[:, None, None]  # [batch, 1, key_blocks]
        seen = grid.visible() & whole & (block < grid.query_block()) if grid.causal else grid.visible() & whole
        return seen[:, None] & ~self.mask()

    def stats(self) -> BlockStats:
        return BlockStats(self.counts.sum(), *self.grid.totals(self.indices.shape[1]))

    def density(self, *, mandatory: bool = True) -> Tensor:
        """Kept over visible blocks over batch and heads: see `BlockStats.density`."""
        return self.stats().density(mandatory=mandatory)
