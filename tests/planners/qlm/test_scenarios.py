"""Scenarios: the average over them is that of their problems one by one, and the search lowers it."""

from __future__ import annotations

import numpy as np
import pytest

from planners.qlm.construct import evaluate
from planners.qlm.heuristics import edf_plan
from planners.qlm.plan import Plan
from planners.qlm.problem import MISS, Problem
from planners.qlm.scenarios import mean_cost, sample_scenarios, search_scenarios
from planners.qlm.synthetic import random_problem

PER_GROUP = (
    "requests", "weight", "first_slack_s", "last_slack_s", "model", "output_cv", "allowed", "interval_s", "batch",
    "latency_s", "latency_growth_s", "delay_cost", "crowding_cost",
)  # fmt: skip


def alone(scenarios: Problem, s: int, num_groups: int) -> Problem:
    """One scenario as a problem by itself."""
    rows = slice(s * num_groups, (s + 1) * num_groups)
    return scenarios._replace(**{name: np.ascontiguousarray(getattr(scenarios, name)[rows]) for name in PER_GROUP})


def cost_in(problem: Problem, plan: Plan) -> float:
    return float(evaluate(problem, plan.sequence, plan.length, np.empty(len(plan.length))))


@pytest.fixture
def problem() -> Problem:
    return random_problem(np.random.default_rng(5), 12, 3, 3, 1.5)


def test_the_mean_cost_is_the_average_of_the_scenarios_one_by_one(problem: Problem) -> None:
    scenarios = sample_scenarios(problem, 7, np.random.default_rng(1))
    plan = edf_plan(problem)
    apart = [cost_in(alone(scenarios, s, 12), plan) for s in range(7)]
    assert len(set(apart)) > 1
    assert mean_cost(scenarios, plan) == pytest.approx(np.mean(apart))
    assert mean_cost(problem, plan) == pytest.approx(plan.total)


def test_scenarios_have_the_means_and_deviations_of_the_problem(problem: Problem) -> None:
    count = 4000
    scenarios = sample_scenarios(problem, count, np.random.default_rng(2))
    interval = scenarios.interval_s.reshape(count, 12, 3)[:, :, 0] / problem.interval_s[:, 0]
    latency = scenarios.latency_s.reshape(count, 12, 3)[:, :, 0] / problem.latency_s[:, 0]
    assert interval.mean(axis=0) == pytest.approx(1.0, abs=0.05)
    assert latency.mean(axis=0) == pytest.approx(1.0, abs=0.1)
    own = problem.output_cv**2 / problem.requests
    assert interval.std(axis=0) == pytest.approx(np.sqrt(own + 0.15**2 * (1.0 + own)), rel=0.1)
    cv2 = problem.output_cv**2
    assert latency.std(axis=0) == pytest.approx(np.sqrt(cv2 + 0.15**2 * (1.0 + cv2)), rel=0.1)
    # Groups of one model share the error of the estimate.
    same = np.flatnonzero(problem.model == problem.model[0])[:2]
    assert np.corrcoef(interval[:, same].T)[0, 1] > 0.2


def test_the_search_lowers_the_average_it_is_given_and_keeps_every_group(problem: Problem) -> None:
    scenarios = sample_scenarios(problem, 8, np.random.default_rng(3))
    start = edf_plan(problem)
    for searched in (scenarios, problem._replace(form=MISS)):
        plan = search_scenarios(searched, start, np.random.default_rng(0), 0.5)
        assert plan.total == pytest.approx(mean_cost(searched, plan))
        assert plan.total < mean_cost(searched, start)
        queues = [plan.queue(i) for i in range(len(plan.length))]
        assert sorted(g for queue in queues for g in queue) == list(range(12))
        assert all(problem.allowed[g, i] for i, queue in enumerate(queues[:-1]) for g in queue)
