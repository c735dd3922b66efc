"""The search over virtual queues: what it keeps in memory, what it returns, and how good that is."""

from __future__ import annotations

import time

import numpy as np
import pytest

from planners.qlm import sequencing
from planners.qlm.construct import evaluate
from planners.qlm.cost import cost_of_holding, cost_of_queue
from planners.qlm.heuristics import batched_edf_plan, edf_plan, inserted_plan
from planners.qlm.plan import Plan
from planners.qlm.problem import CHANCE, LATENESS, MISS, POINT, Problem
from planners.qlm.sequencing import search_plan
from tests.planners.problems import random_problem
from tests.planners.test_qlm_cost import best_by_brute_force

HEURISTICS = (edf_plan, batched_edf_plan, inserted_plan)


def assert_valid(problem: Problem, plan: Plan) -> None:
    num_groups, num_instances = problem.allowed.shape
    queues = [plan.queue(i) for i in range(num_instances + 1)]
    assert sorted(g for queue in queues for g in queue) == list(range(num_groups))
    assert all(problem.allowed[g, i] for i in range(num_instances) for g in queues[i])
    assert plan.total == pytest.approx(evaluate(problem, plan.sequence, plan.length, np.zeros(num_instances + 1)))


@pytest.mark.parametrize("form", [MISS, LATENESS, CHANCE, POINT])
@pytest.mark.parametrize("seed", range(5))
def test_a_plan_is_valid_and_never_worse_than_its_start(form: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 25, 5)._replace(form=form)
    for heuristic in HEURISTICS:
        start = heuristic(problem)
        assert_valid(problem, start)
        result = search_plan(problem, start, np.random.default_rng(1), 200, 60.0)
        assert_valid(problem, result.plan)
        assert result.plan.total <= start.total
        assert result.iterations == 200
        assert not result.timed_out


def test_a_bad_start_is_improved_much() -> None:
    problem = random_problem(np.random.default_rng(3), 40, 8)
    start = Plan.empty(8, 40)
    start.sequence[8] = np.arange(40)
    start.length[8] = 40
    start.total = evaluate(problem, start.sequence, start.length, start.costs)
    found = search_plan(problem, start, np.random.default_rng(0), 1000, 60.0).plan.total
    assert found < 0.9 * start.total
    assert found < min(heuristic(problem).total for heuristic in HEURISTICS)


@pytest.mark.parametrize("num_groups", [1, 2, 30])
def test_equal_seeds_and_iterations_give_equal_plans_however_the_clock_runs(
    num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(np.random.default_rng(4), num_groups, 4)
    start = edf_plan(problem)
    first = search_plan(problem, start, np.random.default_rng(7), 300, 60.0).plan
    monkeypatch.setattr(sequencing, "CHUNK_S", 1e-6)
    second = search_plan(problem, start, np.random.default_rng(7), 300, 60.0).plan
    assert second.total == first.total
    for i in range(5):
        assert second.queue(i) == first.queue(i)


def test_other_seeds_search_elsewhere() -> None:
    problem = random_problem(np.random.default_rng(5), 40, 4)
    start = edf_plan(problem)
    totals = {search_plan(problem, start, np.random.default_rng(seed), 50, 60.0).plan.total for seed in range(5)}
    assert len(totals) > 1


@pytest.mark.parametrize("seed", range(4))
def test_what_is_remembered_is_what_the_queues_cost(seed: int) -> None:
    """Costs kept up to date and least additions remembered, against evaluating every place anew."""
    num_groups, num_instances = 14, 4
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, num_groups, num_instances)
    search = sequencing._make_search(problem, inserted_plan(problem), rng)
    compared = 0
    for iteration in range(60):
        # Hot enough that worse plans are accepted as well as refused.
        sequencing._iterate(problem, search, iteration, iteration + 1, 2.0, 0.0)
        queues = [search.sequence[i, : search.length[i]] for i in range(num_instances + 1)]
        costs = [cost_of_queue(problem, i, queues[i].copy()) for i in range(num_instances)]
        costs.append(sum(cost_of_holding(problem, g) for g in queues[num_instances]))
        np.testing.assert_allclose(search.costs, costs, rtol=1e-9, atol=1e-9)
        assert search.cost[sequencing.TOTAL] == pytest.approx(sum(costs))
        for i, queue in enumerate(queues):
            assert all(search.row[g] == i for g in queue)
        for g, i in np.argwhere(search.added_stamp == search.stamp[:num_instances]):
            places = [
                cost_of_queue(problem, i, np.insert(queues[i], place, g).astype(np.int32)) - costs[i]
                for place in range(len(queues[i]) + 1)
            ]
            assert search.added[g, i] == pytest.approx(min(places), abs=1e-9)
            assert places[search.position[g, i]] == pytest.approx(min(places), abs=1e-9)
            compared += 1
    assert compared > 500


