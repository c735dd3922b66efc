"""Every planner on the environment: orders, dispatch, determinism, and how they compare where they must."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planners import make_planner
from planners.base import Planner
from planners.qlm.construct import insert_all
from planners.qlm.plan import Plan
from planners.qlm.planner import QlmPlanner
from planners.qlm.problem import Problem
from planners.spec import PLANNER_NAMES, QlmSpec, parse_planner
from qlm_env.env import QLMEnv
from qlm_env.lso import Balance
from qlm_env.spec import ConfigError

SMALL_MIXED: dict[str, Any] = {
    "instances": [{"device": "A100", "count": 2, "host_memory_gb": 60}],
    "engine": {"max_num_seqs": 16},
}
UNTRAINED = [name for name in PLANNER_NAMES if name != "learned"]
"""What needs no checkpoint, and serves everything whatever it has learned."""

TWO_MODELS: dict[str, Any] = {"preset": "smoke", "arrivals": {"kind": "poisson", "load": 1.2}, "num_requests": 150}


def run(planner: Planner, env: QLMEnv, seed: int = 0) -> dict[str, Any]:
    _, info = env.reset(seed=seed)
    planner.reset(env.view, np.random.default_rng(seed))
    while "metrics" not in info:
        info = env.step_plan(planner.act(env.view))[-1]
    metrics: dict[str, Any] = info["metrics"]
    return metrics


@pytest.fixture(scope="module")
def env() -> QLMEnv:
    return QLMEnv(SMALL_MIXED, TWO_MODELS, environment={"strict": True})


@pytest.mark.parametrize("name", UNTRAINED)
def test_every_planner_serves_everything_with_legal_operations_only(name: str, env: QLMEnv) -> None:
    spec = parse_planner(name, {})
    first = run(make_planner(spec), env)
    assert first["finished"] == first["requests"]
    assert first["invalid_actions"] == 0
    assert run(make_planner(spec), env) == first


@pytest.mark.parametrize("name", UNTRAINED)
def test_every_planner_lives_through_failures(name: str) -> None:
    failures = [{"instance": 0, "at_s": 5.0, "duration_s": 20.0}, {"instance": 1, "at_s": 10.0, "duration_s": 30.0}]
    env = QLMEnv({**SMALL_MIXED, "failures": failures}, TWO_MODELS)
    metrics = run(make_planner(parse_planner(name, {})), env)
    assert metrics["finished"] == metrics["requests"]


@pytest.mark.parametrize(
    ("name", "key"),
    [("fcfs", "arrival_s"), ("edf", "deadline_s")],
)
def test_list_planners_keep_queues_in_order(name: str, key: str, env: QLMEnv) -> None:
    planner = make_planner(parse_planner(name, {}))
    env.reset(seed=3)
    planner.reset(env.view, np.random.default_rng(0))
    compared = 0
    for _ in range(300):
        queues = {instance.index: instance.queue for instance in env.view.instances}
        for lso in planner.act(env.view):
            if isinstance(lso, Balance):
                queues = {i: [g for g in queue if g != lso.group] for i, queue in queues.items()}
                queues[lso.instance].append(lso.group)
        for queue in queues.values():
            keys = [getattr(env.view.group(g), key) for g in queue]
            assert keys == sorted(keys)
            compared += len(keys) > 1
        if "metrics" in env.step_plan(planner.act(env.view))[-1]:
            break
    assert compared > 10


def test_round_robin_deals_groups_in_turn() -> None:
    env = QLMEnv(
        SMALL_MIXED,
        {
            **TWO_MODELS,
            "models": [{"name": "m", "architecture": "llama-2-7b"}],
            "mix": [{"model": "m", "slo_class": "batch-2"}],
        },
    )
    env.reset(seed=0)
    planner = make_planner(parse_planner("round_robin", {}))
    planner.reset(env.view, np.random.default_rng(0))
    dealt = []
    for _ in range(40):
        lsos = planner.act(env.view)
        dealt += [lso.instance for lso in lsos if isinstance(lso, Balance) and not env.view.group(lso.group).queued]
        if "metrics" in env.step_plan(lsos)[-1]:
            break
    assert dealt[:6] == [0, 1, 0, 1, 0, 1]


def test_unknown_planners_and_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no planner named 'edff'; allowed: fcfs, edf.*did you mean 'edf'"):
        parse_planner("edff", {})
    with pytest.raises(ConfigError, match=r"unknown key 'planner.qlm.time_limit'.*did you mean 'time_limit_s'"):
        parse_planner("qlm", {"time_limit": 1})
    with pytest.raises(ConfigError, match=r"planner.qlm.time_limit_s"):
        parse_planner("qlm", {"time_limit_s": 0})


class SpyingQlm(QlmPlanner):
    """Notes the cost of every solve beside that of the EDF plan and of the present one."""

    def __init__(self, spec: QlmSpec) -> None:
        super().__init__(spec)
        self.notes: list[tuple[float, float, float]] = []

    def _solve(self, problem: Problem, present: Plan, deadline: float) -> Plan:
        num_groups, num_instances = problem.allowed.shape
        edf = Plan.empty(num_instances, num_groups)
        order = np.argsort(problem.first_slack_s, kind="stable").astype(np.int32)
        edf.total = insert_all(problem, order, True, edf.sequence, edf.length, edf.costs)
        plan = super()._solve(problem, present, deadline)
        self.notes.append((plan.total, edf.total, present.total))
        return plan


def test_qlm_never_adopts_a_plan_worse_than_edf_by_its_own_estimate() -> None:
    env = QLMEnv("small_multi", {"preset": "w_b", "num_requests": 500})
    planner = SpyingQlm(QlmSpec())
    run(planner, env)
    assert planner.counters.solves == len(planner.notes) > 3
    assert planner.counters.failures == planner.counters.timeouts == 0
    for chosen, edf, present in planner.notes:
        assert chosen <= present + 1e-9
        # A plan within the hysteresis of the present one is not worth changing to.
        assert chosen <= edf * (1 + 2e-3) + 1e-9


def test_qlm_beats_edf_where_swaps_matter() -> None:
    env = QLMEnv("small_multi", {"preset": "w_b", "num_requests": 600})
    edf = run(make_planner(parse_planner("edf", {})), env, seed=11)
    qlm = run(make_planner(QlmSpec()), env, seed=11)
    assert qlm["slo_attainment"] > edf["slo_attainment"] + 0.1
    assert qlm["swaps"] < edf["swaps"]


def test_edf_beats_fcfs_near_saturation() -> None:
    env = QLMEnv(
        {"instances": [{"device": "A100", "count": 2}], "engine": {"max_num_seqs": 48}},
        {"preset": "w_a", "num_requests": 1000, "arrivals": {"kind": "poisson", "load": 1.1}},
    )
    fcfs = run(make_planner(parse_planner("fcfs", {})), env, seed=12)
    edf = run(make_planner(parse_planner("edf", {})), env, seed=12)
    assert edf["slo_attainment"] > fcfs["slo_attainment"] + 0.05
