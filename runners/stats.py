"""Interquartile means with bootstrap intervals, and comparisons between planners that are paired by seed.

The statistics of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(NeurIPS 2021), as its library rliable defines them: the interquartile mean, performance profiles, the probability of
improvement, and percentile intervals from a bootstrap stratified by task (here a workload).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95

Float: TypeAlias = NDArray[np.float64]
Pairs: TypeAlias = Mapping[str, tuple[Mapping[int, float], Mapping[int, float]]]
"""By workload: the scores of two planners, each by seed."""


class Interval(NamedTuple):
    """A point estimate and the interval around it."""

    iqm: float
    lo: float
    hi: float


def interquartile_mean(scores: ArrayLike) -> float:
    """The mean of the middle half: a quarter of the n scores, rounded down, is cut from each end.

    Raises:
        ValueError: there are no scores.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    if values.size == 0:
        raise ValueError("the interquartile mean of no scores is undefined")
    return float(_interquartile_means(values[np.newaxis, :])[0])


class Estimate(NamedTuple):
    """A statistic of any shape, and the interval around it of the same shape."""

    value: Float
    lo: Float
    hi: Float


def bootstrap(
    strata: Sequence[ArrayLike],
    statistic: Callable[[list[Float]], Float],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """A statistic of stratified samples, with percentile intervals from a stratified bootstrap.

    Args:
        strata: one array of samples per stratum (a workload, say), shapes (n_k, ...). Each resample draws n_k samples
            with replacement from stratum k, so every stratum keeps its share. What must stay together, such as two
            planners' scores under one seed, is one sample.
        statistic: of samples (R, n_k, ...) per stratum, shape (R, ...): R values at once.
        rng: the source of the resamples; equal generators give equal intervals.

    Raises:
        ValueError: a stratum is empty, or there is none.
    """
    arrays = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError("every stratum needs at least one score")
    drawn = statistic([array[rng.integers(len(array), size=(resamples, len(array)))] for array in arrays])
    tail = (1.0 - confidence) / 2.0
    lo, hi = np.quantile(drawn, [tail, 1.0 - tail], axis=0)
    return Estimate(statistic([array[np.newaxis] for array in arrays])[0], lo, hi)


def bootstrap_interval(
    strata: Sequence[ArrayLike],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The interquartile mean of all scores, with a percentile interval from a stratified bootstrap.

    Args:
        strata: one array of scores per stratum, shapes (n_k,).
        rng: the source of the resamples.

    Raises:
        ValueError: a stratum is empty, or there is none.
    """
    scores = [np.asarray(stratum, dtype=np.float64).ravel() for stratum in strata]
    estimate = bootstrap(
        scores, lambda drawn: _interquartile_means(np.concatenate(drawn, axis=1)), rng, resamples, confidence
    )
    return Interval(*(float(number) for number in estimate))


def performance_profile(strata: Sequence[ArrayLike], thresholds: ArrayLike, rng: np.random.Generator) -> Estimate:
    """The share of runs with a score above each threshold, with pointwise intervals: rliable's score distribution.

    Args:
        strata: one array of scores per workload, shapes (n_k,).
        thresholds: shape (T,).

    Returns:
        Arrays of shape (T,).

    Raises:
        ValueError: a stratum is empty, or there is none.
    """
    levels = np.asarray(thresholds, dtype=np.float64)
    return bootstrap(
        strata,
        lambda drawn: np.asarray((np.concatenate(drawn, axis=1)[:, :, np.newaxis] > levels).mean(axis=1)),
        rng,
    )


def probability_of_improvement(scores: Sequence[ArrayLike], baseline: Sequence[ArrayLike]) -> float:
    """The probability that a run of the one scores higher than a run of the other, averaged over workloads.

    Every run is held against every run of the same workload, and equal scores count half: the Mann-Whitney statistic,
    as in rliable.

    Args:
        scores: one array per workload, shapes (n_k,).
        baseline: likewise, shapes (m_k,).

    Raises:
        ValueError: they have no workload or not equally many, or one has no scores.
    """
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(scores, baseline, strict=True)]
    if not pairs or any(x.size == 0 or y.size == 0 for x, y in pairs):
        raise ValueError("every stratum needs at least one score")
    return float(np.mean([_wins(x[:, np.newaxis] - y[np.newaxis, :]).mean() for x, y in pairs]))


def paired_improvement(pairs: Pairs, rng: np.random.Generator) -> Interval:
    """The probability that a planner scores higher than another under the same seed, averaged over workloads.

    Unlike :func:`probability_of_improvement` it compares only runs on identical requests. Equal scores count half.

    Returns:
        The mean (in the field ``iqm``) and its interval over resampled seeds.

    Raises:
        ValueError: no workload has a seed in common.
    """
    strata = [x - y for x, y in _paired(pairs)]
    estimate = bootstrap(strata, lambda drawn: np.asarray(np.mean([_wins(d).mean(axis=1) for d in drawn], axis=0)), rng)
    return Interval(*(float(number) for number in estimate))


def relative_gain(pairs: Pairs, rng: np.random.Generator) -> Interval:
    """The interquartile mean of a planner's scores over that of a baseline's, less 1, paired by seed.

    Resamples draw seeds, and both scores of a seed with it.

    Raises:
        ValueError: no workload has a seed in common, or the baseline's mean is 0.
    """
    strata = [np.stack(pair, axis=1) for pair in _paired(pairs)]
    if interquartile_mean(np.concatenate(strata)[:, 1]) == 0.0:
        raise ValueError("there is no gain over a baseline of 0")

    def gain(drawn: list[Float]) -> Float:
        both = np.concatenate(drawn, axis=1)
        base = _interquartile_means(both[:, :, 1])
        # A resample of zeros only has an unbounded gain.
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(_interquartile_means(both[:, :, 0]) / base - 1.0)

    estimate = bootstrap(strata, gain, rng)
    return Interval(*(float(number) for number in estimate))


def normalised_score(score: ArrayLike, baseline: ArrayLike, best: ArrayLike) -> Float:
    """``(score - baseline) / (best - baseline)``: 0 is the baseline, 1 the best; NaN where these two are equal.

    Args:
        score: of a planner, broadcast against the others, such as (seeds,).
        baseline: of FCFS under the same seeds.
        best: of the oracle under the same seeds.
    """
    low, high = np.asarray(baseline, np.float64), np.asarray(best, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(high == low, np.nan, (np.asarray(score, np.float64) - low) / (high - low)))


def _paired(pairs: Pairs) -> list[tuple[Float, Float]]:
    """Per workload, the two planners' scores under the seeds that both have."""
    arrays = []
    for scores, baseline in pairs.values():
        seeds = sorted(scores.keys() & baseline.keys())
        if not seeds:
            raise ValueError("the two have no seed in common")
        arrays.append((np.array([scores[s] for s in seeds]), np.array([baseline[s] for s in seeds])))
    return arrays


def _wins(differences: Float) -> Float:
    return np.asarray((differences > 0.0) + 0.5 * (differences == 0.0))


def paired_difference(scores: Mapping[int, float], baseline: Mapping[int, float], rng: np.random.Generator) -> Interval:
    """The difference ``scores - baseline`` over the seeds both have, paired by seed.

    Pairs share their workload, so what the workload adds to both cancels and the interval is narrower
    than that of two separate means.

    Raises:
        ValueError: no seed is in both.
    """
    ((ours, theirs),) = _paired({"": (scores, baseline)})
    return bootstrap_interval([ours - theirs], rng)


def _interquartile_means(rows: Float) -> Float:
    cut = rows.shape[1] // 4
    middle: Float = np.sort(rows, axis=1)[:, cut : rows.shape[1] - cut]
    return np.asarray(middle.mean(axis=1))
