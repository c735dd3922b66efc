"""`qlm bench rwt`: how well waiting times are predicted, against what then happens in the emulator.

A backlog of requests is there at time 0 and one instance works it off, first come first served. When so many are left
waiting as a queue length says, the estimator sees the cluster as a planner does, and predicts for each of them when it
will be scheduled first; the request table tells afterwards. ``history`` requests beyond the queue and the first batch
have been served before: with none, nothing is known of output lengths but the prior.

Waiting depends on lengths nobody knows, so no estimate explains all of its variance. What the same estimator explains
when it knows the distribution that lengths are drawn from, but not the draws, is given beside it. In a queue of ``Q``
with coefficient of variation ``c``, the ``q``-th request waits ``q`` intervals with standard deviation ``c*sqrt(q)``,
and waiting times are spread evenly, so that is about ``1 - 6 c^2/Q``; not knowing the mean but from ``n`` requests
costs another ``4 c^2/n``.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planners import make_planner
from planners.spec import FcfsSpec
from planners.token_posterior import TokenPosterior, TokenPosteriors
from planners.waiting import WaitingTimes, waiting_times
from qlm_env.env import QLMEnv
from qlm_env.requests import NOWHERE, WAITING, RequestTable
from qlm_env.scenario import Episodes
from qlm_env.spec import ScenarioSpec
from qlm_env.view import ClusterView
from runners.bench import Figure
from runners.config import BenchRwtOptions
from runners.progress import CountedProgress

Float = NDArray[np.float64]

INTERVALS = (0.5, 0.9, 0.99)
KNOWN_FROM = 30_000
"""Requests whose lengths stand for their distribution."""


class Prediction(NamedTuple):
    """One look at a queue of Q requests."""

    predicted: dict[float, WaitingTimes]
    """By the factor on the profile's step times"""
    informed: WaitingTimes
    """With the distribution of lengths known"""
    actual_s: Float
    """(Q,)"""


class Accuracy(NamedTuple):
    """Predictions against what happened, over all requests of several looks."""

    r2: float
    """Share of the variance of actual waiting times that the means explain; may be negative"""
    relative_error: float
    """Mean absolute error over the mean waiting time"""
    relative_rms: float
    """Root mean square error over that of the predicted means: what one relative standard deviation would have to be"""
    coverage: tuple[float, ...]
    """Share of requests within each of INTERVALS"""


def measure(options: BenchRwtOptions) -> list[Figure]:
    """Accuracy for every queue length and history; beside it with the profile off by each of the factors."""
    figures: list[Figure] = []
    settings = [(history, queue) for history in options.histories for queue in options.queues]
    with CountedProgress("queues", len(settings)) as progress:
        for history, queue in settings:
            looks = [
                look_at_queue(options, queue, history, options.seed + number) for number in range(options.episodes)
            ]
            where = f"queue {queue}, {history} served before"
            exact = accuracy(looks, 1.0)
            known = explained([look.informed for look in looks], [look.actual_s for look in looks])
            figures.append(Figure(name=f"{where}: R^2, distribution of lengths known", value=known, unit=""))
            figures += _figures(where, exact)
            for factor in options.profile_factors:
                off = accuracy(looks, factor)
                name = f"{where}, profile x {factor:g}"
                figures.append(Figure(name=f"{name}: R^2", value=off.r2, unit=""))
                figures.append(Figure(name=f"{name}: within 90 %", value=100 * off.coverage[1], unit="%"))
            progress.advance(f"{where}: R^2 {exact.r2:.3f}, {100 * exact.coverage[1]:.1f} % within 90 %")
    return figures


def _figures(where: str, exact: Accuracy) -> list[Figure]:
    shares = [
        Figure(name=f"{where}: within {100 * interval:g} %", value=100 * share, unit="%")
        for interval, share in zip(INTERVALS, exact.coverage, strict=True)
    ]
    return [
        Figure(name=f"{where}: R^2", value=exact.r2, unit=""),
        Figure(name=f"{where}: mean error", value=100 * exact.relative_error, unit="%"),
        Figure(name=f"{where}: rms error", value=100 * exact.relative_rms, unit="%"),
        *shares,
    ]


