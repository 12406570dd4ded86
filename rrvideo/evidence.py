"""The moments that an answer rests on: where in the video the model looked while it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch

from rrvideo.tokens import Prefix

__all__ = ["Evidence", "Gaze", "intervals"]

MOST = 3  # intervals of one answer
SCORES = 2**24  # that are in memory at a time
TOGETHER = 64  # passes whose queries go through the kernel in one go


@dataclass(frozen=True, slots=True)
class Evidence:
    """An interval of the video in seconds, and its share of the attention that stands out, in (0, 1]."""

    start: float
    end: float
    weight: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


class Gaze:
    """How much the attention to each temporal step stands out while a question is read and its answer is written.

    An observer for `rrattention.transformers.observe`: of a first pass whose last `asked` tokens are the question, and
    of the passes of the answer's tokens. What one of them gives to a step counts as far as it is more than the question
    gives on average, head by head. Only the first half of the model's `layers` is looked at: in the embedded model
    words meet there what they name; later layers look at other things, too.

    On a GPU the model attends itself, and a kernel goes over the keys once more: of all layers in one go, as soon as
    they have read the question, so that it runs while the host is still busy with the others; and for many words of the
    answer at a time, which costs hardly more than for one. What is put off is done at the end of a `with` around all
    passes, while the cache still holds their keys. Elsewhere the gaze attends for the model: most of the work on either
    is to compare queries with keys, which is done once.
    """

    def __init__(self, prefix: Prefix, *, asked: int, layers: int) -> None:
        self._prefix = prefix
        self._asked = asked
        self._layers = (layers + 1) // 2
        self._stays: dict[int, bool] = {}  # of layers that have read the question: see `__call__`
        self._seen: dict[tuple[int, ...], _Seen] = {}  # of layers that are looked at in one go
        self._put_off: dict[int, _Passes] = {}  # what the kernel is still to look at, of each layer
        self._starts: dict[torch.device, torch.Tensor] = {}  # of the prefix's segments

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._put_off:  # where nothing is, there may be no Triton
            self._look([*self._put_off])

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        """Attend with query `[1, H, Lq, D]` to key and value `[1, K, Lk, D]`, whose first keys are the prefix's.

        Returns `[1, H, Lq, D]`, or None where the model is to attend itself.
        """
        if layer >= self._layers:
            return None
        first = layer not in self._stays
        if first:
            # Keys that are brought over for one pass fill a buffer of their own, which is not to be held after it.
            self._stays[layer] = key.untyped_storage().nbytes() > key.nbytes
        count = self._asked if first else 1  # of the last queries, which are looked at
        if not _has_kernel(query.device, query.dtype, query.shape[3]):
            return self._attend(layer, query[0] * scaling, key[0], value[0], count)[None]
        if layer not in self._put_off:
            self._put_off[layer] = _Passes(scaling, key)
        passes = self._put_off[layer]
        passes.queries.append(query[:, :, -count:])
        passes.key = key
        if not self._stays[layer]:
            self._look([layer])
        elif layer == self._layers - 1 and (first or len(passes.queries) >= TOGETHER):
            self._look([*self._put_off])
        return None

    def _look(self, layers: list[int]) -> None:
        """Take what the queries that were put off give to the prefix, in one go for all layers that are alike."""
        from rrattention.triton.segments import segment_logsumexp

        alike: dict[Any, dict[int, _Passes]] = {}
        for layer in layers:
            passes = self._put_off.pop(layer)
            alike.setdefault(passes.kind(), {})[layer] = passes
        for group in alike.values():
            one = next(iter(group.values()))
            heads, count = one.rows()
            starts = self._starts_on(one.key.device)
            queries = torch.cat([query for passes in group.values() for query in passes.queries], dim=2)[0]
            queries = queries.unflatten(1, (-1, count)).transpose(0, 1)  # [layers, H, count, D]
            rest = count
            for some in queries.split(max(1, SCORES // (len(group) * heads * len(starts))), dim=2):
                rest -= some.shape[2]
                keys = [passes.key[0] for passes in group.values()]
                if rest:
                    keys = [key[:, :-rest] for key in keys]
                found = segment_logsumexp(some, keys, starts, scale=one.scaling)
                self._take(tuple(group), found.softmax(dim=-1))

    def _starts_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._starts:
            self._starts[device] = self._prefix.segments[0].to(device, non_blocking=True)
        return self._starts[device]

    @cached_property
    def _runs(self) -> list[tuple[int, int, int, int]]:
        return list(_runs(self._prefix))

    def _attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Attend with scaled query `[H, Lq, D]`, which is returned, and take what its last `count` give to steps."""
        query = query.unflatten(0, (key.shape[0], -1))  # [K, G, Lq, D]
        at_a_time = max(1, SCORES // (query.shape[0] * query.shape[1] * key.shape[1]))
        outs, masses, rest = [], [], query.shape[2]
        for some in query.split(at_a_time, dim=2):
            rest -= some.shape[2]
            seen = key.shape[1] - rest
            shares = _shares(some, key[:, :seen])
            attended = shares.to(value.dtype).flatten(1, 2) @ value[:, :seen]
            outs.append(attended.unflatten(1, some.shape[1:3]).flatten(0, 1))
            if rest < count:
                looking = shares[:, :, max(0, some.shape[2] + rest - count) :].flatten(0, 1)
                masses.append(torch.cat([_sums(looking, *run) for run in self._runs], dim=-1))
        self._take((layer,), torch.cat(masses, dim=1)[None])
        return torch.cat(outs, dim=1)

    def _take(self, layers: tuple[int, ...], mass: torch.Tensor) -> None:
        """Remember what counts of the mass `[layers, H, tokens, steps or segments]` of the next tokens."""
        greatest = mass.amax(dim=2)
        if layers in self._seen:
            seen = self._seen[layers]
            seen.greatest = torch.maximum(seen.greatest, greatest)
        else:
            seen = self._seen[layers] = _Seen(greatest)
        if seen.tokens < self._asked:
            seen.usual += mass[:, :, : self._asked - seen.tokens].sum(dim=2) / self._asked
        seen.tokens += mass.shape[2]

    def weights(self) -> list[float]:
        """Each temporal step's share of the attention that stands out; all alike if none does. Sums to one."""
        total: np.ndarray = np.zeros(len(self._prefix.times), np.float32)
        for seen in self._seen.values():
            outstanding = (seen.greatest - seen.usual).clamp(min=0).sum(dim=(0, 1)).cpu().numpy()
            if len(outstanding) > len(total):  # the kernel's: of all segments
                outstanding = outstanding[self._prefix.segments[1].numpy()]
            total += outstanding
        # The greatest of many is above the average by chance, too.
        middle = (len(total) - 1) // 2
        total = (total - np.partition(total, middle)[middle]).clip(min=0)
        if not total.any():
            total += 1
        return (total / total.sum()).tolist()


@dataclass(slots=True)
class _Seen:
    """What some layers' heads gave to each step or segment, `[layers, H, steps or segments]`."""

    greatest: torch.Tensor  # of all tokens
    usual: torch.Tensor | float = 0.0  # the average of the question's
    tokens: int = 0  # that were looked at


@dataclass(slots=True)
class _Passes:
    """Passes of a layer that are still to be looked at: queries [1, H, n, D], and the last key [1, K, Lk, D]."""

    scaling: float
    key: torch.Tensor
    queries: list[torch.Tensor] = field(default_factory=list)

    def rows(self) -> tuple[int, int]:
        """How many heads there are, and how many queries of each."""
        return self.queries[0].shape[1], sum(query.shape[2] for query in self.queries)

    def kind(self) -> tuple[Any, ...]:
        """Equal for layers whose passes the kernel takes in one go."""
        return self.key.device, self.key.shape, self.key.stride(), self.rows(), self.scaling


@cache
def _has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `segment_logsumexp` has a launch for them."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return dtype != torch.float64 and head_dim <= 256


def _shares(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What scaled `queries` [K, G, n, D] give to each of `keys` [K, seen, D], the last n of which are their own."""
    count = queries.shape[2]
    scores = (queries.flatten(1, 2) @ keys.mT).unflatten(1, queries.shape[1:3])  # [K, G, n, seen]
    if count > 1:
        later = torch.ones(count, count, dtype=torch.bool, device=keys.device).triu(1)
        scores[..., -count:].masked_fill_(later, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32)


def _runs(prefix: Prefix) -> Iterator[tuple[int, int, int, int]]:
    """Where steps are equally far apart: the first one's first token, how many steps, the distance, and their tokens.

    Sums over windows of a row take a fifth of the time of sums over gathered numbers.
    """
    visual = prefix.visual.nonzero().view(len(prefix.times), -1)  # the tokens of a step stand together
    starts, size = visual[:, 0].tolist(), visual.shape[1]
    while starts:
        distance = starts[1] - starts[0] if len(starts) > 1 else size
        steps = 1
        while steps < len(starts) and starts[steps] - starts[steps - 1] == distance:
            steps += 1
        yield starts[0], steps, distance, size
        starts = starts[steps:]


def _sums(shares: torch.Tensor, start: int, steps: int, distance: int, size: int) -> torch.Tensor:
    """The sum over each step of a run."""
    stop = start + (steps - 1) * distance + size
    return shares[..., start:stop].unfold(-1, size, distance).sum(dim=-1)


def intervals(weights: Sequence[float], times: Sequence[float], end: float) -> list[Evidence]:
    """The stretches of video around the highest of `weights`, the heaviest first.

    A stretch is a run of steps with at least half of the greatest weight. `times` are when steps begin, in seconds, and
    `end` is when the clip does.
    """
    enough = max(weights) / 2
    runs: list[list[int]] = []
    for step, weight in enumerate(weights):
        if weight >= enough:
            if runs and runs[-1][-1] == step - 1:
                runs[-1].append(step)
            else:
                runs.append([step])

    def begin(step: int) -> float:
        if step < len(times):
            return times[step]
        longest = max((after - before for before, after in pairwise(times)), default=end - times[0])
        return min(end, times[-1] + longest)  # nothing was seen of the rest of a file that is cut off

    found = [Evidence(begin(run[0]), begin(run[-1] + 1), sum(weights[step] for step in run)) for run in runs]
    return sorted(found, key=lambda evidence: -evidence.weight)[:MOST]
