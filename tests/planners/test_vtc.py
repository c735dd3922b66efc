"""VTC: who has been served least goes next, and a pause saves up no claims."""

from __future__ import annotations

import pytest

from planners import make_planner
from planners.spec import FcfsSpec, VtcSpec, parse_planner
from planners.vtc import VtcPlanner
from qlm_env.requests import FINISHED
from qlm_env.spec import ConfigError
from tests.planners.crafted import PATIENT, URGENT, advance_to, begin, crafted_env, requests_of, serve


def test_a_client_that_asks_little_is_not_held_up_by_one_that_asks_much() -> None:
    """Far more patient requests than can be served, and a few of the other client."""
    env = crafted_env(max_num_seqs=8)
    flood = [(0.05 * k, 0, PATIENT, 200) for k in range(200)]
    few = [(5.0 + 2.0 * k, 0, URGENT, 200) for k in range(8)]
    fcfs = serve(env, make_planner(FcfsSpec()), requests_of(*flood, *few))
    vtc = serve(env, VtcPlanner(VtcSpec()), requests_of(*flood, *few))
    assert fcfs["slo_attainment_per_class"]["urgent"] < 0.3
    assert vtc["slo_attainment_per_class"]["urgent"] > 0.9


def test_clients_that_always_wait_get_the_same_service() -> None:
    """One asks in requests three times as long; service differs by no more than two batches of those."""
    env = crafted_env(max_num_seqs=8)
    planner = VtcPlanner(VtcSpec())
    begin(env, planner, requests_of(*[(0.0, 0, PATIENT, 300)] * 120, *[(0.0, 0, URGENT, 100)] * 120))
    table = env.view._world.requests
    batch_service = 8 * (100 + 2 * 300)
    service = [0.0, 0.0]
    while True:
        env.step_plan(planner.act(env.view))
        if {group.slo_class for group in env.view.groups} != {URGENT, PATIENT}:
            break
        for c in (URGENT, PATIENT):
            finished = table["generated_tokens"][(table["slo_class"] == c) & (table["state"] == FINISHED)]
            service[c] = 100.0 * len(finished) + 2.0 * finished.sum()
        assert abs(service[URGENT] - service[PATIENT]) <= 2 * batch_service
    # Served in proportion to its requests, one would have got more than twice as much as the other.
    assert min(service) > 20_000


def test_counters_count_finished_tokens_exactly() -> None:
    env = crafted_env()
    planner = VtcPlanner(VtcSpec(prompt_weight=1.0, output_weight=3.0))
    begin(env, planner, requests_of((0.0, 0, URGENT, 40), (0.0, 0, URGENT, 60), (30.0, 0, PATIENT, 10)))
    advance_to(env, planner, 30.0)
    planner.act(env.view)
    assert planner._counters[0, URGENT] == pytest.approx(2 * 100 + 3 * 100)


def test_a_client_that_comes_back_is_lifted_to_the_least_that_waits() -> None:
    env = crafted_env(max_num_seqs=4)
    early, busy = [(0.0, 0, URGENT, 20)], [(0.5, 0, PATIENT, 200)] * 60
    planner = VtcPlanner(VtcSpec())
    begin(env, planner, requests_of(*early, *busy, (40.0, 0, URGENT, 20)))
    advance_to(env, planner, 40.0)
    planner.act(env.view)
    counters = planner._counters
    assert counters[0, URGENT] == pytest.approx(counters[0, PATIENT])
    assert counters[0, URGENT] > 1000


def test_weights_are_positive() -> None:
    with pytest.raises(ConfigError, match=r"planner.vtc.output_weight"):
        parse_planner("vtc", {"output_weight": 0})


def test_an_instance_does_not_change_model_for_a_little_unfairness() -> None:
    env = crafted_env(["llama-2-7b", "llama-2-13b"])
    alternating = [(0.3 * k, k // 3 % 2, PATIENT, 150) for k in range(240)]
    vtc = serve(env, VtcPlanner(VtcSpec()), requests_of(*alternating))
    fcfs = serve(env, make_planner(FcfsSpec()), requests_of(*alternating))
    assert 0 < vtc["swaps"] < fcfs["swaps"]
