"""Intervals and tests, against what can be enumerated, derived, or seen in many simulated runs."""

import itertools

import numpy as np
import pytest

from rreval import statistics
from rreval.statistics import Estimate, mcnemar, ratio


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios():
    assert ratio([3, 0, 1], [3, 1, 2]).value == pytest.approx(4 / 6)


def test_the_interval_holds_the_quantiles_of_all_resamples_that_there_are():
    correct, asked = [3, 0, 1, 2, 2], [3, 3, 2, 3, 1]
    drawn = np.array(list(itertools.product(range(5), repeat=5)))
    every = np.array(correct)[drawn].sum(axis=1) / np.array(asked)[drawn].sum(axis=1)
    found = ratio(correct, asked)

    for bound, level in ((found.low, 0.025), (found.high, 0.975)):  # a discrete distribution: between close quantiles
        assert np.quantile(every, level - 0.006) <= bound <= np.quantile(every, level + 0.006)


def test_of_many_videos_the_interval_is_that_of_the_cluster_robust_standard_error():
    generator = np.random.default_rng(7)
    asked = generator.integers(1, 4, 600)
    correct = generator.binomial(asked, generator.beta(2, 1, 600))
    share = correct.sum() / asked.sum()
    error = np.sqrt(((correct - share * asked) ** 2).sum()) / asked.sum()
    found = ratio(correct, asked)

    assert (found.low, found.high) == pytest.approx((share - 1.96 * error, share + 1.96 * error), abs=0.1 * error)


def test_three_questions_that_agree_are_worth_one():
    right = np.random.default_rng(3).integers(0, 2, 300)
    alone, together = ratio(right, np.ones(300)), ratio(3 * right, np.full(300, 3))
    apart = ratio(np.repeat(right, 3), np.ones(900))

    assert together == alone
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(3**0.5, rel=0.05)


def test_nineteen_of_twenty_intervals_hold_the_truth(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    generator = np.random.default_rng(11)
    hits = 0
    for run in range(400):
        chances = generator.beta(1.2, 0.8, 100)  # how hard each video is; on average 0.6
        found = ratio(generator.binomial(3, chances), np.full(100, 3), seed=run)
        hits += found.low <= 0.6 <= found.high

    assert 0.92 <= hits / 400 <= 0.975


def test_the_same_seed_gives_the_same_interval_whatever_the_order_of_the_videos():
    correct, order = np.random.default_rng(5).random(37), np.random.default_rng(6).permutation(37)
    found = ratio(correct, np.ones(37))

    assert ratio(correct[order], np.ones(37)) == found
    assert ratio(correct, np.ones(37), seed=1) != found


@pytest.mark.parametrize(
    ("correct", "asked", "value"),
    [([], [], None), ([0, 0], [0, 0], None), ([2], [3], 2 / 3), ([3, 3], [3, 3], 1.0), ([2, 2, 2], [3, 3, 3], 2 / 3)],
    ids=["nothing", "nothing asked", "one video", "all right", "all alike"],
)
def test_where_resampling_tells_nothing_there_is_no_interval(correct, asked, value):
    assert ratio(correct, asked) == Estimate(value, None, None)


def test_resamples_without_a_single_answer_are_left_out():
    found = ratio([1, 0, 1, 0], [1, 1, 1, 0])

    assert 0 <= found.low < found.value < found.high <= 1


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 0), (0, 6), (3, 9), (7, 7), (10, 4)])
def test_mcnemar_counts_the_tosses_that_are_at_least_as_uneven(first, second):
    tosses = first + second
    uneven = [abs(2 * sum(toss) - tosses) >= abs(first - second) for toss in itertools.product((0, 1), repeat=tosses)]

    assert mcnemar(first, second) == pytest.approx(sum(uneven) / len(uneven))


def test_mcnemar_takes_as_many_questions_as_there_are():
    assert 0 < mcnemar(1250, 1450) < 0.001
    assert mcnemar(1350, 1350) == 1
