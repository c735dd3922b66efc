"""Swap-aware EDF keeps to a model until a swap pays."""

from __future__ import annotations

import pytest

from planners import make_planner
from planners.spec import EdfSpec, SwapAwareEdfSpec
from planners.swap_aware_edf import share_in_time
from qlm_env.lso import SwapModel
from tests.planners.crafted import PATIENT, URGENT, begin, crafted_env, requests_of, serve

TWO = ("llama-2-7b", "llama-2-13b")


def test_it_swaps_less_than_edf_and_misses_no_more() -> None:
    env = crafted_env(TWO)
    alternating = [(0.4 * k, k // 4 % 2, PATIENT, 300) for k in range(160)]
    edf = serve(env, make_planner(EdfSpec()), requests_of(*alternating))
    aware = serve(env, make_planner(SwapAwareEdfSpec()), requests_of(*alternating))
    assert aware["swaps"] < edf["swaps"] / 2
    assert aware["slo_attainment"] >= edf["slo_attainment"]


def test_urgent_work_of_another_model_is_worth_a_swap_if_the_rest_can_wait() -> None:
    env = crafted_env(TWO)
    planner = make_planner(SwapAwareEdfSpec())
    begin(env, planner, requests_of(*[(0.0, 0, PATIENT, 300)] * 160, *[(0.0, 1, URGENT, 50)] * 12))
    assert SwapModel(0, 1) in planner.act(env.view)


def test_a_few_requests_are_not_worth_many() -> None:
    env = crafted_env(TWO)
    planner = make_planner(SwapAwareEdfSpec())
    # Its deadline is the earlier one, so EDF would swap.
    begin(env, planner, requests_of(*[(0.1, 0, URGENT, 300)] * 48, (0.0, 1, URGENT, 50)))
    env.step_plan([])
    assert SwapModel(0, 1) in make_planner(EdfSpec()).act(env.view)
    assert not any(isinstance(lso, SwapModel) for lso in planner.act(env.view))


@pytest.mark.parametrize(
    ("first_s", "last_s", "share"),
    [(1.0, 2.0, 1.0), (-1.0, -2.0, 0.0), (3.0, -1.0, 0.75), (-1.0, 1.0, 0.5), (0.0, 0.0, 1.0)],
)
def test_the_share_in_time_is_where_the_slack_is_positive(first_s: float, last_s: float, share: float) -> None:
    assert share_in_time(first_s, last_s) == pytest.approx(share)
