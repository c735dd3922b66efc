"""What an assignment and order costs, by hand; and what becomes of a planning problem."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from planners.qlm.published.exhaustive import best_by_enumeration
from planners.qlm.published.slot_problem import (
    Goal,
    SlotProblem,
    completions,
    cost,
    latest_end_s,
    slot_problem,
)
from tests.planners.problems import random_problem
from tests.planners.qlm.published.slot_problems import random_slot_problem


def two_models() -> SlotProblem:
    """Three groups, of models 0, 1 and 1, on one instance that has model 0 loaded."""
    return SlotProblem(
        service_s=np.array([[10.0], [20.0], [5.0]]),
        service_std_s=np.array([[3.0], [4.0], [0.0]]),
        latency_s=np.array([[2.0], [1.0], [1.0]]),
        latency_std_s=np.array([[0.0], [12.0], [0.0]]),
        deadline_s=np.array([15.0, 40.0, 40.0]),
        weight=np.array([1.0, 2.0, 3.0]),
        model=np.array([0, 1, 1], np.int32),
        allowed=np.ones((3, 1), bool),
        release_s=np.array([1.0]),
        begin_s=np.array([[0.0, 7.0]]),
        swap_s=np.array([[[0.0, 6.0], [9.0, 0.0]]]),
    )


def test_service_swaps_and_variances_accumulate() -> None:
    slots = two_models()
    assert list(completions(slots, 0, [0, 1, 2])) == [(13.0, 3.0), (38.0, 13.0), (43.0, 5.0)]
    assert list(completions(slots, 0, [1, 0])) == [(29.0, math.sqrt(16 + 144)), (49.0, 5.0)]


def test_costs() -> None:
    slots = two_models()
    assert cost(slots, [[0, 2, 1]], Goal.PENALTY, 0.0) == math.inf  # 1 is done at 43, 3 too late
    assert cost(slots, [[0, 2, 1]], Goal.TARDINESS, 0.0) == pytest.approx(2 * 3.0 + 0.01 * (13 + 23 + 43))
    assert cost(slots, [[0, 2]], Goal.PENALTY, 0.0) == pytest.approx(13 - 15 + 23 - 40)
    # Two standard deviations: 0 at 19 is 4 too late, 2 at 29 is not.
    assert cost(slots, [[0, 2]], Goal.TARDINESS, 2.0) == pytest.approx(4.0 + 0.01 * (13 + 23))
    assert cost(slots, [[0, 2]], Goal.PENALTY, 2.0) == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_enumeration_agrees_with_a_plain_loop(seed: int) -> None:
    slots = random_slot_problem(np.random.default_rng(seed), 4, 2)
    for goal, quantile in itertools.product(Goal, (0.0, 1.2)):
        best = math.inf
        for order in itertools.permutations(range(4)):
            for where in itertools.product(range(2), repeat=4):
                if all(slots.allowed[g, where[g]] for g in range(4)):
                    best = min(
                        best, cost(slots, [[g for g in order if where[g] == i] for i in range(2)], goal, quantile)
                    )
        found = best_by_enumeration(slots, goal, quantile)
        assert (math.inf if found is None else found.cost) == pytest.approx(best)
        if found is not None:
            assert cost(slots, found.queues, goal, quantile) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_no_queue_takes_longer_than_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = random_slot_problem(rng, 6, 2)
    for i in range(2):
        groups = np.flatnonzero(slots.allowed[:, i])
        for _ in range(50):
            order = rng.permutation(groups).tolist()
            ends_s = [
                mean - slots.latency_s[g, i] for g, (mean, _) in zip(order, completions(slots, i, order), strict=True)
            ]
            assert (np.array(ends_s) <= latest_end_s(slots, i)[: len(order)] + 1e-9).all()


def test_a_planning_problem_in_slots() -> None:
    problem = random_problem(np.random.default_rng(3), 5, 2)
    problem.model[:] = [0, 2, 2, 0, 2]
    problem.start_model[:] = [2, -1]
    problem.first_slack_s[4] = 1e9
    slots = slot_problem(problem)
    assert slots.model.tolist() == [0, 1, 1, 0, 1]
    assert slots.service_s[1, 0] == pytest.approx(problem.requests[1] * problem.interval_s[1, 0])
    assert slots.service_std_s[1, 0] == pytest.approx(
        math.sqrt(problem.requests[1]) * problem.interval_s[1, 0] * problem.output_cv[1]
    )
    assert slots.begin_s[0, 0] == pytest.approx(problem.drain_s[0] + problem.unload_s[0, 2] + problem.load_s[0, 0])
    assert slots.begin_s[1, 1] == pytest.approx(problem.drain_s[1] + problem.load_s[1, 2])
    # The resident model waits for room in the batch only.
    those = problem.allowed[:, 0] & (problem.model == 2)
    beyond = max(0.0, problem.present[0] + 1 - problem.batch[those, 0].mean())
    assert slots.begin_s[0, 1] == pytest.approx(beyond * problem.interval_s[those, 0].mean())
    # What is due in thirty years does not bind, and does not spoil the numbers either.
    assert slots.deadline_s[4] < 1e5
    assert slots.deadline_s[:4] == pytest.approx(problem.first_slack_s[:4])
    worst_s = max(mean + 5 * std for i in range(2) for mean, std in completions(slots, i, [0, 1, 2, 3, 4]))
    assert slots.deadline_s[4] >= worst_s
