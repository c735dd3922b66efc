"""Demand scenarios for placement: the backlog, and arrivals drawn around what came lately.

Arrivals of a (model, SLO class) are Poisson with an unknown rate. After ``n`` in the last ``t`` seconds the rate is
Gamma with shape ``n`` and scale ``1/t`` (the posterior under the prior ``1/rate``; a kind that never came is not
expected), so the number in a horizon is Poisson given a rate drawn from it: what is known badly varies more.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from qlm_env.view import ClusterView

Float = NDArray[np.float64]


def backlog_requests(view: ClusterView) -> Float:
    """(M, K) requests that wait in groups."""
    waiting = np.zeros(_shape(view))
    for group in view.groups:
        waiting[group.model, group.slo_class] += group.waiting
    return waiting


def arrived_requests(view: ClusterView) -> Float:
    """(M, K) requests so far."""
    return view.arrivals().astype(np.float64)


class RecentArrivals:
    """Arrivals within a sliding window, to be shown the cluster at every epoch."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, Float]] = deque()

    def observe(self, view: ClusterView) -> None:
        """Note what has arrived by now."""
        self._seen.append((view.now_s, arrived_requests(view)))
        # One observation from before the window stays: the window begins there.
        while len(self._seen) > 2 and self._seen[1][0] <= view.now_s - self._window_s:
            self._seen.popleft()

    @property
    def span_s(self) -> float:
        """Seconds that have been watched."""
        return self._seen[-1][0] - self._seen[0][0] if self._seen else 0.0

    @property
    def counts(self) -> Float:
        """(M, K) arrivals in that time.

        Raises:
            ValueError: nothing was observed yet.
        """
        if not self._seen:
            raise ValueError("no cluster was observed yet")
        return np.maximum(0.0, self._seen[-1][1] - self._seen[0][1])


def draw_demand(
    rng: np.random.Generator,
    backlog: Float,
    counts: Float,
    span_s: float,
    horizon_s: float,
    num_scenarios: int,
) -> Float:
    """(S, M, K) requests to serve within the horizon, scenario by scenario.

    Args:
        backlog: (M, K) that wait already.
        counts: (M, K) arrivals in the last ``span_s`` seconds; nothing is expected when that is 0.
    """
    shape = (num_scenarios, *backlog.shape)
    if span_s <= 0.0:
        return np.broadcast_to(backlog, shape).copy()
    rate_per_s = rng.standard_gamma(np.broadcast_to(counts, shape)) / span_s
    return backlog + rng.poisson(rate_per_s * horizon_s)


def _shape(view: ClusterView) -> tuple[int, int]:
    return len(view.models), len(view.scenario.slo.classes)
