"""The compiled exhaustive search against a plain one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from planners.qlm.brute_force import MOST_GROUPS, cheapest_plan, every_column
from planners.qlm.construct import evaluate
from planners.qlm.cost import cost_of_holding, cost_of_queue
from planners.qlm.problem import Problem
from planners.qlm.synthetic import random_problem
from qlm_env.spec import ConfigError


def plain_optimum(problem: Problem) -> float:
    """Each group to each instance or to none, each instance's groups in each order."""
    num_groups, num_instances = problem.allowed.shape
    best = math.inf
    for assignment in itertools.product(range(num_instances + 1), repeat=num_groups):
        if any(i < num_instances and not problem.allowed[g, i] for g, i in enumerate(assignment)):
            continue
        total = sum(cost_of_holding(problem, g) for g, i in enumerate(assignment) if i == num_instances)
        for i in range(num_instances):
            own = [g for g, a in enumerate(assignment) if a == i]
            orders = itertools.permutations(own)
            total += min(cost_of_queue(problem, i, np.array(order, np.int32)) for order in orders)
        best = min(best, total)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_that_of_a_plain_search(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), 4, 1 + seed % 3, 2, load=1.5)
    plan = cheapest_plan(problem)
    assert plan.total == pytest.approx(plain_optimum(problem), rel=1e-12)
    rows = len(plan.length)
    assert sorted(g for i in range(rows) for g in plan.queue(i)) == list(range(4))
    assert all(problem.allowed[g, i] for i in range(rows - 1) for g in plan.queue(i))
    assert evaluate(problem, plan.sequence, plan.length, plan.costs.copy()) == plan.total


def test_every_set_of_groups_has_a_column_where_it_may_run() -> None:
    problem = random_problem(np.random.default_rng(3), 5, 2, 2)
    columns = every_column(problem)
    keys = {(column.instance, frozenset(column.groups)) for column in columns}
    assert len(keys) == len(columns)
    for i in range(2):
        allowed = int(problem.allowed[:, i].sum())
        assert sum(column.instance == i for column in columns) == 2**allowed - 1
    for column in columns:
        if column.instance is not None:
            assert column.cost == cost_of_queue(problem, column.instance, np.array(column.groups, np.int32))


def test_too_many_groups_are_refused() -> None:
    problem = random_problem(np.random.default_rng(0), MOST_GROUPS + 1, 1, 1)
    with pytest.raises(ConfigError, match=r"at most 9 groups \(got 10\)"):
        cheapest_plan(problem)
