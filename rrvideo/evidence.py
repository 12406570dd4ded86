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
    """How much attention each temporal step gets while an answer is written.

    An observer for `rrattention.transformers.observe`. The last query of a pass is the one that predicts the next word
    of the answer. Only its attention is looked at, so a pass costs one row of scores, however long the question is.
    """

    def __init__(self, prefix: Prefix) -> None:
        self._visual = prefix.visual.nonzero().view(len(prefix.times), -1)  # [steps, tokens]: where they stand
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Take query `[1, H, Lq, D]` and key `[1, K, Lk, D]`, whose first keys are the prefix's."""
        if key.device not in self._on_device:  # a model may be spread over several
            visual = self._visual.to(key.device)
            self._on_device[key.device] = visual, torch.zeros(len(visual), device=key.device)
        visual, total = self._on_device[key.device]
        last = (query[0, :, -1] * scaling).unflatten(0, (key.shape[1], -1))  # [K, G, D]
        share = (last @ key[0].mT).softmax(dim=-1, dtype=torch.float32).flatten(0, 1)  # [H, Lk]
        mass = share[:, visual].sum(dim=-1)  # [H, steps]
        # What a head gives to every step alike says nothing of the question.
        total += (mass - mass.median(dim=1, keepdim=True).values).clamp(min=0).sum(dim=0)

    def weights(self) -> list[float]:
        """Each temporal step's share of the attention that stands out; all alike if none does. Sums to one."""
        total = torch.zeros(len(self._visual))
        for _, mass in self._on_device.values():
            total += mass.cpu()
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
