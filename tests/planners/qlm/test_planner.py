"""The planner in episodes: its settings, its limits, and clusters and groups that leave it little to plan."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from planners.qlm import layers
from planners.qlm.dedication import dedicate
from planners.qlm.planner import QlmPlanner
from planners.qlm.problem import make_problem
from planners.spec import QlmSpec, parse_planner
from qlm_env.env import QLMEnv
from qlm_env.lso import Balance, Evict, Lso, SwapModel, WarmStart, apply_lso
from qlm_env.spec import ConfigError
from qlm_env.view import ClusterView, GroupView, OutputStatistics

CLUSTER: dict[str, Any] = {
    "instances": [{"device": "A100", "count": 2, "host_memory_gb": 30}],
    "engine": {"max_num_seqs": 16},
}


def mix(weights: dict[str, float], classes: tuple[str, ...] = ("batch-1", "batch-2")) -> dict[str, Any]:
    """Requests for as many 7B models, by name and weight."""
    return {
        "preset": "smoke",
        "models": [{"name": name, "architecture": "llama-2-7b"} for name in weights],
        "mix": [
            {"model": name, "slo_class": slo_class, "weight": weight}
            for name, weight in weights.items()
            for slo_class in classes
        ],
        "arrivals": {"kind": "poisson", "load": 1.6},
        "num_requests": 300,
    }


WORKLOAD = mix({"a": 1, "b": 1, "c": 1})


class Episode:
    """A finished episode and every operation of the planner."""

    def __init__(
        self, spec: QlmSpec, cluster: dict[str, Any] = CLUSTER, workload: dict[str, Any] = WORKLOAD, seed: int = 0
    ) -> None:
        env = QLMEnv(cluster, workload, environment={"strict": True})
        _, info = env.reset(seed=seed)
        self.planner = QlmPlanner(spec)
        self.planner.reset(env.view, np.random.default_rng(seed))
        self.lsos: list[Lso] = []
        self.first_instance: dict[int, int] = {}
        self.moves = 0
        while "metrics" not in info:
            lsos = self.planner.act(env.view)
            for lso in lsos:
                if isinstance(lso, Balance):
                    home = self.first_instance.setdefault(lso.group, lso.instance)
                    self.moves += home != lso.instance
            self.lsos += lsos
            info = env.step_plan(lsos)[-1]
        self.metrics: dict[str, Any] = info["metrics"]

    def count(self, kind: type) -> int:
        return sum(isinstance(lso, kind) for lso in self.lsos)


@pytest.fixture(scope="module")
def full() -> Episode:
    return Episode(QlmSpec())


def test_plans_are_reported_and_counted(full: Episode) -> None:
    counters = full.planner.counters
    assert counters.solves >= counters.adopted > 0
    assert counters.failures == counters.timeouts == counters.fallbacks == 0
    report = full.planner.report
    assert report is not None
    assert report.cost > 0


def test_the_full_planner_uses_what_the_ablations_lack(full: Episode) -> None:
    assert full.count(WarmStart) > 0
    assert full.count(SwapModel) > 0
    assert full.moves > 0


def test_without_warm_starts_nothing_is_staged() -> None:
    assert Episode(QlmSpec(warm_start=False)).count(WarmStart) == 0


def test_without_balancing_a_group_stays_where_it_was_put() -> None:
    episode = Episode(QlmSpec(balance=False))
    assert episode.moves == 0
    assert episode.metrics["finished"] == episode.metrics["requests"]


def test_without_swaps_every_instance_serves_one_model() -> None:
    episode = Episode(QlmSpec(swap=False), workload=mix({"a": 1, "b": 3}))
    targets = [(lso.instance, lso.model) for lso in episode.lsos if isinstance(lso, SwapModel)]
    assert len(set(targets)) == len({instance for instance, _ in targets})
    assert episode.metrics["swaps"] <= 2
    assert episode.metrics["finished"] == episode.metrics["requests"]


EVICTING: dict[str, Any] = {
    "cluster": {"instances": [{"device": "A100", "count": 1}]},
    "workload": {
        **mix({"chat": 1, "batch": 1}),
        "mix": [
            {"model": "chat", "slo_class": "interactive", "weight": 1},
            {"model": "batch", "slo_class": "batch-2", "weight": 4},
        ],
        "lengths": {"kind": "lognormal", "prompt_mean_tokens": 400, "output_mean_tokens": 800},
        "arrivals": {"kind": "poisson", "load": 0.5},
        "num_requests": 150,
    },
}
"""Urgent requests now and then, where a batch with hours of time takes minutes to drain."""


def test_evictions_keep_kv_drop_it_or_are_left_out() -> None:
    kept = Episode(QlmSpec(), **EVICTING)
    assert kept.count(Evict) > 0
    assert all(lso.keep_kv for lso in kept.lsos if isinstance(lso, Evict))
    dropped = Episode(QlmSpec(keep_kv=False), **EVICTING)
    assert dropped.count(Evict) > 0
    assert not any(lso.keep_kv for lso in dropped.lsos if isinstance(lso, Evict))
    left_out = Episode(QlmSpec(evict=False), **EVICTING)
    assert left_out.count(Evict) == 0
    assert kept.metrics["slo_attainment"] > left_out.metrics["slo_attainment"] + 0.05


@pytest.mark.parametrize("cost", ["lateness", "chance", "point"])
def test_every_form_of_the_cost_serves_everything(cost: str) -> None:
    episode = Episode(parse_planner("qlm", {"cost": cost}))  # type: ignore[arg-type]
    assert episode.metrics["finished"] == episode.metrics["requests"]
    assert episode.metrics["slo_attainment"] > 0.3


def dedicated(cluster: dict[str, Any], workload: dict[str, Any]) -> list[int]:
    env = QLMEnv(cluster, workload)
    env.reset(seed=0)
    return dedicate(env.view).tolist()


def test_instances_are_dedicated_in_proportion_to_demand() -> None:
    cluster = {"instances": [{"device": "A100", "count": 6}]}
    assert np.bincount(dedicated(cluster, mix({"a": 1, "b": 1, "c": 1}))).tolist() == [2, 2, 2]
    assert np.bincount(dedicated(cluster, mix({"a": 4, "b": 1, "c": 1}))).tolist() == [4, 1, 1]
    # However small its share, a model has an instance while there are enough.
    assert np.bincount(dedicated(cluster, mix({"a": 100, "b": 1, "c": 1}))).tolist() == [4, 1, 1]
    assert len(set(dedicated({"instances": [{"device": "A100", "count": 2}]}, mix({"a": 3, "b": 2, "c": 1})))) == 2


def test_a_large_model_gets_the_instance_that_fits_it() -> None:
    cluster = {"instances": [{"device": "A10", "tp": 2, "count": 2}, {"device": "A100", "tp": 4, "count": 1}]}
    assert dedicated(cluster, {"preset": "w_b"})[2] == 4


def test_output_lengths_can_be_given() -> None:
    asked: list[tuple[int, int]] = []

    def outputs(view: ClusterView, group: GroupView) -> OutputStatistics:
        asked.append((group.model, group.slo_class))
        return OutputStatistics(0, 10.0, 0.0)

    env = QLMEnv(CLUSTER, WORKLOAD)
    env.reset(seed=0)
    while len(env.view.groups) < 2:
        env.step_plan([])
    groups = env.view.groups
    idle_s = np.zeros(2)
    short = make_problem(env.view, groups, QlmSpec(), idle_s, outputs)
    assert asked == [(group.model, group.slo_class) for group in groups]
    usual = make_problem(env.view, groups, QlmSpec(), idle_s)
    assert (short.latency_s < 0.2 * usual.latency_s).all()
    assert (short.output_cv == 0.0).all()
    asked.clear()
    planner = QlmPlanner(QlmSpec(), outputs)
    planner.reset(env.view, np.random.default_rng(0))
    planner.act(env.view)
    assert asked


def test_lateness_is_weighed_by_the_target() -> None:
    env = QLMEnv(CLUSTER, WORKLOAD)
    env.reset(seed=0)
    while len(env.view.groups) < 2:
        env.step_plan([])
    groups = env.view.groups
    problem = make_problem(env.view, groups, QlmSpec(cost="lateness"), np.zeros(2))
    assert problem.weight.tolist() == [1.0 / group.target_s for group in groups]


def test_it_plans_anew_when_the_state_has_moved_or_the_outlook_has_become_worse() -> None:
    env = QLMEnv(CLUSTER, {**mix({"a": 1}, ("interactive",)), "arrivals": {"kind": "poisson", "load": 4.0}})
    env.reset(seed=0)
    # Nothing is held back, so that only these reasons to plan are left.
    planner = QlmPlanner(QlmSpec(replan_interval_s=0.0, hold_s=1e5))
    planner.reset(env.view, np.random.default_rng(0))
    while planner._planned_cost < 0.6 or not all(group.queued for group in env.view.groups):
        env.step_plan([])
        for lso in planner.act(env.view):
            apply_lso(env._world, *lso.code())  # type: ignore[arg-type]
    solves = planner.counters.solves
    # Nothing has happened since.
    planner.act(env.view)
    assert planner.counters.solves == solves
    # As if the plan had been expected to be better than it looks now.
    planner._planned_cost -= 1.0
    planner.act(env.view)
    assert planner.counters.solves == solves + 1
    planner.act(env.view)
    assert planner.counters.solves == solves + 1
    planner._planned_state = ()
    planner.act(env.view)
    assert planner.counters.solves == solves + 2


# --------------------------------------------------------------------------- failures and limits
def test_failing_solvers_never_stop_an_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no licence")

    monkeypatch.setattr(layers, "search_plan", fail)
    monkeypatch.setattr(layers, "solve_master", fail)
    episode = Episode(QlmSpec(polish=True))
    assert episode.metrics["finished"] == episode.metrics["requests"]
    counters = episode.planner.counters
    assert counters.failures == 2 * counters.solves > 0
    assert counters.fallbacks == counters.solves


def test_a_decision_keeps_its_time_limit() -> None:
    env = QLMEnv(CLUSTER, WORKLOAD)
    limit_s = 0.15
    env.reset(seed=0)
    planner = QlmPlanner(QlmSpec(iterations=10**9, time_limit_s=limit_s, polish=True))
    planner.reset(env.view, np.random.default_rng(0))
    longest_s = 0.0
    while planner.counters.solves < 4:
        begin = time.perf_counter()
        lsos = planner.act(env.view)
        longest_s = max(longest_s, time.perf_counter() - begin)
        env.step_plan(lsos)
    assert planner.counters.timeouts >= 4
    assert 0.5 * limit_s < longest_s < limit_s + 0.1


# --------------------------------------------------------------------------- little to plan
def test_no_group_needs_no_operation_of_the_planner() -> None:
    env = QLMEnv(CLUSTER, mix({"a": 1}))
    env.reset(seed=0)
    while env.view.groups:
        env.step_plan([Balance(group.id, 0) for group in env.view.groups if not group.queued])
    planner = QlmPlanner(QlmSpec(warm_start=False))
    planner.reset(env.view, np.random.default_rng(0))
    assert list(planner.act(env.view)) == []


def test_with_no_healthy_instance_groups_wait_for_one() -> None:
    outage = [{"instance": i, "at_s": 1.0, "duration_s": 60.0} for i in range(2)]
    env = QLMEnv({**CLUSTER, "failures": outage}, WORKLOAD, environment={"strict": True})
    _, info = env.reset(seed=0)
    planner = QlmPlanner(QlmSpec())
    planner.reset(env.view, np.random.default_rng(0))
    planned_while_down = 0
    while "metrics" not in info:
        if env.view.groups and not any(instance.up for instance in env.view.instances):
            problem = make_problem(env.view, env.view.groups, QlmSpec(), np.zeros(2))
            assert not problem.allowed.any()
            planned_while_down += 1
        info = env.step_plan(planner.act(env.view))[-1]
    assert planned_while_down > 10
    assert info["metrics"]["finished"] == info["metrics"]["requests"]


def test_a_model_without_a_dedicated_instance_is_never_served_and_stops_nothing() -> None:
    cluster = {"instances": [{"device": "A100", "count": 2}], "engine": {"max_num_seqs": 16}}
    workload = {**mix({"a": 3, "b": 2, "c": 1}), "num_requests": 60}
    env = QLMEnv(cluster, workload, environment={"strict": True, "max_drain_s": 300.0})
    _, info = env.reset(seed=0)
    planner = QlmPlanner(QlmSpec(swap=False))
    planner.reset(env.view, np.random.default_rng(0))
    while "metrics" not in info:
        info = env.step_plan(planner.act(env.view))[-1]
    assert 0.5 < info["metrics"]["finished"] / info["metrics"]["requests"] < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "late"}, r"planner.qlm.cost.*'miss', 'lateness', 'chance' or 'point'"),
        ({"confidence": 1.0}, r"planner.qlm.confidence.*less than 1"),
        ({"confidence": 0.0}, r"planner.qlm.confidence.*greater than 0"),
        ({"iterations": 0}, r"planner.qlm.iterations.*greater than 0"),
        ({"time_limit_s": -1}, r"planner.qlm.time_limit_s.*greater than 0"),
        ({"time_limit_s": float("inf")}, r"planner.qlm.time_limit_s.*finite"),
        ({"balance": "maybe"}, r"planner.qlm.balance"),
        ({"node_limit": 0.5}, r"planner.qlm.node_limit"),
    ],
)
def test_wrong_settings_are_named_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_planner("qlm", options)
    assert "\n" not in str(caught.value)
