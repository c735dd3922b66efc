"""Interquartile means, bootstrap intervals and paired differences against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runners.stats import (
    bootstrap,
    bootstrap_interval,
    interquartile_mean,
    normalised_score,
    paired_difference,
    paired_improvement,
    performance_profile,
    probability_of_improvement,
    relative_gain,
)

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


# The scores of rliable's own tests (metrics_test.py), runs x tasks, and the values stated there.
RLIABLE_X = np.array([[1, 2], [2, 2], [1, 1], [2, 1]])
RLIABLE_Y = np.array([[1, 1], [2, 2], [3, 3]])


def test_rliable_published_values() -> None:
    assert interquartile_mean(RLIABLE_X) == 1.5
    assert interquartile_mean(RLIABLE_Y) == 2.0
    assert bootstrap_interval(list(RLIABLE_X.T), rng()).iqm == 1.5
    assert probability_of_improvement(list(RLIABLE_X.T), list(RLIABLE_Y.T)) == pytest.approx(1 / 3)


@given(SCORES, SCORES)
def test_probability_of_improvement_is_counted_over_all_pairs(x: list[float], y: list[float]) -> None:
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y)
    assert probability_of_improvement([x], [y]) == pytest.approx(wins / (len(x) * len(y)))
    assert probability_of_improvement([x], [x]) == pytest.approx(0.5)


def test_probability_of_improvement_averages_workloads_not_runs() -> None:
    # Won on a workload of one run, lost on one of four.
    assert probability_of_improvement([[1.0], [0.0] * 4], [[0.0], [1.0] * 4]) == 0.5
    with pytest.raises(ValueError, match="at least one score"):
        probability_of_improvement([[]], [[1.0]])


def test_paired_improvement_compares_equal_seeds_only() -> None:
    # Better by a hair under every seed, though the seeds differ by far more.
    baseline = {seed: float(seed) for seed in range(10)}
    better = {seed: value + 0.01 for seed, value in baseline.items()}
    assert paired_improvement({"w": (better, baseline)}, rng()) == (1.0, 1.0, 1.0)
    assert probability_of_improvement([list(better.values())], [list(baseline.values())]) == pytest.approx(0.55)
    mixed = {0: (1.0, 0.0), 1: (0.0, 1.0), 2: (1.0, 1.0), 3: (1.0, 0.0)}
    ours, theirs = ({seed: pair[k] for seed, pair in mixed.items()} for k in (0, 1))
    result = paired_improvement({"w": (ours, theirs)}, rng())
    assert result.iqm == 0.625
    assert result.lo < 0.625 < result.hi


def test_performance_profile_is_the_share_above_each_threshold() -> None:
    profile = performance_profile([[0.1, 0.5], [0.5, 0.9]], [0.0, 0.1, 0.5, 0.9], rng())
    assert profile.value == pytest.approx([1.0, 0.75, 0.25, 0.0])
    assert profile.lo[0] == profile.hi[0] == 1.0
    assert np.all((profile.lo <= profile.value) & (profile.value <= profile.hi))


def test_relative_gain_keeps_the_scores_of_a_seed_together() -> None:
    baseline = {seed: float(value) for seed, value in enumerate(rng(4).uniform(0.2, 1.0, size=10))}
    doubled = {seed: 2.0 * value for seed, value in baseline.items()}
    assert relative_gain({"w": (doubled, baseline)}, rng()) == pytest.approx((1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="baseline of 0"):
        relative_gain({"w": ({0: 1.0}, {0: 0.0})}, rng())
    with pytest.raises(ValueError, match="no seed in common"):
        relative_gain({"w": ({0: 1.0}, {1: 1.0})}, rng())


def test_normalised_score() -> None:
    assert normalised_score([0.5, 0.9, 0.4], 0.5, [0.9, 0.9, 0.9]) == pytest.approx([0.0, 1.0, -0.25])
    assert np.isnan(normalised_score(0.5, 0.5, 0.5))


def test_bootstrap_resamples_whole_samples() -> None:
    # Two columns that always add up to 1 keep doing so in every resample.
    column = rng(6).random(20)
    sums = bootstrap([np.stack([column, 1.0 - column], axis=1)], lambda drawn: drawn[0].sum(axis=2).mean(axis=1), rng())
    assert (float(sums.value), float(sums.lo), float(sums.hi)) == pytest.approx((1.0, 1.0, 1.0))
