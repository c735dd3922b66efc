"""Arrival processes: Poisson, Gamma renewal, Markov-modulated Poisson, batch.

Every process draws its numbers request by request, so a longer workload begins with the shorter one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qlm_env.spec import Arrivals, BatchArrivals, ConfigError, GammaArrivals, MarkovArrivals, PoissonArrivals

CYCLES_PER_BLOCK = 4096
"""Calm + burst cycles drawn at a time, which bounds memory however short the stays are."""

MAX_CYCLES = 10_000_000
"""Calm + burst cycles a workload may span; with more, the arrivals are as good as Poisson."""


def sample_arrivals(spec: Arrivals, num_requests: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Arrival times in seconds from 0, shape (num_requests,), non-decreasing.

    - ``poisson``: exponential gaps of mean ``1 / rate_per_s``.
    - ``gamma``: independent Gamma gaps of shape ``1 / cv**2`` and mean ``1 / rate_per_s``; time 0 is a
      renewal point.
    - ``markov``: Poisson at the rate of a two-state Markov chain that starts in its stationary law, so
      the mean rate is ``rate_per_s`` from time 0 on.
    - ``batch``: every request at ``at_s``.

    Raises:
        ConfigError: ``arrivals.load`` has not been resolved to a rate (see ``resolve_load``), or the stays
            of ``markov`` are so short that the workload spans more than ``MAX_CYCLES`` of them.
    """
    if isinstance(spec, BatchArrivals):
        return np.full(num_requests, spec.at_s)
    rate = _rate(spec)
    if isinstance(spec, PoissonArrivals):
        return _unit_poisson(num_requests, rng) / rate
    if isinstance(spec, GammaArrivals):
        shape = 1.0 / spec.cv**2
        gaps = rng.standard_gamma(shape, num_requests)
        np.cumsum(gaps, out=gaps)
        gaps /= shape * rate
        return gaps
    return _markov_arrivals(spec, rate, num_requests, rng)


def _rate(spec: PoissonArrivals | GammaArrivals | MarkovArrivals) -> float:
    if spec.rate_per_s is None:
        raise ConfigError(
            "arrivals.load is a share of a cluster's capacity: resolve it to arrivals.rate_per_s first (resolve_load)"
        )
    return spec.rate_per_s


def _unit_poisson(num_requests: int, rng: np.random.Generator) -> NDArray[np.float64]:
    gaps = rng.standard_exponential(num_requests)
    return np.cumsum(gaps, out=gaps)


def _markov_arrivals(
    spec: MarkovArrivals, rate_per_s: float, num_requests: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A unit-rate Poisson process on the axis of cumulative intensity, mapped back to time.

    With stationary burst share ``p = burst / (calm + burst)`` the calm rate is
    ``rate / (1 - p + p * burst_factor)``, which makes the long-run mean ``rate``.
    """
    cycle_s = spec.mean_calm_s + spec.mean_burst_s
    if num_requests > rate_per_s * cycle_s * MAX_CYCLES:
        raise ConfigError(
            f"arrivals.mean_calm_s + arrivals.mean_burst_s is {cycle_s:g} s, too short for "
            f"{num_requests} requests at {rate_per_s:g}/s (at most {MAX_CYCLES} cycles); use kind: poisson"
        )
    burst_share = spec.mean_burst_s / cycle_s
    calm_rate = rate_per_s / (1.0 - burst_share + burst_share * spec.burst_factor)
    state_rates = np.array([calm_rate, calm_rate * spec.burst_factor])
    mean_stays_s = np.array([spec.mean_calm_s, spec.mean_burst_s])

    stay_rng, count_rng = rng.spawn(2)
    # Exponential stays have no memory: what remains of the first one is exponential too.
    if stay_rng.random() < burst_share:
        state_rates, mean_stays_s = state_rates[::-1], mean_stays_s[::-1]

    arrival_s = _unit_poisson(num_requests, count_rng)
    done, start_s, start_intensity = 0, 0.0, 0.0
    while done < num_requests:
        stays_s = stay_rng.standard_exponential((CYCLES_PER_BLOCK, 2)) * mean_stays_s
        time_s = np.concatenate(([start_s], start_s + np.cumsum(stays_s)))
        intensity = np.concatenate(([start_intensity], start_intensity + np.cumsum(stays_s * state_rates)))
        end = done + int(np.searchsorted(arrival_s[done:], intensity[-1], side="right"))
        arrival_s[done:end] = np.interp(arrival_s[done:end], intensity, time_s)
        done, start_s, start_intensity = end, float(time_s[-1]), float(intensity[-1])
    # Interpolation rounds on either side of a change of state.
    return np.maximum.accumulate(arrival_s, out=arrival_s)
