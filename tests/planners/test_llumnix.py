"""Llumnix-style balancing: freeness, dispatch to the freest, migration of what waits."""

from __future__ import annotations

import pytest

from planners.llumnix import LlumnixPlanner, freeness_steps
from qlm_env.lso import Balance, SwapModel
from tests.planners.crafted import PATIENT, advance_to, begin, crafted_env, requests_of, serve


def test_freeness_is_free_memory_per_request_of_the_batch() -> None:
    env = crafted_env()
    begin(env, LlumnixPlanner(), requests_of(*[(0.0, 0, PATIENT, 500)] * 4))
    instance, group = env.view.instances[0], env.view.groups[0]
    tokens = int(instance.placement(0)["num_blocks"]) * 16
    assert freeness_steps(env.view, instance, 0, []) == tokens
    assert freeness_steps(env.view, instance, 0, [group.id]) == pytest.approx((tokens - 400) / 4)
    env.step_plan([Balance(group.id, 0)])
    env.step_plan([])
    assert instance.num_running == 4
    assert freeness_steps(env.view, instance, 0, []) == pytest.approx((tokens - 16 * instance.used_blocks) / 4)


def test_new_groups_go_to_the_freest_instance() -> None:
    env = crafted_env(count=2)
    begin(env, planner := LlumnixPlanner(), requests_of((0.0, 0, PATIENT, 900), (3.0, 0, PATIENT, 900)))
    advance_to(env, planner, 6.0)
    assert [instance.num_running for instance in env.view.instances] == [1, 1]


def test_what_waits_moves_when_memory_is_free_elsewhere() -> None:
    """Two groups wait at one instance of which the other is empty: one of them moves."""
    env = crafted_env(count=2)
    begin(env, LlumnixPlanner(), requests_of(*[(0.0, 0, PATIENT, 1500)] * 40))
    groups = [group.id for group in env.view.groups]
    assert len(groups) == 3
    env.step_plan([Balance(g, 0) for g in groups])
    assert any(isinstance(lso, Balance) and lso.instance == 1 for lso in LlumnixPlanner().act(env.view))


def test_balancing_finishes_a_backlog_sooner_than_one_instance() -> None:
    backlog = requests_of(*[(0.0, 0, PATIENT, 200)] * 64)
    one = serve(crafted_env(count=1), LlumnixPlanner(), backlog)
    two = serve(crafted_env(count=2), LlumnixPlanner(), backlog)
    assert two["emulated_s"] < 0.65 * one["emulated_s"]


def test_a_model_without_an_instance_gets_one_that_has_nothing_to_do() -> None:
    env = crafted_env(["llama-2-7b", "llama-2-13b"], count=2)
    begin(env, planner := LlumnixPlanner(), requests_of((0.0, 0, PATIENT, 900), (1.0, 1, PATIENT, 100)))
    advance_to(env, planner, 1.0)
    assert SwapModel(1, 1) in planner.act(env.view)
