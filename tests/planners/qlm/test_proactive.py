"""The placement program's advice in episodes: what it loads and stages ahead, its limits and its failures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planners.qlm import proactive
from planners.qlm.placement import NO_MODEL
from planners.qlm.planner import QlmPlanner
from planners.qlm.proactive import Proactive
from planners.qlm.report import PlannerCounters
from planners.spec import QlmSpec
from qlm_env.env import QLMEnv
from qlm_env.lso import Lso, SwapModel, WarmStart
from tests.planners.crafted import PATIENT, URGENT, crafted_env, requests_of

SPEC = QlmSpec(placement_interval_s=5.0)
TWO = ("llama-2-7b", "llama-2-7b")


def advised(env: QLMEnv, *, spec: QlmSpec = SPEC, wanted: tuple[int, ...]) -> Proactive:
    """Advice that has been made already."""
    advice = Proactive(env.view, spec, PlannerCounters(), np.random.default_rng(0))
    advice._wanted = np.array(wanted)
    return advice


def test_an_instance_without_work_loads_what_it_should_hold() -> None:
    env = crafted_env(TWO, count=2)
    env.start(requests_of((1e3, 0, URGENT, 10)))
    advice = advised(env, wanted=(1, 0))
    empty: dict[int, list[int]] = {0: [], 1: []}
    assert advice.operations(env.view, empty, []) == [SwapModel(0, 1)]
    assert advice.operations(env.view, {0: [7], 1: []}, []) == []
    assert advice.operations(env.view, empty, [SwapModel(0, 1)]) == []
    assert advised(env, wanted=(NO_MODEL, NO_MODEL)).operations(env.view, empty, []) == []


def test_a_model_in_storage_is_staged_on_an_instance_that_works() -> None:
    env = QLMEnv(
        {"instances": [{"device": "A100", "count": 1, "host_memory_gb": 60, "initial_model": "a"}]},
        {
            "preset": "smoke",
            "models": [{"name": name, "architecture": "llama-2-7b"} for name in "ab"],
            "mix": [{"model": name, "slo_class": "batch-1"} for name in "ab"],
        },
    )
    env.reset(seed=0)
    assert advised(env, wanted=(1,)).operations(env.view, {0: [7]}, []) == [WarmStart(0, 1)]
    without = QlmSpec(placement_interval_s=5.0, warm_start=False)
    assert advised(env, spec=without, wanted=(1,)).operations(env.view, {0: [7]}, []) == []


def test_it_provides_for_what_has_been_arriving() -> None:
    env = crafted_env(TWO, count=2)
    env.start(requests_of(*[(0.2 * k, 1, URGENT, 300) for k in range(200)], (1e3, 0, PATIENT, 10)))
    counters = PlannerCounters()
    advice = Proactive(env.view, SPEC, counters, np.random.default_rng(0))
    while env.now_s < 30.0:
        advice.update(env.view, 5.0)
        env.step_plan([])
    assert (advice.wanted == 1).any()
    assert counters.placements == pytest.approx(6, abs=1)
    assert counters.placement_failures == 0


def episode(spec: QlmSpec) -> tuple[list[Lso], dict[str, Any], PlannerCounters]:
    env = QLMEnv(
        {"instances": [{"device": "A100", "count": 2, "host_memory_gb": 30}], "engine": {"max_num_seqs": 16}},
        {
            "preset": "smoke",
            "models": [{"name": name, "architecture": "llama-2-7b"} for name in "abc"],
            "mix": [{"model": name, "slo_class": "batch-1"} for name in "abc"],
            "arrivals": {"kind": "poisson", "load": 1.2},
            "num_requests": 150,
        },
        environment={"strict": True},
    )
    _, info = env.reset(seed=0)
    planner = QlmPlanner(spec)
    planner.reset(env.view, np.random.default_rng(0))
    lsos: list[Lso] = []
    while "metrics" not in info:
        decided = planner.act(env.view)
        lsos += decided
        info = env.step_plan(decided)[-1]
    return lsos, info["metrics"], planner.counters


def test_episodes_with_it_are_reproducible_and_counted() -> None:
    spec = QlmSpec(placement_interval_s=5.0, time_limit_s=30.0)
    first, second = episode(spec), episode(spec)
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert first[2].placements > 3
    assert first[2].placement_failures == 0
    assert episode(QlmSpec())[2].placements == 0


def test_a_solver_that_fails_advises_nothing_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no licence")

    monkeypatch.setattr(proactive, "solve_placement", fail)
    _, metrics, counters = episode(SPEC)
    assert metrics["finished"] == metrics["requests"]
    assert counters.placement_failures == counters.placements > 0


def test_without_time_nothing_is_solved() -> None:
    env = crafted_env(TWO)
    env.start(requests_of((0.0, 1, URGENT, 10)))
    counters = PlannerCounters()
    Proactive(env.view, SPEC, counters, np.random.default_rng(0)).update(env.view, 0.0)
    assert counters.placements == 0
