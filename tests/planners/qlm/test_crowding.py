"""What joining a batch costs those in it, against sampled lengths, and how plans are charged for it."""

from __future__ import annotations

import numpy as np
import pytest

from planners.dispatch import EarliestCompletion, ListPlanner, by_arrival
from planners.qlm.cost import cost_of_queue
from planners.qlm.crowding import crowding, crowding_cost, miss_probability
from qlm_env.env import QLMEnv
from tests.planners.crafted import PATIENT, URGENT, advance_to, begin, crafted_env, requests_of
from tests.planners.problems import random_problem


def fcfs() -> ListPlanner:
    return ListPlanner(by_arrival, EarliestCompletion(), steal=False)


def served(rows: list[tuple[float, int, int, int]], until_s: float, count: int = 1) -> QLMEnv:
    """A cluster that has served ``rows`` in order of arrival for a while."""
    env, planner = crafted_env(count=count), fcfs()
    begin(env, planner, requests_of(*rows))
    advance_to(env, planner, until_s)
    return env


@pytest.mark.parametrize("shape", [1.0, 1.6])
def test_misses_of_a_running_request_are_those_of_sampled_lengths(shape: float) -> None:
    lengths = 300.0 * np.random.default_rng(0).weibull(shape, 1_000_000)
    mean, cv = lengths.mean(), lengths.std() / lengths.mean()
    generated, slack_s, step_s = 120.0, 9.0, 0.03
    of_running = lengths[lengths > generated]
    expected = (of_running > generated + slack_s / step_s).mean()
    one = np.ones(1)
    told = miss_probability(generated * one, slack_s * one, step_s, mean * one, cv * one)
    assert told[0] == pytest.approx(expected, rel=0.03)


def test_nothing_can_be_crowded_where_nothing_runs_or_nothing_fits() -> None:
    full = served([(0.0, 0, URGENT, 400)] * 16 + [(1e3, 0, URGENT, 10)], 2.0)
    assert full.view.instances[0].num_running == 16
    assert crowding(full.view, full.view.instances[0]) == 0.0
    idle = served([(1e3, 0, URGENT, 10)], 2.0)
    assert crowding(idle.view, idle.view.instances[0]) == 0.0


def test_urgent_requests_are_crowded_and_patient_ones_are_not() -> None:
    def of(slo_class: int) -> float:
        env = served([(0.0, 0, slo_class, 1000)] * 8 + [(1e3, 0, slo_class, 10)], 12.0)
        assert env.view.instances[0].num_running == 8
        return crowding(env.view, env.view.instances[0])

    assert of(URGENT) > 1e-3
    assert of(PATIENT) < 0.1 * of(URGENT)


def test_a_group_pays_what_its_batch_exceeds_the_mean_by() -> None:
    env = served([(0.0, 0, URGENT, 1000)] * 8 + [(12.0, 0, URGENT, 10), (12.0, 0, PATIENT, 10)], 12.0, count=2)
    view = env.view
    groups = sorted(view.groups, key=lambda group: group.slo_class)
    assert [group.slo_class for group in groups] == [URGENT, PATIENT]
    now = np.array([crowding(view, instance) for instance in view.instances])
    assert now.max() > 0.0
    # The load is expected to last for a tenth of the patient class's 600 s; 1.1 requests press for 22 places.
    urgent, patient = crowding_cost(view, groups, np.array([8.0, 14.0]))
    assert urgent == pytest.approx(0.95 * np.maximum(0.0, now - now.mean()))
    assert patient == pytest.approx(0.95 * np.maximum(0.0, now - 0.1 * now.mean()))
    assert not crowding_cost(view, groups, np.array([1.0, 0.0])).any()


def test_only_requests_that_find_a_place_in_the_running_batch_pay() -> None:
    problem = random_problem(np.random.default_rng(1), 2, 1, num_models=1)
    problem.requests[:] = [10.0, 30.0]
    problem.batch[:], problem.present[:], problem.start_model[:] = 40.0, 20.0, 0
    queue = np.array([0, 1], np.int32)
    free = problem._replace(crowding_cost=np.zeros((2, 1)))
    charged = problem._replace(crowding_cost=np.array([[0.5], [0.25]]))
    assert cost_of_queue(charged, 0, queue) - cost_of_queue(free, 0, queue) == pytest.approx(10 * 0.5 + 10 * 0.25)
    for other in (free, charged):
        other.start_model[:] = -1
    assert cost_of_queue(charged, 0, queue) == cost_of_queue(free, 0, queue)


def test_a_batch_as_arrays_is_the_batch_request_by_request() -> None:
    env = served([(0.1 * k, 0, k % 2, 50 + 40 * k) for k in range(30)], 4.0)
    instance = env.view.instances[0]
    batch, running = instance.batch(), list(instance.running())
    assert len(running) > 5
    assert batch.slo_class.tolist() == [request.slo_class for request in running]
    assert batch.prompt_tokens.tolist() == [request.prompt_tokens for request in running]
    assert batch.generated_tokens.tolist() == [request.generated_tokens for request in running]
    assert batch.deadline_s.tolist() == pytest.approx([request.deadline_s for request in running])


def test_nothing_is_charged_while_a_group_waits_for_a_swap() -> None:
    rows = [(0.0, 0, URGENT, 1000)] * 8 + [(12.0, 0, PATIENT, 10), (12.0, 1, PATIENT, 10)]
    env, planner = crafted_env(("llama-2-7b", "llama-2-7b")), fcfs()
    begin(env, planner, requests_of(*rows))
    advance_to(env, planner, 11.0)
    while len(env.view.groups) < 2:
        env.step_plan([])
    groups, room = env.view.groups, np.array([50.0])
    here = [group for group in groups if group.model == 0]
    assert crowding_cost(env.view, here, room).any()
    assert not crowding_cost(env.view, groups, room).any()
