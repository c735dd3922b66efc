"""The layers of a solve: what they report, and that a solver's failure never reaches the episode."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from planners.qlm import layers
from planners.qlm.construct import insert_all
from planners.qlm.heuristics import batched_edf_plan, edf_plan, inserted_plan
from planners.qlm.layers import Layers
from planners.qlm.plan import Plan
from planners.qlm.problem import Problem
from planners.qlm.report import PlannerCounters, PlanReport
from planners.spec import QlmSpec
from tests.planners.problems import random_problem

POLISHED = QlmSpec(polish=True, iterations=400, time_limit_s=0.5)


@pytest.fixture
def problem() -> Problem:
    layers.prepare()
    return random_problem(np.random.default_rng(3), 20, 4)


def poor_plan(problem: Problem) -> Plan:
    """Everything at the end of some queue, in no order."""
    num_groups, num_instances = problem.allowed.shape
    plan = Plan.empty(num_instances, num_groups)
    order = np.random.default_rng(1).permutation(num_groups).astype(np.int32)
    plan.total = insert_all(problem, order, True, plan.sequence, plan.length, plan.costs)
    return plan


def solve(layered: Layers, problem: Problem, present: Plan, time_limit_s: float = 5.0) -> Plan:
    return layered.solve(problem, present, np.random.default_rng(0), time.perf_counter() + time_limit_s)


def best_heuristic(problem: Problem) -> float:
    return min(heuristic(problem).total for heuristic in (edf_plan, batched_edf_plan, inserted_plan))


def test_a_plan_reports_its_cost_time_and_layer(problem: Problem) -> None:
    layered = Layers(POLISHED)
    plan = solve(layered, problem, poor_plan(problem))
    report = layered.report
    assert report is not None
    assert report.cost == plan.total <= best_heuristic(problem)
    assert report.layer in ("sequencing", "master")
    assert report.iterations == 400
    assert 0 < report.time_s < 5
    assert report.failures == ()
    assert report.bound is None
    assert report.gap is None
    assert layered.counters == PlannerCounters(solves=1, adopted=1)


def test_the_gap_is_what_a_better_plan_could_save() -> None:
    assert PlanReport(10.0, "sequencing", 0.1, 5, bound=8.0).gap == pytest.approx(0.2)
    assert PlanReport(10.0, "sequencing", 0.1, 5, bound=10.0 + 1e-9).gap == 0.0
    assert PlanReport(0.0, "sequencing", 0.1, 5, bound=0.0).gap == 0.0


def test_a_present_plan_that_is_as_good_stays(problem: Problem) -> None:
    layered = Layers(QlmSpec(iterations=3000))
    best = solve(layered, problem, poor_plan(problem))
    again = solve(layered, problem, best)
    assert again is best
    assert layered.report is not None
    assert layered.report.layer == "present"
    assert layered.counters.solves == 2
    assert layered.counters.adopted == 1


def raise_error(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("SCIP: unspecified error!")


def return_nothing(*arguments: Any, **options: Any) -> Any:
    return None


@pytest.mark.parametrize("failing", [raise_error, return_nothing])
@pytest.mark.parametrize("solver", ["solve_master", "search_plan"])
def test_a_failing_solver_leaves_the_best_of_the_other_layers(
    failing: Any, solver: str, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, solver, failing)
    layered = Layers(POLISHED)
    for solves in (1, 2):
        plan = solve(layered, problem, poor_plan(problem))
        assert plan.total <= best_heuristic(problem)
        expected = PlannerCounters(solves=solves, adopted=solves, failures=solves, fallbacks=solves)
        assert layered.counters == expected
        assert layered.report is not None
        assert len(layered.report.failures) == 1
    if failing is raise_error:
        assert "SCIP: unspecified error!" in layered.report.failures[0]


def test_with_every_solver_failing_the_best_heuristic_is_the_plan(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "solve_master", raise_error)
    monkeypatch.setattr(layers, "search_plan", raise_error)
    layered = Layers(POLISHED)
    plan = solve(layered, problem, poor_plan(problem))
    assert plan.total == best_heuristic(problem)
    assert layered.report is not None
    assert layered.report.layer in ("edf", "batched_edf", "insertion")
    assert layered.counters.failures == 2
    assert layered.counters.fallbacks == 1


def test_a_solver_that_does_not_come_back_is_left_behind(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    solve(Layers(POLISHED), problem, poor_plan(problem))

    def sleep(*arguments: Any, **options: Any) -> Any:
        time.sleep(1.0)

    monkeypatch.setattr(layers, "solve_master", sleep)
    layered = Layers(POLISHED)
    for solves in (1, 2):
        begin = time.perf_counter()
        plan = solve(layered, problem, poor_plan(problem), time_limit_s=0.2)
        assert time.perf_counter() - begin < 0.4
        assert plan.total <= best_heuristic(problem)
        # The second time, the first solve is still asleep.
        assert layered.counters.timeouts == solves
        assert layered.counters.fallbacks == solves
        assert layered.counters.failures == 0


def test_without_time_the_present_plan_stays(problem: Problem) -> None:
    layered = Layers(POLISHED)
    present = poor_plan(problem)
    assert solve(layered, problem, present, time_limit_s=0.0) is present
    assert layered.counters.timeouts > 0


def test_a_bound_is_found_in_the_background(problem: Problem) -> None:
    layered = Layers(QlmSpec(bound_time_s=20.0))
    plan = solve(layered, problem, poor_plan(problem))
    deadline = time.monotonic() + 60.0
    while layered.report is not None and layered.report.bound is None and time.monotonic() < deadline:
        time.sleep(0.05)
    report = layered.report
    assert report is not None
    assert report.bound is not None
    assert report.gap is not None
    assert 0.0 < report.bound <= plan.total == report.cost
    assert report.gap == pytest.approx((report.cost - report.bound) / report.cost)


def test_a_bound_that_fails_is_counted_and_missing(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planners.qlm.column_generation.bound_plan", raise_error)
    layered = Layers(QlmSpec(bound_time_s=20.0))
    solve(layered, problem, poor_plan(problem))
    deadline = time.monotonic() + 60.0
    while layered.counters.failures == 0 and time.monotonic() < deadline:
        assert layered.report is not None
        time.sleep(0.01)
    assert layered.report is not None
    assert layered.report.bound is None
    assert layered.counters.failures == 1
