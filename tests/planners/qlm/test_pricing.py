"""Pricing never overestimates: relaxed costs, tables and merged labels are at most the true costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from planners.qlm.cost import cost_of_holding, cost_of_queue
from planners.qlm.cost_tables import Tables, largest_prices, make_tables, relaxed_cost
from planners.qlm.pricing import chain_of, make_workspace, price
from planners.qlm.problem import CHANCE, LATENESS, MISS, POINT, Float, Problem
from planners.qlm.synthetic import random_problem
from tests.planners import problems

FORMS = (MISS, LATENESS, CHANCE, POINT)


def a_problem(seed: int, num_groups: int, form: int) -> Problem:
    """Of realistic magnitudes, or of arbitrary ones."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        problem = random_problem(rng, num_groups, 3, 3, load=rng.uniform(0.3, 3.0), form=form)
    else:
        problem = problems.random_problem(rng, num_groups, 3)._replace(form=form)
    return problem


def relaxed(problem: Problem, tables: Tables, i: int, queue: list[int]) -> float:
    return float(relaxed_cost(problem, tables, i, np.array(queue, np.int32), np.empty(len(queue))))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(20))
def test_relaxed_costs_are_at_most_the_true_ones(seed: int, form: int) -> None:
    problem = a_problem(seed, 8, form)
    tables = make_tables(problem, 64)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        i = int(rng.integers(3))
        queue = rng.permutation(8)[: rng.integers(1, 9)].tolist()
        cost = cost_of_queue(problem, i, np.array(queue, np.int32))
        assert relaxed(problem, tables, i, queue) <= cost * (1 + 1e-9)


def test_relaxed_costs_are_close_to_the_true_ones() -> None:
    ratios = []
    for seed in range(1, 40, 2):
        problem = a_problem(seed, 8, MISS)
        tables = make_tables(problem, 512)
        queue = np.random.default_rng(seed).permutation(8)[:5].tolist()
        ratios.append(relaxed(problem, tables, 0, queue) / cost_of_queue(problem, 0, np.array(queue, np.int32)))
    assert np.median(ratios) > 0.9


def some_prices(problem: Problem, tables: Tables, rng: np.random.Generator) -> Float:
    hold = np.array([cost_of_holding(problem, g) for g in range(len(problem.requests))])
    return np.minimum(hold * rng.uniform(0.0, 1.2, len(hold)), largest_prices(problem, tables))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [*range(12), 39, 59])  # in the last two, one more group lets a run drain earlier
def test_no_queue_has_a_lower_reduced_cost(seed: int, form: int) -> None:
    problem = a_problem(seed, 5, form)
    tables = make_tables(problem, 100)
    # Coarse axes merge many labels, fine ones few.
    work = make_workspace(problem, 8 + 8 * (seed % 4), 2 + 6 * (seed % 3), 1 + seed % 5)
    rng = np.random.default_rng(seed)
    for i in range(3):
        groups = [g for g in range(5) if problem.allowed[g, i]]
        queues = [list(q) for size in range(len(groups) + 1) for q in itertools.permutations(groups, size)]
        costs = [cost_of_queue(problem, i, np.array(queue, np.int32)) for queue in queues]
        for _ in range(5):
            prices = some_prices(problem, tables, rng)
            least = min(cost - prices[queue].sum() for queue, cost in zip(queues, costs, strict=True))
            for goal in (0.0, 0.5 * least, 0.999 * least):
                assert price(problem, tables, work, i, prices, goal) <= least + 1e-9 * max(costs)


def test_chains_are_queues_of_the_cost_found() -> None:
    looseness = []
    for seed in range(10):
        problem = a_problem(seed, 8, MISS)
        tables = make_tables(problem, 256)
        work = make_workspace(problem, 64, 32, 16)
        prices = some_prices(problem, tables, np.random.default_rng(seed))
        for i in range(3):
            price(problem, tables, work, i, prices, 0.0)
            for g in np.flatnonzero(work.last_cost < 0.0):
                chain = chain_of(work, int(g))
                assert chain is not None
                assert chain[-1] == g
                assert all(problem.allowed[h, i] for h in chain)
                if len(set(chain)) == len(chain):
                    reduced = cost_of_queue(problem, i, np.array(chain, np.int32)) - prices[chain].sum()
                    assert work.last_cost[g] <= reduced + 1e-9
                    looseness.append((reduced - work.last_cost[g]) / prices[chain].sum())
    assert len(looseness) > 20
    assert np.median(looseness) < 0.1


def test_an_instance_that_may_take_nothing_costs_nothing() -> None:
    problem = a_problem(1, 5, MISS)
    problem.allowed[:, 0] = False
    tables = make_tables(problem, 64)
    work = make_workspace(problem, 16, 8, 2)
    assert price(problem, tables, work, 0, largest_prices(problem, tables) * 0.9, 0.0) == 0.0
