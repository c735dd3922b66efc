"""Interquartile means, bootstrap intervals and paired differences against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runners.stats import bootstrap_interval, interquartile_mean, paired_difference

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0, 6.0], 3.0),  # nothing to cut below four scores
        ([100.0, 2.0, 1.0, 4.0], 3.0),  # 1 and 100 go
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 90.0], 4.5),  # 0, 1 and 8, 90 go
    ],
)
def test_interquartile_mean(scores: list[float], expected: float) -> None:
    assert interquartile_mean(scores) == pytest.approx(expected)


def test_no_scores_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no scores"):
        interquartile_mean([])
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_interval([[1.0], []], rng())
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_interval([], rng())


def test_one_score_has_an_interval_of_no_width() -> None:
    assert bootstrap_interval([[0.4]], rng()) == (0.4, 0.4, 0.4)


def test_interval_of_two_scores_is_known_exactly() -> None:
    # A resample of {0, 1} has mean 0, 1/2 or 1 with probability 1/4, 1/2, 1/4: the 2.5 % tails are 0 and 1.
    assert bootstrap_interval([[0.0, 1.0]], rng()) == (0.5, 0.0, 1.0)


def test_interval_approaches_the_normal_one() -> None:
    scores = rng(3).normal(size=400)
    middle = np.sort(scores)[100:300]
    result = bootstrap_interval([scores], rng())
    assert result.iqm == pytest.approx(middle.mean())
    # The standard error of a mean trimmed by 25 %: the winsorised deviation over (1 - 2 * 0.25) sqrt(n).
    winsorised = np.clip(scores, middle[0], middle[-1]).std(ddof=1)
    half_width = 1.96 * winsorised / (0.5 * np.sqrt(400))
    assert result.hi - result.lo == pytest.approx(2 * half_width, rel=0.1)


def test_strata_keep_their_share() -> None:
    # Every resample holds two scores of each workload, so the mean cannot move; unstratified it would.
    assert bootstrap_interval([[0.0, 0.0], [1.0, 1.0]], rng()) == (0.5, 0.5, 0.5)


def test_equal_generators_give_equal_intervals() -> None:
    scores = rng(1).random(10)
    assert bootstrap_interval([scores], rng(5)) == bootstrap_interval([scores], rng(5))
    assert bootstrap_interval([scores], rng(5)) != bootstrap_interval([scores], rng(6))


@given(SCORES, st.integers(0, 5))
def test_interval_stays_within_the_scores(scores: list[float], seed: int) -> None:
    result = bootstrap_interval([scores], rng(seed), resamples=50)
    slack = 1e-12
    assert min(scores) - slack <= result.lo <= result.hi <= max(scores) + slack
    assert min(scores) - slack <= result.iqm <= max(scores) + slack


def test_pairs_cancel_what_the_workload_adds() -> None:
    hardness = {seed: float(value) for seed, value in enumerate(rng(2).normal(size=10))}
    better = {seed: value + 0.1 for seed, value in hardness.items()}
    difference = paired_difference(better, hardness, rng())
    assert difference == pytest.approx((0.1, 0.1, 0.1))


def test_only_common_seeds_are_paired() -> None:
    assert paired_difference({1: 0.5, 2: 0.9}, {2: 0.4, 3: 0.0}, rng()) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({1: 0.5}, {2: 0.4}, rng())
