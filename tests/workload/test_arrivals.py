"""Arrival processes: their rates, their variability, and what every one of them guarantees.

Tolerances are four or more standard errors of the statistic at the sample size used.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_env.spec import (
    Arrivals,
    BatchArrivals,
    ConfigError,
    GammaArrivals,
    MarkovArrivals,
    PoissonArrivals,
)
from qlm_env.workload import sample_arrivals
from qlm_env.workload.describe import index_of_dispersion

N = 200_000


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed))


def gap_cv(arrival_s: np.ndarray) -> float:
    gaps = np.diff(arrival_s, prepend=0.0)
    return float(gaps.std() / gaps.mean())


def test_poisson_gaps_are_exponential_with_mean_one_over_rate() -> None:
    gaps = np.diff(sample_arrivals(PoissonArrivals(rate_per_s=4.0), N, rng()), prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 4.0, rel=4 / math.sqrt(N))
    empirical = np.arange(1, N + 1) / N
    distance = np.max(np.abs(empirical - (1 - np.exp(-4.0 * np.sort(gaps)))))
    assert distance < 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov at 0.1 %


@pytest.mark.parametrize("cv", [0.25, 1.0, 2.0, 4.0])
def test_gamma_gaps_have_the_rate_and_the_coefficient_of_variation_asked_for(cv: float) -> None:
    arrival_s = sample_arrivals(GammaArrivals(kind="gamma", rate_per_s=4.0, cv=cv), N, rng())
    assert N / arrival_s[-1] == pytest.approx(4.0, rel=4 * cv / math.sqrt(N))
    # The kurtosis of a Gamma is 3 + 6 cv^2, which gives the standard error of its variance.
    assert gap_cv(arrival_s) == pytest.approx(cv, rel=4 * math.sqrt((2 + 6 * cv**2) / N))


def test_markov_arrivals_have_the_long_run_rate_and_dispersion_of_theory() -> None:
    calm_s, burst_s, factor, rate = 6.0, 1.5, 5.0, 10.0
    spec = MarkovArrivals(kind="markov", rate_per_s=rate, burst_factor=factor, mean_calm_s=calm_s, mean_burst_s=burst_s)
    arrival_s = sample_arrivals(spec, 1_000_000, rng())

    share = burst_s / (calm_s + burst_s)
    jump = (factor - 1) * rate / (1 - share + share * factor)
    memory_s = 1 / (1 / calm_s + 1 / burst_s)
    excess = 2 * share * (1 - share) * jump**2 * memory_s / rate
    span_s = arrival_s[-1]
    assert len(arrival_s) / span_s == pytest.approx(rate, rel=4 * math.sqrt((1 + excess) / (rate * span_s)))

    window_s = 60.0
    expected = 1 + excess * (1 - memory_s / window_s * (1 - math.exp(-window_s / memory_s)))
    windows = span_s / window_s
    assert index_of_dispersion(arrival_s, window_s) == pytest.approx(expected, rel=4 * math.sqrt(2 / windows))


def test_markov_arrivals_start_in_the_stationary_state() -> None:
    # In 5 s, far less than a stay, the count is that of the first state: only its draw sets the mean.
    spec = MarkovArrivals(kind="markov", rate_per_s=10.0)
    counts = [np.sum(sample_arrivals(spec, 400, rng(seed)) < 5.0) for seed in range(1500)]
    assert np.mean(counts) == pytest.approx(50.0, abs=4 * float(np.std(counts)) / math.sqrt(len(counts)))
    assert np.std(counts) > 30.0  # the two states differ; a mixture of 28 and 139 has 45


def test_markov_arrivals_without_bursts_are_poisson() -> None:
    spec = MarkovArrivals(kind="markov", rate_per_s=3.0, burst_factor=1.0, mean_calm_s=0.5, mean_burst_s=0.2)
    _, count_rng = rng().spawn(2)
    poisson = np.cumsum(count_rng.standard_exponential(50_000)) / 3.0
    assert sample_arrivals(spec, 50_000, rng()) == pytest.approx(poisson, rel=1e-9)


def test_batch_arrivals_are_all_at_once() -> None:
    assert np.array_equal(sample_arrivals(BatchArrivals(kind="batch", at_s=2.5), 4, rng()), np.full(4, 2.5))


@pytest.mark.parametrize("kind", ["poisson", "gamma", "markov"])
def test_an_unresolved_load_is_refused(kind: str) -> None:
    spec = {"poisson": PoissonArrivals, "gamma": GammaArrivals, "markov": MarkovArrivals}[kind]
    with pytest.raises(ConfigError, match=r"arrivals\.load .* resolve"):
        sample_arrivals(spec(kind=kind, load=0.9), 10, rng())


def test_stays_too_short_to_simulate_are_refused() -> None:
    spec = MarkovArrivals(kind="markov", rate_per_s=1e-3, mean_calm_s=1e-6, mean_burst_s=1e-6)
    with pytest.raises(ConfigError, match="too short for 1000 requests"):
        sample_arrivals(spec, 1000, rng())


rates = st.floats(1e-3, 1e4)
processes: st.SearchStrategy[Arrivals] = st.one_of(
    rates.map(lambda r: PoissonArrivals(rate_per_s=r)),
    st.builds(lambda r, cv: GammaArrivals(kind="gamma", rate_per_s=r, cv=cv), rates, st.floats(0.1, 10)),
    st.builds(
        lambda r, f, calm, burst: MarkovArrivals(
            kind="markov", rate_per_s=r, burst_factor=f, mean_calm_s=calm / r, mean_burst_s=burst / r
        ),
        rates,
        st.floats(1, 100),
        st.floats(1e-2, 1e3),
        st.floats(1e-2, 1e3),
    ),
    st.floats(0, 1e6).map(lambda at: BatchArrivals(kind="batch", at_s=at)),
)


@settings(deadline=None, derandomize=True)
@given(processes, st.integers(1, 400), st.integers(0, 2**32))
def test_arrivals_are_finite_ordered_and_a_prefix_of_longer_workloads(
    spec: Arrivals, num_requests: int, seed: int
) -> None:
    arrival_s = sample_arrivals(spec, num_requests, rng(seed))
    assert arrival_s.shape == (num_requests,)
    assert arrival_s.dtype == np.float64
    assert np.all(np.isfinite(arrival_s))
    assert arrival_s[0] >= 0
    assert np.all(np.diff(arrival_s) >= 0)
    assert np.array_equal(arrival_s, sample_arrivals(spec, 2 * num_requests, rng(seed))[:num_requests])
