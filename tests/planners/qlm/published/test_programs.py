"""Both published programs on SCIP against enumeration and against HiGHS on another form of the same problem.

The suite takes the first 60 problems; ``QLM_PUBLISHED_PROBLEMS=500 pytest tests/planners/qlm/published`` takes 500.
"""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest

from planners.qlm.published.chance_program import normal_quantile, solve_chance_program
from planners.qlm.published.exhaustive import best_by_enumeration
from planners.qlm.published.planner import Program
from planners.qlm.published.slot_model import Limits
from planners.qlm.published.slot_problem import Goal, cost
from planners.qlm.published.slot_program import solve_slot_program
from tests.planners.qlm.published.slot_problems import random_slot_problem
from tests.planners.qlm.published.successor_program import best_by_successors

PROBLEMS = int(os.environ.get("QLM_PUBLISHED_PROBLEMS", "60"))
LARGEST = (7, 3) if PROBLEMS > 60 else (5, 3)
UNLIMITED = Limits(nodes=1_000_000, time_s=600.0)
CONFIDENCE = 0.9
PROGRAMS: dict[str, tuple[Program, float]] = {
    "v2": (solve_slot_program, 0.0),
    "v1": (partial(solve_chance_program, confidence=CONFIDENCE), normal_quantile(CONFIDENCE)),
}


@pytest.mark.parametrize("goal", Goal)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_programs_equal_enumeration(seed: int, name: str, goal: Goal) -> None:
    rng = np.random.default_rng(seed)
    slots = random_slot_problem(rng, int(rng.integers(1, LARGEST[0] + 1)), int(rng.integers(1, LARGEST[1] + 1)))
    program, quantile = PROGRAMS[name]
    best = best_by_enumeration(slots, goal, quantile)
    solution = program(slots, goal, UNLIMITED)
    if best is None:
        assert solution.status == "infeasible"
        assert solution.queues is None
        return
    assert solution.status == "optimal"
    assert solution.queues is not None
    assert sorted(g for queue in solution.queues for g in queue) == list(range(len(slots.weight)))
    assert solution.cost == pytest.approx(cost(slots, solution.queues, goal, quantile))
    assert solution.cost == pytest.approx(best.cost, abs=1e-2, rel=1e-4)
    assert solution.bound == pytest.approx(best.cost, abs=1e-2, rel=1e-4)


def test_the_random_problems_are_of_every_kind() -> None:
    feasible = dict.fromkeys(PROGRAMS, 0)
    late = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        slots = random_slot_problem(rng, int(rng.integers(1, 6)), int(rng.integers(1, 4)))
        for name, (_, quantile) in PROGRAMS.items():
            feasible[name] += best_by_enumeration(slots, Goal.PENALTY, quantile) is not None
        best = best_by_enumeration(slots, Goal.TARDINESS, 0.0)
        late += best is not None and cost(slots, best.queues, Goal.PENALTY, 0.0) == np.inf
    assert 15 <= feasible["v1"] < feasible["v2"] <= 45
    assert late >= 15


@pytest.mark.parametrize("goal", Goal)
@pytest.mark.parametrize("seed", range(12))
def test_slot_program_equals_highs_on_successors(seed: int, goal: Goal) -> None:
    rng = np.random.default_rng([7, seed])
    slots = random_slot_problem(rng, 4, 2)
    expected = best_by_successors(slots, goal)
    solution = solve_slot_program(slots, goal, UNLIMITED)
    if expected is None:
        assert solution.status == "infeasible"
    else:
        assert solution.cost == pytest.approx(expected, abs=1e-2, rel=1e-4)


def test_without_spread_or_at_even_chances_the_programs_are_the_same() -> None:
    for seed in range(10):
        slots = random_slot_problem(np.random.default_rng(seed), 4, 2)
        certain = slots._replace(service_std_s=0 * slots.service_std_s, latency_std_s=0 * slots.latency_std_s)
        for goal in Goal:
            sure = solve_chance_program(certain, goal, UNLIMITED, CONFIDENCE)
            even = solve_chance_program(slots, goal, UNLIMITED, 0.5)
            plain = solve_slot_program(slots, goal, UNLIMITED)
            for other in (sure, even):
                assert other.status == plain.status
                assert other.cost == (None if plain.cost is None else pytest.approx(plain.cost, abs=1e-2))


def test_chances_are_kept_in_samples() -> None:
    rng = np.random.default_rng(0)
    checked = 0
    for seed in range(20):
        slots = random_slot_problem(np.random.default_rng(seed), 4, 2)
        solution = solve_chance_program(slots, Goal.PENALTY, UNLIMITED, CONFIDENCE)
        for i, queue in enumerate(solution.queues or []):
            models = slots.model[list(queue)]
            swap = np.concatenate([slots.begin_s[i, models[:1]], slots.swap_s[i, models[:-1], models[1:]]])
            service = rng.normal(slots.service_s[queue, i], slots.service_std_s[queue, i], (20_000, len(queue)))
            latency = rng.normal(slots.latency_s[queue, i], slots.latency_std_s[queue, i], (20_000, len(queue)))
            done = slots.release_s[i] + np.cumsum(swap + service, axis=1) + latency
            assert ((done <= slots.deadline_s[queue]).mean(axis=0) >= CONFIDENCE - 0.01).all()
            checked += len(queue)
    assert checked > 20


def test_limits_hold_and_are_reported() -> None:
    slots = random_slot_problem(np.random.default_rng(1), 14, 3)
    stopped = solve_slot_program(slots, Goal.TARDINESS, Limits(nodes=1, time_s=60.0))
    assert stopped.status == "limit"
    assert stopped.bound is None or stopped.cost is None or stopped.bound <= stopped.cost + 1e-6
    again = solve_slot_program(slots, Goal.TARDINESS, Limits(nodes=1, time_s=60.0))
    assert (again.queues, again.cost, again.bound) == (stopped.queues, stopped.cost, stopped.bound)
    hurried = solve_chance_program(slots, Goal.TARDINESS, Limits(nodes=10**9, time_s=0.5), CONFIDENCE)
    assert hurried.status == "limit"
    assert hurried.time_s < 2.0
    assert solve_slot_program(slots, Goal.TARDINESS, Limits(nodes=1, time_s=0.0)).status == "limit"


def test_a_group_that_fits_nowhere_makes_it_infeasible() -> None:
    slots = random_slot_problem(np.random.default_rng(1), 3, 2)
    slots.allowed[1] = False
    for goal in Goal:
        assert solve_slot_program(slots, goal, UNLIMITED).status == "infeasible"
        assert best_by_enumeration(slots, goal, 0.0) is None
