"""One episode: the seam between the commands and the environment.

Everything else in this package knows scenarios, planners and results, and reaches the environment only
through the functions here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from planners import make_planner
from planners.base import Planner
from planners.spec import PlannerSpec
from qlm_env.backends.base import Backend
from qlm_env.env import EMULATOR, QLMEnv
from qlm_env.requests import MET, RequestTable
from qlm_env.scenario import Episodes
from qlm_env.spec import EnvironmentSpec, ScenarioSpec
from qlm_env.view import ClusterView

PLANNER_STREAM = 1000
"""Spawn key of a planner's random stream, apart from those of the workload."""


class Timeline(Protocol):
    """A recorded episode that can be drawn."""

    def to_chrome_trace(self) -> dict[str, Any]:
        """The episode in Chrome's trace event format, which Perfetto opens."""
        ...


@dataclass(frozen=True)
class EpisodeResult:
    """What one finished episode leaves behind."""

    metrics: dict[str, Any]
    """The environment's ``info["metrics"]`` at the end of the episode."""
    workload_hash: str
    """Identifies the request table, whatever the planner did with it."""
    planner_statistics: Mapping[str, int]
    """What the planner counted (:meth:`planners.base.Planner.statistics`)."""
    decision_ms: NDArray[np.float64] = field(repr=False)
    """Wall-clock time of each decision of the planner, in milliseconds, shape (decisions,)."""
    wall_s: float
    """Wall-clock time of the whole episode, in seconds."""
    timeline: Timeline | None = field(default=None, repr=False)
    requests: pd.DataFrame | None = field(default=None, repr=False)
    """Beside a timeline, what became of every request (:func:`request_outcomes`)."""


def build_workload(scenario: ScenarioSpec, seed: int) -> RequestTable:
    """The requests that an episode of this seed serves; a load is a share of the cluster's capacity.

    Raises:
        ConfigError: a model fits no instance, or a profile or trace file cannot be found or read.
    """
    return Episodes(scenario).requests(seed)


def check_scenario(scenario: ScenarioSpec, seed: int) -> None:
    """Find in advance what would stop every episode of ``scenario``, such as a missing trace file.

    Raises:
        ConfigError: one line naming what is wrong.
    """
    build_workload(scenario, seed)


def run_episode(
    scenario: ScenarioSpec,
    planner: PlannerSpec,
    seed: int,
    *,
    timeline: bool,
    backend: Backend | None = None,
    watch: Callable[[ClusterView], None] | None = None,
) -> EpisodeResult:
    """Run ``planner`` through one episode of ``scenario``.

    Args:
        seed: the only source of randomness; on the emulator, equal arguments give equal metrics.
        timeline: record what every instance did, for :attr:`EpisodeResult.timeline`.
        backend: what serves the requests, which stays the caller's; None is the emulator.
        watch: sees the cluster at every decision.

    Raises:
        ConfigError: the scenario or the planner cannot be set up as configured.
    """
    env = make_env(scenario, planner, timeline, backend)
    policy = make_planner(planner)
    start = time.perf_counter()
    _, info = env.reset(seed=seed)
    workload_hash = info["workload_hash"]
    metrics, decision_ms = play(env, policy, seed, watch)
    wall_s = time.perf_counter() - start
    requests = request_outcomes(env.requests, scenario) if timeline else None
    return EpisodeResult(
        metrics, workload_hash, policy.statistics(), np.array(decision_ms), wall_s, env.timeline, requests
    )


def make_env(scenario: ScenarioSpec, planner: PlannerSpec, timeline: bool, backend: Backend | None = None) -> QLMEnv:
    """The environment of an episode; closing ``backend`` stays the caller's."""
    return QLMEnv(
        scenario.cluster.model_dump(),
        scenario.workload.model_dump(),
        scenario.slo.model_dump(),
        _environment(scenario, planner).model_dump(),
        backend=EMULATOR if backend is None else lambda _: backend,
        timeline=timeline,
    )


def play(
    env: QLMEnv, policy: Planner, seed: int, watch: Callable[[ClusterView], None] | None = None
) -> tuple[dict[str, Any], list[float]]:
    """Finish the episode that ``env`` has just begun.

    Returns:
        its metrics, and the wall-clock time of each decision in milliseconds.
    """
    # A stream of its own: what a planner draws must not depend on how the workload was drawn.
    policy.reset(env.view, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(PLANNER_STREAM,))))
    decision_ms: list[float] = []
    info: dict[str, Any] = {}
    while "metrics" not in info:
        begin = time.perf_counter()
        lsos = policy.act(env.view)
        decision_ms.append(1e3 * (time.perf_counter() - begin))
        info = env.step_plan(lsos)[-1]
        if watch is not None:
            watch(env.view)
    metrics: dict[str, Any] = info["metrics"]
    return metrics, decision_ms


def request_outcomes(requests: RequestTable, scenario: ScenarioSpec) -> pd.DataFrame:
    """One row per request in order of arrival: model, SLO class, whether it was met, and latencies since its arrival.

    ``queueing_s`` (until first scheduled), ``ttft_s`` and ``e2e_s`` are NaN for what did not happen.
    """
    table = requests.view(np.ndarray)
    models = np.array([model.name for model in scenario.workload.models])
    classes = np.array([slo_class.name for slo_class in scenario.slo.classes])
    arrival_s = table["arrival_s"]
    return pd.DataFrame(
        {
            "arrival_s": arrival_s,
            "model": models[table["model"]],
            "slo_class": classes[table["slo_class"]],
            "met": table["settled"] == MET,
            "queueing_s": table["first_scheduled_s"] - arrival_s,
            "ttft_s": table["first_token_s"] - arrival_s,
            "e2e_s": table["finish_s"] - arrival_s,
        }
    )


def _environment(scenario: ScenarioSpec, planner: PlannerSpec) -> EnvironmentSpec:
    """The environment, with the planner's own decision time where a fixed one is charged."""
    environment = scenario.environment
    charged = environment.decision_time
    if charged.mode != "fixed" or planner.decision_s is None:
        return environment
    return environment.model_copy(update={"decision_time": charged.model_copy(update={"fixed_s": planner.decision_s})})
