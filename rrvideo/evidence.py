"""The moments that an answer rests on: where in the video the model looked while it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise
from typing import Any, Self

import torch

from rrvideo.tokens import Prefix

__all__ = ["Evidence", "Gaze", "intervals"]

MOST = 3  # intervals of one answer
SCORES = 2**24  # that are in memory at a time
ATTENDS = {"cpu"}  # devices where attending here is faster than a second comparison of queries with keys
TOGETHER = 64  # passes that are looked at in one go where the model attends itself


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

    On a CPU it attends there for the model: most of the work on either is to compare queries with keys, which is done
    once. On a GPU the model attends itself, and what its tokens see is summed for many of them at a time, which costs
    hardly more than for one: token by token it was a fifth of an answer about 113K tokens on an H100. What is put off
    is done at the end of a `with` around all passes, while the cache still holds their keys.
    """

    def __init__(self, prefix: Prefix, *, asked: int, layers: int) -> None:
        self._runs = list(_runs(prefix))
        self._steps = len(prefix.times)
        self._asked = asked
        self._layers = (layers + 1) // 2
        # Of each layer, the mass of [H, steps]: the question's average, and the greatest of all tokens.
        self._usual: dict[int, torch.Tensor] = {}
        self._greatest: dict[int, torch.Tensor] = {}
        self._put_off: dict[int, _Passes] = {}  # of each layer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for layer in list(self._put_off):
                self._catch_up(layer)

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        """Attend with query `[1, H, Lq, D]` to key and value `[1, K, Lk, D]`, whose first keys are the prefix's.

        Returns `[1, H, Lq, D]`, or None where the model is to attend itself.
        """
        if layer >= self._layers:
            return None
        count = 1 if layer in self._usual or layer in self._put_off else self._asked  # of the last, which are looked at
        if query.device.type in ATTENDS:
            return self._look(layer, query[0] * scaling, key[0], count, value[0])[None]
        passes = self._put_off.setdefault(layer, _Passes(scaling))
        passes.queries.append(query[0, :, -count:])
        passes.key = key[0]
        # Keys that were brought over for this pass alone fill a buffer of their own, which is not to be held.
        stays = key.untyped_storage().nbytes() > key.nbytes
        if not stays or len(passes.queries) == TOGETHER:
            self._catch_up(layer)
        return None

    def _catch_up(self, layer: int) -> None:
        passes = self._put_off.pop(layer)
        queries = torch.cat(passes.queries, dim=1) * passes.scaling
        self._look(layer, queries, passes.key, count=queries.shape[1])

    def _look(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, count: int, value: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Take what the last `count` of scaled query `[H, n, D]` give to the steps; their own keys are the last of key.

        Returns what comes of attending to value `[K, Lk, D]`, `[H, n, D]`; nothing without one.
        """
        queries = query.unflatten(0, (key.shape[0], -1))  # [K, G, n, D]
        at_a_time = max(1, SCORES // (query.shape[0] * key.shape[1]))
        outs, masses, rest = [query[:, :0]], [], queries.shape[2]
        for some in queries.split(at_a_time, dim=2):
            rest -= some.shape[2]
            seen = key.shape[1] - rest
            shares = _shares(some, key[:, :seen])
            if value is not None:
                attended = shares.to(value.dtype).flatten(1, 2) @ value[:, :seen]
                outs.append(attended.unflatten(1, some.shape[1:3]).flatten(0, 1))
            if rest < count:
                looking = shares[:, :, max(0, some.shape[2] + rest - count) :].flatten(0, 1)
                masses.append(torch.cat([_sums(looking, *run) for run in self._runs], dim=-1))
        mass = torch.cat(masses, dim=1)  # [H, count, steps]
        greatest = mass.amax(dim=1)
        if layer not in self._usual:
            self._usual[layer], self._greatest[layer] = mass[:, : self._asked].mean(dim=1), greatest
        else:
            self._greatest[layer] = torch.maximum(self._greatest[layer], greatest)
        return torch.cat(outs, dim=1)

    def weights(self) -> list[float]:
        """Each temporal step's share of the attention that stands out; all alike if none does. Sums to one."""
        total = torch.zeros(self._steps)
        for layer, usual in self._usual.items():
            total += (self._greatest[layer] - usual).clamp(min=0).sum(dim=0).cpu()
        total = (total - total.median()).clamp(min=0)  # the greatest of many is above the average by chance, too
        if not total.sum() > 0:
            total += 1
        return (total / total.sum()).tolist()


@dataclass(slots=True)
class _Passes:
    """Passes that are still to be looked at: their queries `[H, n, D]`, one after the other, and the last one's key."""

    scaling: float
    queries: list[torch.Tensor] = field(default_factory=list)
    key: torch.Tensor = field(default_factory=lambda: torch.empty(0))


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
    longest = max((after - before for before, after in pairwise(times)), default=end - times[0])
    borders = [*times, min(end, times[-1] + longest)]  # nothing was seen of the rest of a file that is cut off
    found, enough = [], max(weights) / 2
    for stands_out, run in groupby(range(len(weights)), key=lambda step: weights[step] >= enough):
        steps = list(run)
        if stands_out:
            weight = sum(weights[step] for step in steps)
            found.append(Evidence(borders[steps[0]], borders[steps[-1] + 1], weight))
    return sorted(found, key=lambda evidence: -evidence.weight)[:MOST]
