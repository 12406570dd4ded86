"""Queries, keys and values of any shape with the structure that block selection lives on.

White noise would not do: its attention has no blocks to find. Every head has what is known of trained decoders, each
part a term of the logits:

- a *sink*: the first four keys draw a share of every query's mass;
- a *local band*: a rotary term makes mass fall with distance d like d**-c, with c from 0.3 (spread) to 1.5 (local);
- *topics*: the sequence is cut into segments of some 500 tokens on 32 topics that return, and a head looks at those of
  one topic: the query's own in every other head, another one in the rest;
- *needles*: one span of 16 keys in every 1024 tokens that one span of 128 later queries wants almost alone;
- *noise*: half of it shared by 16 neighbouring keys, half of each token alone.

Exponents and strengths run over the heads in a fixed low-discrepancy order, so that the mix, and with it the density,
is a property of the generator and not of a seed. `models.capture` takes inputs from a real model instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SINKS = 4  # keys
TOPICS = 32
SEGMENT = (128, 896)  # tokens, shortest and longest
NEEDLE_EVERY, NEEDLE_KEYS, NEEDLE_QUERIES = 1024, 16, 128  # tokens
SMOOTH = 16  # neighbouring keys that share half of their noise
ROTARY_BASE = 1e6


@dataclass(frozen=True, slots=True)
class Inputs:
    """What reaches one attention call: q [B, H, Lq, D], k and v [B, K, Lk, D], and the factor on the scores."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    layer: int = 0  # of the model that they are from

    def first(self, length: int) -> Inputs:
        """The first `length` tokens: under causal attention they are what a shorter sequence would have given."""
        q, k, v = (x[:, :, :length] for x in (self.q, self.k, self.v))
        return Inputs(self.name, q, k, v, self.scale, self.layer)


def generate(
    heads: int,
    kv_heads: int,
    head_dim: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw q [1, heads, length, head_dim], k and v [1, kv_heads, length, head_dim] as the module describes.

    Where segments and needles lie depends on `length` and `seed` alone; the noise also on the device. Needs memory for
    one head in float32 beside the result. ValueError: `head_dim` is no multiple of 4, or `kv_heads` does not divide.
    """
    if head_dim % 4 or head_dim < 16:
        raise ValueError(f"head_dim must be a multiple of 4 and at least 16, got {head_dim}")
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide the {heads} heads, got {kv_heads}")
    device, scale = torch.device(device), head_dim**-0.5
    layout = _Layout.draw(length, torch.Generator().manual_seed(seed), device)
    random = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    pairs = head_dim // 4
    content = head_dim - 2 * pairs - 1
    rotary = _rotary(length, pairs, device)  # [length, 2 * pairs], of norm sqrt(pairs)
    spread = (scale * content**0.5) ** -0.5  # noise of this size in q and k makes noise of size 1 in the logits
    q, k, v = (torch.empty(1, n, length, head_dim, dtype=dtype, device=device) for n in (heads, kv_heads, kv_heads))
    for g in range(kv_heads):
        topics = torch.nn.functional.normalize(noise(TOPICS, content), dim=1)
        needles = torch.nn.functional.normalize(noise(layout.needles, content), dim=1)
        unit = scale**-0.5  # two directions of this length make a logit of 1

        smooth = noise(-(-length // SMOOTH), content).repeat_interleave(SMOOTH, dim=0)[:length]
        key_content = unit * topics[layout.topic] + spread * 0.5**0.5 * (smooth + noise(length, content))
        key_content += unit * _rows(needles, layout.needle_of_key)
        sink = torch.zeros(length, 1, device=device)
        sink[:SINKS] = unit
        key_content[:SINKS] = 0.0
        k[0, g] = torch.cat([sink, key_content, rotary * (scale * pairs) ** -0.5], dim=1)
        v[0, g] = topics[layout.topic] @ noise(content, head_dim) + noise(length, head_dim)

        group = heads // kv_heads
        for h in range(g * group, (g + 1) * group):
            mix = _Mix.of(h)
            query_content = unit * mix.topic * topics[(layout.topic + mix.offset) % TOPICS] + spread * noise(
                length, content
            )
            query_content += unit * mix.needle * _rows(needles, layout.needle_of_query)
            toward_sink = torch.full((length, 1), unit * mix.sink, device=device)
            q[0, h] = torch.cat([toward_sink, query_content, mix.local * rotary * (scale * pairs) ** -0.5], dim=1)
    return Inputs(f"generated, seed {seed}", q, k, v, scale)


@dataclass(frozen=True, slots=True)
class _Mix:
    """What one head looks at: logits of the local band at distance 0, the topic, the needle and the sink."""

    local: float
    topic: float
    offset: int
    needle: float
    sink: float

    @classmethod
    def of(cls, head: int) -> _Mix:
        # Multiples of irrational numbers, modulo 1, cover a cube evenly whatever their count (an R_d sequence).
        exponent, topic, sink = ((0.5 + (head + 1) * step) % 1.0 for step in (0.8191725, 0.6710436, 0.5497005))
        local = (0.3 + 1.2 * exponent) * math.log(ROTARY_BASE)
        topic = 0.5 + 5.0 * topic
        return cls(
            local=local,
            topic=topic,
            offset=0 if head % 2 else 1 + head % (TOPICS - 1),
            needle=local + topic,
            sink=local + 0.5 * topic + 3.0 * sink,
        )


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where segments and needles lie; -1 where there is no needle."""

    topic: Tensor  # [length]
    needle_of_key: Tensor  # [length]
    needle_of_query: Tensor  # [length]
    needles: int

    @classmethod
    def draw(cls, length: int, random: torch.Generator, device: torch.device) -> _Layout:
        most = length // SEGMENT[0] + 1
        lengths = torch.randint(*SEGMENT, (most,), generator=random)
        topics = torch.randint(TOPICS, (most,), generator=random)
        topic = topics.repeat_interleave(lengths)[:length]

        of_key, of_query = torch.full((length,), -1), torch.full((length,), -1)
        count = length // NEEDLE_EVERY
        for i in range(count):
            start = int(torch.randint(SINKS, NEEDLE_EVERY - NEEDLE_KEYS, (1,), generator=random)) + i * NEEDLE_EVERY
            later = int(torch.randint(start + NEEDLE_KEYS, length, (1,), generator=random))
            of_key[start : start + NEEDLE_KEYS] = i
            of_query[later : later + NEEDLE_QUERIES] = i
        return cls(topic.to(device), of_key.to(device), of_query.to(device), count)


def _rotary(length: int, pairs: int, device: torch.device) -> Tensor:
    """Cosines and sines whose dot product over two positions falls with the logarithm of their distance."""
    frequency = ROTARY_BASE ** -(torch.arange(pairs, device=device) / pairs)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of `table`, or zeros where the index is -1."""
    return torch.cat([table, table.new_zeros(1, table.shape[1])])[index]