def test_small_problems_are_solved_to_the_optimum() -> None:
    optimal = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, int(rng.integers(2, 6)), int(rng.integers(1, 4)))
        start = min((heuristic(problem) for heuristic in HEURISTICS), key=lambda plan: plan.total)
        found = search_plan(problem, start, rng, 2000, 60.0).plan.total
        best = best_by_brute_force(problem)
        assert found >= best - 1e-9
        optimal += found <= best + 1e-9
    assert optimal == 30


def test_larger_problems_beat_swap_aware_edf() -> None:
    for seed in range(5):
        problem = random_problem(np.random.default_rng(seed), 80, 12, num_models=5)
        start = min((heuristic(problem) for heuristic in HEURISTICS), key=lambda plan: plan.total)
        found = search_plan(problem, start, np.random.default_rng(0), 500, 60.0).plan.total
        assert found < 0.9 * batched_edf_plan(problem).total


def test_the_clock_stops_a_search() -> None:
    problem = random_problem(np.random.default_rng(1), 300, 40, num_models=6)
    start = edf_plan(problem)
    search_plan(problem, start, np.random.default_rng(0), 1, 60.0)
    for iterations in (None, 10**7):
        begin = time.perf_counter()
        result = search_plan(problem, start, np.random.default_rng(0), iterations, 0.2)
        assert time.perf_counter() - begin < 0.4
        assert result.timed_out == (iterations is not None)
        assert result.iterations > 10
        assert result.plan.total < start.total


def test_what_fits_nowhere_is_held_back() -> None:
    problem = random_problem(np.random.default_rng(2), 6, 2)
    problem.allowed[3] = False
    plan = search_plan(problem, edf_plan(problem), np.random.default_rng(0), 100, 60.0).plan
    assert 3 in plan.queue(2)
    assert_valid(problem, plan)
    problem.allowed[:] = False
    plan = search_plan(problem, edf_plan(problem), np.random.default_rng(0), 100, 60.0).plan
    assert sorted(plan.queue(2)) == list(range(6))


@pytest.mark.parametrize("form", [MISS, LATENESS, CHANCE, POINT])
def test_deadlines_at_zero_long_past_or_never_have_a_plan(form: int) -> None:
    problem = random_problem(np.random.default_rng(6), 8, 3)._replace(form=form)
    problem.first_slack_s[:4] = [0.0, np.inf, -1e9, 1e9]
    problem.last_slack_s[:4] = [0.0, np.inf, -1e9, 1e9]
    plan = search_plan(problem, edf_plan(problem), np.random.default_rng(0), 200, 60.0).plan
    assert_valid(problem, plan)
    assert np.isfinite(plan.total)


def test_no_group_is_an_empty_plan() -> None:
    problem = random_problem(np.random.default_rng(0), 0, 3)
    result = search_plan(problem, Plan.empty(3, 0), np.random.default_rng(0), 100, 60.0)
    assert result.plan.total == 0.0
    assert not result.timed_out
