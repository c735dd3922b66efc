"""Interquartile means with bootstrap intervals, and paired differences between planners.

The statistics of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(NeurIPS 2021): the interquartile mean, and percentile intervals from a bootstrap stratified by task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95


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


def bootstrap_interval(
    strata: Sequence[ArrayLike],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The interquartile mean of all scores, with a percentile interval from a stratified bootstrap.

    Args:
        strata: one array of scores per stratum (a workload, say), shapes (n_k,). Each resample draws n_k
            scores with replacement from stratum k, so every stratum keeps its share.
        rng: the source of the resamples; equal generators give equal intervals.

    Raises:
        ValueError: a stratum is empty, or there is none.
    """
    arrays = [np.asarray(stratum, dtype=np.float64).ravel() for stratum in strata]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError("every stratum needs at least one score")
    drawn = [array[rng.integers(array.size, size=(resamples, array.size))] for array in arrays]
    means = _interquartile_means(np.concatenate(drawn, axis=1))
    tail = (1.0 - confidence) / 2.0
    lo, hi = np.quantile(means, [tail, 1.0 - tail])
    return Interval(interquartile_mean(np.concatenate(arrays)), float(lo), float(hi))


def paired_difference(scores: Mapping[int, float], baseline: Mapping[int, float], rng: np.random.Generator) -> Interval:
    """The difference ``scores - baseline`` over the seeds both have, paired by seed.

    Pairs share their workload, so what the workload adds to both cancels and the interval is narrower
    than that of two separate means.

    Raises:
        ValueError: no seed is in both.
    """
    seeds = sorted(scores.keys() & baseline.keys())
    if not seeds:
        raise ValueError("the two have no seed in common")
    return bootstrap_interval([[scores[seed] - baseline[seed] for seed in seeds]], rng)


def _interquartile_means(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    cut = rows.shape[1] // 4
    middle: NDArray[np.float64] = np.sort(rows, axis=1)[:, cut : rows.shape[1] - cut]
    return np.asarray(middle.mean(axis=1))
