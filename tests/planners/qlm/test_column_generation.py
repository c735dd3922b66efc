"""The bound is at most the optimum, and polishing never makes a plan worse."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from planners.qlm import column_generation
from planners.qlm.brute_force import cheapest_plan
from planners.qlm.column_generation import BackgroundBound, BoundSettings, Resolution, bound_plan
from planners.qlm.heuristics import edf_plan, inserted_plan
from planners.qlm.problem import CHANCE, LATENESS, MISS, POINT, Problem
from planners.qlm.sequencing import search_plan
from planners.qlm.synthetic import random_problem
from tests.planners import problems

COARSE = BoundSettings(time_limit_s=60.0, time_steps=128, stages=(Resolution(8, 4, 1), Resolution(32, 16, 4)))


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compiling would count against the time limits."""
    problem = random_problem(np.random.default_rng(0), 2, 1, 1)
    bound_plan(problem, inserted_plan(problem), BoundSettings(round_limit=1))


def a_problem(seed: int, form: int = MISS) -> Problem:
    rng = np.random.default_rng(seed)
    if seed % 2:
        return random_problem(rng, int(rng.integers(2, 7)), int(rng.integers(1, 4)), 3, rng.uniform(0.5, 3), form)
    return problems.random_problem(rng, int(rng.integers(2, 7)), int(rng.integers(1, 4)))._replace(form=form)


@pytest.mark.parametrize("form", [MISS, LATENESS, CHANCE, POINT])
def test_the_bound_is_at_most_the_optimum(form: int) -> None:
    tightness = []
    for seed in range(40):
        problem = a_problem(seed, form)
        optimum = cheapest_plan(problem).total
        result = bound_plan(problem, inserted_plan(problem), COARSE)
        assert result.bound <= optimum * (1 + 1e-9)
        assert result.plan.total >= optimum * (1 - 1e-9)
        assert result.converged
        tightness.append(result.bound / optimum)
    assert np.median(tightness) > 0.85


def test_polish_finds_plans_that_are_never_worse() -> None:
    better = 0
    for seed in range(6):
        problem = random_problem(np.random.default_rng(seed), 20, 4, 3, 1.5)
        start = edf_plan(problem)
        result = bound_plan(problem, start, COARSE)
        assert result.plan.total <= start.total
        rows = len(result.plan.length)
        assert sorted(g for i in range(rows) for g in result.plan.queue(i)) == list(range(20))
        assert all(problem.allowed[g, i] for i in range(rows - 1) for g in result.plan.queue(i))
        assert 0.0 < result.bound <= result.plan.total
        better += result.plan.total < 0.99 * start.total
    assert better >= 4


@pytest.mark.parametrize("seed", range(3))
def test_the_box_around_the_prices_does_not_change_the_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(np.random.default_rng(seed), 20, 4, 3, 1.5)
    plan = inserted_plan(problem)
    boxed = bound_plan(problem, plan, COARSE)
    monkeypatch.setattr(column_generation, "FIRST_WIDTH", 1e9)
    monkeypatch.setattr(column_generation, "LATER_WIDTH", 1e9)
    free = bound_plan(problem, plan, COARSE)
    assert boxed.converged
    assert free.converged
    # Which states are merged depends on the prices, so that the two relaxations differ a little.
    assert boxed.bound == pytest.approx(free.bound, rel=1e-2)


def test_alike_instances_are_bounded_together() -> None:
    problem = random_problem(np.random.default_rng(4), 10, 1, 2, 2.0)
    twins = problem._replace(
        **{
            name: np.repeat(getattr(problem, name), 3, axis=1)
            for name in ("allowed", "interval_s", "batch", "latency_s", "latency_growth_s", "crowding_cost")
        },
        **{
            name: np.repeat(getattr(problem, name), 3, axis=0)
            for name in (
                "start_model", "ready_s", "present", "drain_s", "load_s", "unload_s", "idle_s", "swap_cost",
                "evict_s", "displaced_weight", "displaced_slack_s", "displaced_delay_cost",
            )
        },
    )  # fmt: skip
    plan = search_plan(twins, inserted_plan(twins), np.random.default_rng(0), 2000, 5.0).plan
    together = bound_plan(twins, plan, COARSE)
    apart = twins._replace(ready_s=twins.ready_s + np.array([0.0, 1e-9, 2e-9]))
    assert together.bound == pytest.approx(bound_plan(apart, plan, COARSE).bound, rel=2e-3)
    assert together.bound <= plan.total


def test_a_group_no_instance_takes_is_bounded_by_holding_it() -> None:
    problem = random_problem(np.random.default_rng(5), 3, 2, 1)
    problem.allowed[:] = False
    plan = inserted_plan(problem)
    assert bound_plan(problem, plan, COARSE).bound == pytest.approx(plan.total, rel=1e-6)


def test_equal_problems_give_equal_bounds() -> None:
    problem = random_problem(np.random.default_rng(6), 15, 3, 3)
    first, second = (bound_plan(problem, inserted_plan(problem), COARSE) for _ in range(2))
    assert (first.bound, first.rounds, first.plan.total) == (second.bound, second.rounds, second.plan.total)


def test_it_runs_in_the_background_until_it_is_interrupted() -> None:
    problem = random_problem(np.random.default_rng(7), 80, 16, 5)
    plan = inserted_plan(problem)
    begin = time.perf_counter()
    background = BackgroundBound(problem, plan, BoundSettings(time_limit_s=60.0))
    # The interpreter is free meanwhile.
    turns = 0
    while time.perf_counter() - begin < 0.5:
        time.sleep(0.005)
        turns += 1
    assert turns > 30
    result = background.result(interrupt=True)
    assert time.perf_counter() - begin < 5.0
    assert background.finished
    assert 0.0 <= result.bound <= result.plan.total <= plan.total


def test_a_stopped_bound_is_valid() -> None:
    problem = a_problem(11)
    stop = threading.Event()
    stop.set()
    plan = inserted_plan(problem)
    result = bound_plan(problem, plan, COARSE, stop)
    assert result.rounds == 0
    assert result.bound == 0.0
    assert result.plan is plan
    assert not result.converged
