"""Episodes on a real cluster: one after the other, on servers that are started once.

A cluster is one thing, and so are its machines: nothing runs beside an episode, in this process or another.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import TypeVar

import numpy as np

from planners import make_planner
from planners.spec import PlannerSpec
from qlm_env.backends.base import Backend
from qlm_env.backends.emulator.backend import EmulatorBackend
from qlm_env.cluster import make_cluster
from qlm_env.env import make_vllm_backend
from qlm_env.spec import ConfigError, ScenarioSpec
from qlm_env.view import ClusterView
from runners.episode import EpisodeResult, build_workload, make_env, play, run_episode
from runners.workers import TaskFailure, outcome_of

T = TypeVar("T")
R = TypeVar("R")

REHEARSED_REQUESTS = 12

BackendMaker = Callable[[ScenarioSpec], Backend]


class LiveCluster:
    """The real cluster of one scenario, for any number of episodes; a context manager that stops what it started.

    Args:
        make_backend: raises ConfigError for what cannot be.
        report: told now and then what the cluster is doing, in lines of text.
    """

    def __init__(
        self,
        scenario: ScenarioSpec,
        report: Callable[[str], None],
        make_backend: BackendMaker = make_vllm_backend,
    ) -> None:
        self._backend = make_backend(scenario)
        self._report = report
        self._rehearsed: set[str] = set()
        """Planners with their options."""

    def __enter__(self) -> LiveCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backend.close()

    def run_episode(self, scenario: ScenarioSpec, planner: PlannerSpec, seed: int, *, timeline: bool) -> EpisodeResult:
        """As :func:`runners.episode.run_episode`, on this cluster."""
        self._rehearse(scenario, planner, seed)
        self._report(f"{planner.name} seed {seed}: servers with their initial models")

        def watch(view: ClusterView) -> None:
            self._report(f"{planner.name} seed {seed}: {describe(view)}")

        return run_episode(scenario, planner, seed, timeline=timeline, backend=self._backend, watch=watch)

    def _rehearse(self, scenario: ScenarioSpec, planner: PlannerSpec, seed: int) -> None:
        """A few requests on the emulator, so that nothing is compiled while real requests wait for a decision."""
        options = planner.model_dump_json()
        if options in self._rehearsed:
            return
        self._report(f"{planner.name} rehearses")
        engine = scenario.cluster.engine.model_copy(update={"enable_prefix_caching": False})
        cluster = scenario.cluster.model_copy(update={"engine": engine, "failures": ()})
        backend = EmulatorBackend(lambda: make_cluster(cluster, scenario.workload.models))
        env = make_env(scenario.model_copy(update={"cluster": cluster}), planner, True, backend)
        env.start(build_workload(scenario, seed)[:REHEARSED_REQUESTS].copy().view(np.recarray))
        play(env, make_planner(planner), seed)
        self._rehearsed.add(options)


def describe(view: ClusterView) -> str:
    """Time and requests so far, and below that a line per instance: its model, and requests running and queued."""
    requests = view.progress()
    models = [model.name for model in view.scenario.workload.models]
    lines = [f"{view.now_s:.0f} s, {requests.finished} of {requests.total} finished, {requests.waiting} waiting"]
    for instance in view.instances:
        if not instance.up:
            doing = "down"
        elif instance.active_model is None:
            doing = "empty" if instance.coming_model is None else f"loading {models[instance.coming_model]}"
        else:
            doing = f"{models[instance.active_model]}, {instance.num_running} running, {instance.waiting} queued"
        lines.append(f"  {view.instance_names[instance.index].name}: {doing}")
    return "\n".join(lines)


def run_in_turn(function: Callable[[T], R], tasks: Sequence[T]) -> Generator[tuple[T, R | TaskFailure], None, None]:
    """As :func:`runners.workers.run_tasks`, in this process.

    Raises:
        ConfigError: a cluster that cannot be used as configured fails every task; the first one tells.
    """

    def attempt(task: T) -> R | ConfigError:
        try:
            return function(task)
        except ConfigError as error:
            return error

    for task in tasks:
        outcome = outcome_of(attempt, task)
        if isinstance(outcome, ConfigError):
            raise outcome
        yield task, outcome
