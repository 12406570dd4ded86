"""A KV cache in memory that is laid out once: chunks and tokens are appended in place, and rolled back by length.

The caches of transformers copy all they hold for every chunk of a prefill and every token of an answer. Here attention
gets views of one buffer per layer, on the model's device, or in the CPU's memory, from where each layer is brought over
for its turn.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["PrefixCache"]

# Capacities are multiples of this, so that every head begins at a multiple of 64 bytes: where it begins at another
# place after the buffer has grown, matrix libraries may add in another order.
ALIGNMENT = 64


class PrefixCache(Cache):
    """Keys and values `[batch, key heads, tokens, D]` of `layers` layers, with room for `capacity` tokens.

    More tokens than that make it grow by copying. What was filled from another device, such as a file's tensors, moves
    to the model's with the first pass. With `offload`, keys and values stay in the CPU's memory, pinned where the model
    is on a CUDA GPU; on a CPU that changes nothing.
    """

    def __init__(self, layers: int, *, capacity: int, offload: bool = False) -> None:
        super().__init__(layers=[_Layer(capacity, offload) for _ in range(layers)])

    def roll_back(self, length: int) -> None:
        """Forget all but the first `length` tokens, also where an interrupted pass has lengthened only some layers."""
        for layer in self.layers:
            layer.crop(min(0, length - layer.get_seq_length()))


class _Layer(CacheLayerMixin):
    """One layer's share; `keys` and `values` are views of what its buffers hold so far."""

    is_croppable = True
    is_sliding = False  # what a sliding window does not see is masked: all has to be there to be rolled back to

    def __init__(self, capacity: int, offload: bool) -> None:
        super().__init__()
        self._capacity = capacity
        self._offload = offload
        self._buffers: tuple[torch.Tensor, ...] = ()  # of keys and values
        self._length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = tuple(self._allocate(states, self._capacity) for states in (key_states, value_states))
        self.is_initialized = True
        self._show(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self._length, self._length + key_states.shape[2]
        if stop > self._capacity or key_states.device != self.device:
            self._move(stop, key_states.device)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self._show(stop)
        return tuple(held.to(self.device, non_blocking=True) for held in (self.keys, self.values))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative or zero, got {tokens_to_remove}")
        if self.is_initialized:
            self._show(max(0, self._length + tokens_to_remove))

    def reset(self) -> None:
        self.crop(-self._length)

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        return -1  # none

    def _show(self, length: int) -> None:
        self._length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _move(self, needed: int, device: torch.device) -> None:
        """Take new buffers for a model on `device`, with room for `needed` tokens."""
        if needed > self._capacity:
            self._capacity = needed + needed // 8  # so that the next ones seldom have to copy all again
        self.device, held = device, self._buffers
        self._buffers = tuple(self._allocate(buffer, self._capacity) for buffer in held)
        for buffer, old in zip(self._buffers, held, strict=True):
            buffer[:, :, : self._length] = old[:, :, : self._length]

    def _allocate(self, like: torch.Tensor, capacity: int) -> torch.Tensor:
        batch, heads, _, dim = like.shape
        return torch.empty(
            (batch, heads, -(-capacity // ALIGNMENT) * ALIGNMENT, dim),
            dtype=like.dtype,
            device="cpu" if self._offload else self.device,
            pin_memory=self._offload and self.device.type == "cuda",
        )