def look_at_queue(options: BenchRwtOptions, queue: int, history: int, seed: int) -> Prediction:
    """Predict once, when at most ``queue`` requests are left waiting, and wait for what happens to them."""
    batch = options.max_num_seqs
    env = QLMEnv(
        {
            "instances": [{"device": options.device, "tp": options.tp}],
            "engine": {"max_num_seqs": batch},
        },
        {"preset": options.preset, "num_requests": queue + batch + history, "arrivals": {"kind": "batch"}},
    )
    requests = Episodes(env.scenario).requests(seed)
    _, info = env.start(requests)
    planner = make_planner(FcfsSpec())
    planner.reset(env.view, np.random.default_rng(seed))
    instance = env.view.instances[0]
    while not (instance.num_running and instance.waiting <= queue):
        info = env.step_plan(planner.act(env.view))[-1]
    factors = (1.0, *options.profile_factors)
    lengths = TokenPosteriors(env.view).of
    predicted = {f: waiting_times(env.view, instance, instance.queue, lengths, f) for f in factors}
    known = known_lengths(env.scenario)
    informed = waiting_times(env.view, instance, instance.queue, lambda _, slo_class: known[slo_class])
    rows = waiting_rows(env.view, requests)
    now_s = env.now_s
    while "metrics" not in info and np.isnan(requests["first_scheduled_s"][rows]).any():
        info = env.step_plan(planner.act(env.view))[-1]
    return Prediction(predicted, informed, np.asarray(requests["first_scheduled_s"][rows]) - now_s)


@cache
def known_lengths(scenario: ScenarioSpec) -> dict[int, TokenPosterior]:
    """By SLO class, the distribution that output lengths are drawn from, with no doubt about its mean."""
    many = scenario.workload.model_copy(update={"num_requests": KNOWN_FROM})
    requests = Episodes(scenario.model_copy(update={"workload": many})).requests(0)
    known = {}
    for slo_class in np.unique(requests["slo_class"]):
        lengths = requests["output_tokens"][requests["slo_class"] == slo_class]
        known[int(slo_class)] = TokenPosterior(float(lengths.mean()), float(lengths.var()), 0.0)
    return known


def explained(predicted: list[WaitingTimes], actual_s: list[Float]) -> float:
    """R^2 of the means over all looks."""
    actual = np.concatenate(actual_s)
    error = actual - np.concatenate([waits.mean_s for waits in predicted])
    return float(1.0 - (error**2).sum() / ((actual - actual.mean()) ** 2).sum())


def waiting_rows(view: ClusterView, requests: RequestTable) -> NDArray[np.int64]:
    """(Q,) the waiting requests of the first instance's queue, in order of admission."""
    # Preempted requests wait too, but in the engine.
    waiting = np.flatnonzero((requests["state"] == WAITING) & (requests["instance"] == NOWHERE))
    rows = [waiting[requests["group"][waiting] == g] for g in view.instances[0].queue]
    return np.concatenate(rows)


def accuracy(looks: list[Prediction], factor: float) -> Accuracy:
    """Of the predictions made with a factor on the profile's step times."""
    actual = np.concatenate([look.actual_s for look in looks])
    mean = np.concatenate([look.predicted[factor].mean_s for look in looks])
    error = actual - mean
    coverage = []
    for interval in INTERVALS:
        low, high = (
            np.concatenate([look.predicted[factor].quantile_s(0.5 + side * interval / 2) for look in looks])
            for side in (-1, 1)
        )
        coverage.append(float(((low <= actual) & (actual <= high)).mean()))
    return Accuracy(
        r2=explained([look.predicted[factor] for look in looks], [look.actual_s for look in looks]),
        relative_error=float(np.abs(error).mean() / actual.mean()),
        relative_rms=float(np.sqrt((error**2).sum() / (mean**2).sum())),
        coverage=tuple(coverage),
    )
