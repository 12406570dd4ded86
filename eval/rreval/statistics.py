"""How sure a figure is: intervals from resampled videos, and a test of whether two runs differ.

The three questions of a video stand and fall together: whoever misses a scene misses it in all of them. So videos are
drawn, not questions, and every figure here is a ratio of two sums over the videos that were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["LEVEL", "RESAMPLES", "Estimate", "mcnemar", "ratio"]

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share or a difference, and its interval.

    All three are None where there is nothing to divide by; the bounds alone where no resample could tell anything:
    for fewer than two videos, and where all of them agree.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Estimate:
    """The sum of `numerators` over that of `denominators`, with its percentile bootstrap interval.

    Both have one entry for each video (cluster), in the same order; the interval's level is `LEVEL`. The same seed
    gives the same interval, whatever the order of the videos.
    """
    videos = np.array([numerators, denominators], dtype=np.float64)  # [2, videos]
    above, below = videos.sum(axis=1)
    if not below:
        return Estimate(None)
    # Videos that count alike are one kind, and to draw videos is to draw how many there are of each kind.
    kinds, counts = np.unique(videos, axis=1, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
    sums = drawn @ kinds.T  # [resamples, 2]
    sums = sums[sums[:, 1] != 0]  # a resample without a denominator says nothing
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if high - low < 1e-12:
        return Estimate(float(above / below))
    return Estimate(float(above / below), float(low), float(high))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that two runs are equally good.

    Given are the questions that only the first run has right, and those that only the second has. If the runs were
    equally good, each of them would be a fair coin.
    """
    tosses = only_first + only_second
    tail = sum(math.comb(tosses, heads) for heads in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**tosses)
