"""The moments that an answer rests on: where in the video the model looked while it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import groupby, pairwise
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

    On a GPU the model attends itself, and a kernel goes over the keys once more, for many passes at a time, which costs
    hardly more than for one. What is put off is done at the end of a `with` around all passes, while the cache still
    holds their keys. Elsewhere the gaze attends for the model: most of the work on either is to compare queries with
    keys, which is done once.
    """

    def __init__(self, prefix: Prefix, *, asked: int, layers: int) -> None:
        self._prefix = prefix
        self._asked = asked
        self._layers = (layers + 1) // 2
        self._begun: set[int] = set()  # layers that have read the question
        # Of each layer, the mass of [H, steps]: the question's average, and the greatest of all tokens.
        self._usual: dict[int, torch.Tensor] = {}
        self._greatest: dict[int, torch.Tensor] = {}
        # What the kernel is still to look at, of each layer, and what it has found that is still to be weighed.
        self._put_off: dict[int, _Passes] = {}
        self._found: dict[int, torch.Tensor] = {}
        self._segments: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}  # see `_segments_of`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for layer, passes in self._put_off.items():
                self._look(layer, passes)
            self._weigh()

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        """Attend with query `[1, H, Lq, D]` to key and value `[1, K, Lk, D]`, whose first keys are the prefix's.

        Returns `[1, H, Lq, D]`, or None where the model is to attend itself.
        """
        if layer >= self._layers:
            return None
        first = layer not in self._begun
        self._begun.add(layer)
        count = self._asked if first else 1  # of the last queries, which are looked at
        if not _has_kernel(query.device, query.dtype, query.shape[3]):
            return self._attend(layer, query[0] * scaling, key[0], value[0], count)[None]
        passes = self._put_off.setdefault(layer, _Passes(scaling))
        passes.queries.append(query[0, :, -count:])
        passes.key = key[0]
        # Keys that were brought over for this pass alone fill a buffer of their own, which is not to be held.
        stays = key.untyped_storage().nbytes() > key.nbytes
        if not stays or len(passes.queries) == TOGETHER:
            self._look(layer, self._put_off.pop(layer))
        return None

    def _look(self, layer: int, passes: _Passes) -> None:
        """Find what the queries of `passes` give to the prefix, segment by segment."""
        from rrattention.triton.segments import segment_logsumexp

        if layer in self._found or sum(found.numel() for found in self._found.values()) > SCORES:
            self._weigh()
        query = passes.queries[0] if len(passes.queries) == 1 else torch.cat(passes.queries, dim=1)
        starts, _ = self._segments_on(query.device)
        self._found[layer] = segment_logsumexp(query, passes.key, starts, scale=passes.scaling)

    def _weigh(self) -> None:
        """Take what was found, all layers of a device together: many small steps would take longer than the kernel."""
        for device in {found.device for found in self._found.values()}:
            layers = [layer for layer, found in self._found.items() if found.device == device]
            shares = torch.stack([self._found.pop(layer) for layer in layers]).softmax(dim=-1)
            self._take(layers, shares[..., self._segments_on(device)[1]])

    def _segments_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._segments:
            self._segments[device] = _segments_of(self._prefix, device)
        return self._segments[device]

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
        self._take([layer], torch.cat(masses, dim=1)[None])
        return torch.cat(outs, dim=1)

    def _take(self, layers: list[int], mass: torch.Tensor) -> None:
        """Remember what counts of more tokens' mass `[layers, H, tokens, steps]`; the question's are the first."""
        greatest = mass.amax(dim=2)
        if layers[0] not in self._usual:
            self._usual.update(zip(layers, mass[:, :, : self._asked].mean(dim=2), strict=True))
        else:
            greatest = torch.maximum(greatest, torch.stack([self._greatest[layer] for layer in layers]))
        self._greatest.update(zip(layers, greatest, strict=True))

    def weights(self) -> list[float]:
        """Each temporal step's share of the attention that stands out; all alike if none does. Sums to one."""
        total = torch.zeros(len(self._prefix.times))
        if self._usual:
            device = next(iter(self._usual.values())).device
            usual, greatest = (
                torch.stack([each[layer].to(device) for layer in self._usual]) for each in (self._usual, self._greatest)
            )
            total = (greatest - usual).clamp(min=0).sum(dim=(0, 1)).cpu()
        total = (total - total.median()).clamp(min=0)  # the greatest of many is above the average by chance, too
        if not total.sum() > 0:
            total += 1
        return (total / total.sum()).tolist()


@dataclass(slots=True)
class _Passes:
    """Passes that are still to be looked at: their queries `[H, n, D]`, and the last one's key `[K, Lk, D]`."""

    scaling: float
    queries: list[torch.Tensor] = field(default_factory=list)
    key: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@cache
def _has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `segment_logsumexp` has a launch for them."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return dtype != torch.float64 and head_dim <= 256


def _segments_of(prefix: Prefix, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the sequence is cut so that each step is a segment, `[segments]`, and which segments are the steps'."""
    step = prefix.step.numpy()
    # The last segment is what is said after the prefix.
    starts = np.concatenate([[0], np.flatnonzero(step[1:] != step[:-1]) + 1, [len(step)]])
    is_step = np.concatenate([step[starts[:-1]] >= 0, [False]])
    return torch.from_numpy(starts).to(device, torch.int32), torch.from_numpy(np.flatnonzero(is_step)).to(device)


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
