"""Least laxity counts a group's own service against its deadline."""

from __future__ import annotations

import pytest

from planners import make_planner
from planners.least_laxity import by_laxity
from planners.rwt import group_service
from planners.spec import EdfSpec, LeastLaxitySpec
from tests.planners.crafted import PATIENT, URGENT, begin, crafted_env, requests_of


def test_of_equal_deadlines_the_slower_model_goes_first() -> None:
    env = crafted_env(["llama-2-7b", "llama-2-13b"])
    planner = make_planner(LeastLaxitySpec())
    begin(env, planner, requests_of((0.0, 0, URGENT, 100), (0.0, 1, URGENT, 100)))
    fast, slow = env.view.groups
    assert (fast.model, slow.model) == (0, 1)
    assert by_laxity(env.view, slow) < by_laxity(env.view, fast) < fast.deadline_s
    service, full = group_service(env.view, env.view.instances[0], slow, 1e9)
    assert by_laxity(env.view, slow) == pytest.approx(20.0 - service.latency_s)
    assert full <= 16
    env.step_plan(planner.act(env.view))
    assert env.view.instances[0].coming_model == 1
    begin(env, make_planner(EdfSpec()), requests_of((0.0, 0, URGENT, 100), (0.0, 1, URGENT, 100)))
    env.step_plan(make_planner(EdfSpec()).act(env.view))
    assert env.view.instances[0].coming_model is None


def test_a_far_deadline_is_still_far() -> None:
    env = crafted_env(["llama-2-7b", "llama-2-13b"])
    begin(env, make_planner(LeastLaxitySpec()), requests_of((0.0, 0, URGENT, 100), (0.0, 1, PATIENT, 100)))
    urgent, patient = env.view.groups
    assert by_laxity(env.view, urgent) < by_laxity(env.view, patient)
