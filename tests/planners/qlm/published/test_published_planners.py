"""The published programs and the released code as planners: they serve everything, and live with what goes wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planners import make_planner
from planners.as_released import ReleasedPlanner
from planners.base import Planner
from planners.qlm.published.planner import PublishedPlanner
from planners.qlm.published.slot_model import Limits, Solution
from planners.qlm.published.slot_problem import Goal, SlotProblem
from planners.spec import QlmV1Spec, QlmV2Spec, parse_planner
from qlm_env.env import QLMEnv
from qlm_env.lso import Balance, Evict, WarmStart
from qlm_env.spec import ConfigError

TWO_A100: dict[str, Any] = {
    "instances": [{"device": "A100", "count": 2, "host_memory_gb": 60}],
    "engine": {"max_num_seqs": 8},
}
TWO_MODELS: dict[str, Any] = {"preset": "smoke", "arrivals": {"kind": "poisson", "load": 1.5}, "num_requests": 80}
TIGHT: dict[str, Any] = {
    "classes": [
        {"name": "interactive", "target_s": 7.0},
        {"name": "batch-1", "target_s": 15.0},
        {"name": "batch-2", "target_s": 40.0},
    ]
}
STRICT = {"strict": True}
FAILING = {**TWO_A100, "failures": [{"instance": 0, "at_s": 5.0, "duration_s": 20.0}]}


def run(planner: Planner, env: QLMEnv, seed: int = 0) -> dict[str, Any]:
    _, info = env.reset(seed=seed)
    planner.reset(env.view, np.random.default_rng(seed))
    while "metrics" not in info:
        info = env.step_plan(planner.act(env.view))[-1]
    metrics: dict[str, Any] = info["metrics"]
    return metrics


FAST: dict[str, Any] = {"window_groups": 4, "node_limit": 20, "replan_interval_s": 2.0}


@pytest.mark.parametrize("spec", [QlmV2Spec(**FAST), QlmV1Spec(**FAST)], ids=["v2", "v1"])
@pytest.mark.parametrize("cluster", [TWO_A100, FAILING], ids=["healthy", "failing"])
def test_programs_run_an_episode(spec: QlmV1Spec | QlmV2Spec, cluster: dict[str, Any]) -> None:
    planner = PublishedPlanner(spec)
    metrics = run(planner, QLMEnv(cluster, TWO_MODELS, TIGHT, STRICT))
    assert metrics["finished"] == metrics["requests"]
    counters = planner.counters
    assert counters.solves > 3
    assert counters.proven > 0
    assert counters.failures == 0
    assert counters.proven + counters.fallbacks + counters.timeouts >= counters.solves


@pytest.mark.parametrize("mishap", ["error", "nothing", "infeasible"])
def test_a_solver_that_fails_is_counted_and_stops_nothing(mishap: str) -> None:
    def program(slots: SlotProblem, goal: Goal, limits: Limits) -> Solution:
        if mishap == "error":
            raise Exception("SCIP: error in LP solver!")
        return Solution("limit" if mishap == "nothing" else "infeasible", None, None, None, 0, 0.0)

    planner = PublishedPlanner(QlmV2Spec(replan_interval_s=1.0))
    planner._program = program
    env = QLMEnv(TWO_A100, TWO_MODELS, TIGHT, STRICT)
    metrics = run(planner, env)
    assert metrics["finished"] == metrics["requests"]
    counters = planner.counters
    assert counters.fallbacks == counters.solves > 3
    assert counters.failures == (2 * counters.solves if mishap == "error" else 0)
    assert counters.timeouts == (2 * counters.solves if mishap == "nothing" else 0)


def test_queues_are_in_order_of_deadline_after_a_failed_solve() -> None:
    def program(slots: SlotProblem, goal: Goal, limits: Limits) -> Solution:
        raise Exception("SCIP: error in LP solver!")

    planner = PublishedPlanner(QlmV2Spec(replan_interval_s=0))
    planner._program = program
    env = QLMEnv(FAILING, TWO_MODELS, TIGHT)
    _, info = env.reset(seed=1)
    planner.reset(env.view, np.random.default_rng(0))
    compared = 0
    while "metrics" not in info:
        failed = planner.counters.fallbacks
        lsos = planner.act(env.view)
        if planner.counters.fallbacks > failed:
            queues = {instance.index: instance.queue for instance in env.view.instances}
            for lso in lsos:
                if isinstance(lso, Balance):
                    queues = {i: [g for g in queue if g != lso.group] for i, queue in queues.items()}
                    queues[lso.instance].append(lso.group)
            for queue in queues.values():
                due = [env.view.group(g).deadline_s for g in queue]
                assert due == sorted(due)
                compared += len(due) > 1
        info = env.step_plan(lsos)[-1]
    assert compared > 5


def test_released_code_neither_evicts_nor_stages_and_draws_queues_at_random() -> None:
    env = QLMEnv(TWO_A100, TWO_MODELS, TIGHT, STRICT)
    planner = make_planner(parse_planner("qlm_released", {}))
    assert isinstance(planner, ReleasedPlanner)
    _, info = env.reset(seed=2)
    planner.reset(env.view, np.random.default_rng(2))
    home: dict[int, int] = {}
    while "metrics" not in info:
        lsos = planner.act(env.view)
        assert not any(isinstance(lso, Evict | WarmStart) for lso in lsos)
        for lso in lsos:
            if isinstance(lso, Balance):
                assert home.setdefault(lso.group, lso.instance) == lso.instance
        info = env.step_plan(lsos)[-1]
    assert info["metrics"]["finished"] == info["metrics"]["requests"]
    assert set(home.values()) == {0, 1}
    assert run(planner, env, 2) == run(planner, env, 2)


def test_a_confidence_below_one_half_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"planner.qlm_v1.confidence"):
        parse_planner("qlm_v1", {"confidence": 0.3})
