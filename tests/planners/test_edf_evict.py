"""EDF with eviction preempts where that decides about a miss, and only less urgent work."""

from __future__ import annotations

from planners import make_planner
from planners.spec import EdfEvictSpec, EdfSpec
from qlm_env.lso import Balance
from tests.planners.crafted import PATIENT, URGENT, begin, crafted_env, requests_of, serve

LONG_BATCH = [(0.0, 0, PATIENT, 3000)] * 4


def test_an_urgent_request_is_saved_and_the_batch_resumes_from_its_cache() -> None:
    env = crafted_env(max_num_seqs=4)
    requests = requests_of(*LONG_BATCH, (5.0, 0, URGENT, 100))
    waits = serve(env, make_planner(EdfSpec()), requests)
    assert waits["slo_attainment_per_class"]["urgent"] == 0.0
    evicts = serve(env, make_planner(EdfEvictSpec()), requests)
    assert evicts["slo_attainment"] == 1.0
    assert evicts["evictions"] == 4
    assert evicts["recomputed_tokens"] == 0


def test_a_swap_need_not_wait_for_a_batch_that_has_time() -> None:
    env = crafted_env(["llama-2-7b", "llama-2-13b"])
    requests = requests_of(*LONG_BATCH, (5.0, 1, URGENT, 100))
    assert serve(env, make_planner(EdfSpec()), requests)["slo_attainment_per_class"]["urgent"] == 0.0
    assert serve(env, make_planner(EdfEvictSpec()), requests)["slo_attainment"] == 1.0


def test_work_with_earlier_deadlines_is_left_alone() -> None:
    """The running requests are late already, which does not make them less urgent."""
    env = crafted_env(max_num_seqs=4)
    requests = requests_of(*[(0.0, 0, URGENT, 3000)] * 4, (5.0, 0, URGENT, 100))
    assert serve(env, make_planner(EdfEvictSpec()), requests)["evictions"] == 0


def test_nothing_is_evicted_where_there_is_room() -> None:
    env = crafted_env(max_num_seqs=8)
    planner = make_planner(EdfEvictSpec())
    begin(env, planner, requests_of(*LONG_BATCH, (5.0, 0, URGENT, 100)))
    env.step_plan([Balance(0, 0)])
    while env.now_s < 20.5:
        env.step_plan([])
    assert planner.act(env.view) == [Balance(1, 0)]


def test_what_is_lost_anyway_evicts_nothing() -> None:
    env = crafted_env(max_num_seqs=4)
    requests = requests_of(*LONG_BATCH, *[(5.0, 0, PATIENT, 3000)] * 4)
    assert serve(env, make_planner(EdfEvictSpec()), requests)["evictions"] == 0
