"""The moments that an answer rests on: where in the video the model looked while it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any

import torch

from rrvideo.tokens import Prefix

__all__ = ["Evidence", "Gaze", "intervals"]

MOST = 3  # intervals of one answer
QUERIES = 16  # whose attention is in memory at a time


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
    """

    def __init__(self, prefix: Prefix, *, asked: int, layers: int) -> None:
        self._visual = prefix.visual.nonzero().view(len(prefix.times), -1)  # [steps, tokens]: where they stand
        self._asked = asked
        self._layers = (layers + 1) // 2
        # Of each layer, the mass of [H, steps]: the question's average, and the greatest of all tokens.
        self._usual: dict[int, torch.Tensor] = {}
        self._greatest: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Take query `[1, H, Lq, D]` and key `[1, K, Lk, D]`, whose first keys are the prefix's."""
        if layer >= self._layers:
            return
        rows = query.shape[2]
        if layer in self._usual:
            mass = self._mass(query, key, scaling, rows - 1, rows)
            self._greatest[layer] = torch.maximum(self._greatest[layer], mass[:, 0])
        else:
            parts = range(max(0, rows - self._asked), rows, QUERIES)
            mass = torch.cat([self._mass(query, key, scaling, at, min(at + QUERIES, rows)) for at in parts], dim=1)
            self._usual[layer], self._greatest[layer] = mass.mean(dim=1), mass.amax(dim=1)

    def _mass(self, query: torch.Tensor, key: torch.Tensor, scaling: float, start: int, stop: int) -> torch.Tensor:
        """What each of the queries from row `start` to `stop` gives to each step, `[H, queries, steps]`."""
        visual, count = self._visual.to(key.device), stop - start
        seen = key.shape[2] - query.shape[2] + stop
        queries = (query[0, :, start:stop] * scaling).unflatten(0, (key.shape[1], -1))  # [K, G, queries, D]
        later = torch.ones(count, count, dtype=torch.bool, device=key.device).triu(1)
        masses = []
        for own, keys in zip(queries, key[0, :, :seen], strict=True):  # one key head at a time: rows are long
            scores = (own @ keys.mT).float()  # [G, queries, seen]
            scores[..., seen - count :].masked_fill_(later, -torch.inf)
            masses.append(scores.softmax(dim=-1)[..., visual].sum(dim=-1))
        return torch.cat(masses)

    def weights(self) -> list[float]:
        """Each temporal step's share of the attention that stands out; all alike if none does. Sums to one."""
        total = torch.zeros(len(self._visual))
        for layer, usual in self._usual.items():
            total += (self._greatest[layer] - usual).clamp(min=0).sum(dim=0).cpu()
        total = (total - total.median()).clamp(min=0)  # the greatest of many is above the average by chance, too
        if not total.sum() > 0:
            total += 1
        return (total / total.sum()).tolist()


def intervals(weights: Sequence[float], times: Sequence[float], end: float) -> list[Evidence]:
    """The stretches of video around the highest of `weights`, the heaviest first.

    A stretch is a run of steps with at least half of the greatest weight. `times` are when steps begin, in seconds, and
    `end` is when the clip does.
    """
    longest = max((after - before for before, after in pairwise(times)), default=end - times[0])
    borders = [*times, min(end, times[-1] + longest)]  # nothing was seen of the rest of a file that is cut off
    found = []
    for stands_out, run in groupby(range(len(weights)), key=lambda step: 2 * weights[step] >= max(weights)):
        steps = list(run)
        if stands_out:
            weight = sum(weights[step] for step in steps)
            found.append(Evidence(borders[steps[0]], borders[steps[-1] + 1], weight))
    return sorted(found, key=lambda evidence: -evidence.weight)[:MOST]
