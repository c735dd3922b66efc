"""SHEPHERD-style planning: the largest feasible batch, preemption by value, nothing lost."""

from __future__ import annotations

import pytest

from planners.shepherd import ShepherdPlanner
from planners.spec import ShepherdSpec, parse_planner
from qlm_env.lso import Balance, Evict, SwapModel
from qlm_env.spec import ConfigError
from tests.planners.crafted import PATIENT, URGENT, advance_to, begin, crafted_env, requests_of, serve

TWO = ("llama-2-7b", "llama-2-13b")


def planner() -> ShepherdPlanner:
    return ShepherdPlanner(ShepherdSpec())


@pytest.mark.parametrize(("others", "swaps"), [(9, True), (3, False)])
def test_the_larger_batch_runs_first(others: int, swaps: bool) -> None:
    env = crafted_env(TWO)
    begin(env, shepherd := planner(), requests_of(*[(0.0, 0, URGENT, 50)] * 6, *[(0.0, 1, URGENT, 50)] * others))
    assert (SwapModel(0, 1) in shepherd.act(env.view)) == swaps


@pytest.mark.parametrize(("running", "preempts"), [(2, True), (4, False)])
def test_a_batch_preempts_one_that_is_worth_less_than_a_third(running: int, preempts: bool) -> None:
    env = crafted_env(TWO)
    requests = requests_of(*[(0.0, 0, PATIENT, 2000)] * running, *[(5.0, 1, URGENT, 50)] * 10)
    begin(env, shepherd := planner(), requests)
    advance_to(env, shepherd, 5.0)
    lsos = shepherd.act(env.view)
    assert (Evict(0, keep_kv=True) in lsos) == preempts
    if preempts:
        metrics = serve(env, planner(), requests)
        assert metrics["slo_attainment"] == 1.0
        assert metrics["recomputed_tokens"] == 0


def test_a_batch_that_would_be_late_is_no_candidate() -> None:
    """Forty requests of another model do not preempt two once their time has passed, and are served in the end."""
    env = crafted_env(TWO)
    requests = requests_of(*[(0.0, 0, PATIENT, 2000)] * 2, *[(5.0, 1, URGENT, 50)] * 40)
    begin(env, shepherd := planner(), requests)
    env.step_plan([Balance(0, 0)])
    while env.now_s < 24.0:
        env.step_plan([])
    assert shepherd.act(env.view) == []
    metrics = serve(env, planner(), requests_of(*[(0.0, 0, PATIENT, 500)], *[(0.1, 1, URGENT, 3000)] * 40))
    assert metrics["finished"] == 41
    assert metrics["emulated_s"] < 1000


def test_another_instance_loads_a_model_only_when_its_own_has_no_room() -> None:
    env = crafted_env(TWO, count=2)
    few = serve(env, planner(), requests_of(*[(float(k), 0, PATIENT, 100) for k in range(20)]))
    assert few["swaps"] == 0


def test_the_ratio_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match=r"planner.shepherd.preemption_ratio"):
        parse_planner("shepherd", {"preemption_ratio": 0.5})
