"""LLM serving operations by hand: small scenarios whose every time can be computed with pencil and paper.

One step takes 10 ms whatever is in it, unless a test says otherwise: a request alone takes one step per
output token, the first of which is its prefill.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlm_env.dynamics import (
    GROUP_FORMED,
    HEAD_EMPTIED,
    INSTANCE_CHANGED,
    MODEL_READY,
    World,
    advance,
    settle_rest_as_missed,
)
from qlm_env.lso import Balance, Evict, Lso, Pull, SwapModel, WarmStart, apply_lso, is_legal
from qlm_env.requests import (
    FINISHED,
    MET,
    NOWHERE,
    RUNNING,
    UNSETTLED,
    WAITING,
    make_request_table,
)
from tests.backends.toy_cluster import (
    COLD_START_S,
    KV_BYTES_PER_TOKEN,
    SLEEP_S,
    STAGE_S,
    STEP_S,
    WAKE_S,
    request_table,
    toy_scenario,
    toy_world,
    write_toy_profile,
)

COPY_S = KV_BYTES_PER_TOKEN / 2e10
"""Seconds to copy one token's KV between GPU and host."""

EACH_ALONE = {"grouping": {"delta": 1e-6}}
"""Every request is a group of its own, numbered as it arrives."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy_profile(tmp_path)
    return tmp_path


def make(folder: Path, *rows: Any, **settings: Any) -> World:
    """The world of these requests at time 0, when those that arrive then have."""
    world = toy_world(folder, request_table(*rows), toy_scenario(**settings))
    pass_until(world, 0.0)
    return world


def pass_until(world: World, until_s: float) -> None:
    advance(world, until_s, False)


def apply(world: World, *lsos: Lso) -> None:
    """Carry out operations, all of which must be legal."""
    for lso in lsos:
        assert apply_lso(world, *lso.code()), f"{lso} is not legal"


def queue_order(world: World, i: int = 0) -> list[int]:
    order, g = [], int(world.queues.queue[i].head)
    while g != NOWHERE:
        order.append(g)
        g = int(world.queues.group[g].next)
    return order


def near(seconds: float | list[float]) -> Any:
    return pytest.approx(seconds, rel=1e-12, abs=1e-12)


# --------------------------------------------------------------------------- pulling
def test_groups_run_in_the_order_of_the_queue_and_requests_in_order_of_arrival(folder: Path) -> None:
    world = make(
        folder,
        *((0.0, 10, 10, 0, 0), (0.0, 10, 20, 0, 1), (0.0, 10, 30, 0, 0), (0.0, 10, 40, 0, 1)),
        engine={"max_num_seqs": 1},
        environment={"grouping": {"typical_request_tokens": 16, "delta": 100}},
    )
    apply(world, Balance(0, 0), Balance(1, 0, front=True))
    assert queue_order(world) == [1, 0]
    pass_until(world, 10.0)
    # Group 1 holds requests 1 and 3, group 0 requests 0 and 2.
    assert world.requests["first_scheduled_s"].tolist() == near([0.60, 0.0, 0.70, 0.20])
    assert world.requests["first_token_s"].tolist() == near([0.61, 0.01, 0.71, 0.21])
    assert world.requests["finish_s"].tolist() == near([0.70, 0.20, 1.00, 0.60])


def test_the_next_group_fills_what_the_head_leaves_of_the_batch(folder: Path) -> None:
    rows = [(0.0, 10, 50)] * 6
    world = make(folder, *rows, environment={"grouping": {"delta": 0.5, "typical_request_tokens": 16}})
    assert int(world.queues.tally[0].groups) == 3
    apply(world, Balance(2, 0), Balance(1, 0), Balance(0, 0))
    pass_until(world, 0.005)
    assert world.fleet.slot["request"][0].tolist() == [4, 5, 2, 3]
    assert queue_order(world) == [0]
    pass_until(world, 10.0)
    assert world.requests["first_scheduled_s"].tolist() == near([0.5, 0.5, 0.0, 0.0, 0.0, 0.0])


def test_a_head_of_another_model_holds_back_the_groups_behind_it(folder: Path) -> None:
    world = make(folder, (0.0, 10, 10, 0), (0.0, 10, 10, 1), (0.0, 10, 10, 0), num_models=2, environment=EACH_ALONE)
    apply(world, Balance(0, 0), Balance(1, 0), Balance(2, 0))
    pass_until(world, 5.0)
    assert world.requests["state"].tolist() == [FINISHED, WAITING, WAITING]
    apply(world, SwapModel(0, 1))
    pass_until(world, 100.0)
    ready_s = 5.0 + COLD_START_S + SLEEP_S
    assert world.requests["finish_s"][1] == pytest.approx(ready_s + 10 * STEP_S)
    assert world.requests["state"][2] == WAITING


def test_a_request_joins_the_batch_at_the_end_of_the_step_in_progress(folder: Path) -> None:
    world = make(folder, (0.0, 10, 100), (0.255, 10, 5), environment=EACH_ALONE)
    apply(world, Balance(0, 0))
    pass_until(world, 0.255)
    apply(world, Balance(1, 0))
    pass_until(world, 2.0)
    assert world.requests["first_scheduled_s"].tolist() == near([0.0, 0.26])
    assert world.requests["finish_s"].tolist() == near([1.0, 0.31])


def test_without_auto_pull_one_pull_takes_what_there_is_room_for_of_the_head_group(folder: Path) -> None:
    world = make(
        folder,
        *[(0.0, 10, 10)] * 8,
        environment={"auto_pull": False, "grouping": {"typical_request_tokens": 512 // 24, "delta": 1.5}},
    )
    assert world.queues.group["members"][:2].tolist() == [6, 2]
    apply(world, Balance(0, 0), Balance(1, 0))
    pass_until(world, 1.0)
    assert (world.requests["state"] == WAITING).all()
    apply(world, Pull(0))
    pass_until(world, 2.0)
    assert world.requests["state"].tolist() == [FINISHED] * 4 + [WAITING] * 4
    apply(world, Pull(0))
    pass_until(world, 3.0)
    assert world.requests["state"].tolist() == [FINISHED] * 6 + [WAITING] * 2
    assert queue_order(world) == [1]


# --------------------------------------------------------------------------- eviction
def evicted(folder: Path, keep_kv: bool) -> World:
    """Request 0 (100 + 100 tokens) is evicted at 0.31 s for request 1 (10 + 5), with one batch slot.

    A step takes 10 ms and 0.1 ms for each token, so a decode step of one request 10.1 ms.
    """
    write_toy_profile(folder, c1_s_per_token=1e-4, n0_tokens=4096.0)
    world = make(folder, (0.0, 100, 100, 0, 1), (0.3, 10, 5, 0, 0), engine={"max_num_seqs": 1}, environment=EACH_ALONE)
    apply(world, Balance(0, 0))
    pass_until(world, 0.3)
    apply(world, Balance(1, 0, front=True), Evict(0, keep_kv))
    pass_until(world, 10.0)
    return world


PREFILL_0_S, PREFILL_1_S, DECODE_S = 0.010 + 0.0100, 0.010 + 0.0010, 0.0101
EVICTED_S = PREFILL_0_S + 28 * DECODE_S
"""The end of the step in progress at 0.3 s: 29 tokens are generated, and 128 have their KV cached."""


def test_eviction_with_kv_kept_costs_two_copies(folder: Path) -> None:
    assert EVICTED_S - DECODE_S < 0.3 < EVICTED_S
    world = evicted(folder, keep_kv=True)
    requests = world.requests
    start_1_s = EVICTED_S + 128 * COPY_S
    end_1_s = start_1_s + PREFILL_1_S + 4 * DECODE_S
    assert requests["first_scheduled_s"].tolist() == near([0.0, start_1_s])
    # The copy back is part of the step that resumes; the 71 tokens to come are decode steps.
    assert requests["finish_s"].tolist() == near([end_1_s + 128 * COPY_S + 71 * DECODE_S, end_1_s])
    assert requests["first_token_s"][0] == pytest.approx(PREFILL_0_S)
    assert requests["recomputed_tokens"].tolist() == [0, 0]
    assert world.fleet.engine["kv_swapped_bytes"][0] == 2 * 128 * KV_BYTES_PER_TOKEN


def test_eviction_with_kv_dropped_costs_a_prefill(folder: Path) -> None:
    world = evicted(folder, keep_kv=False)
    requests = world.requests
    end_1_s = EVICTED_S + PREFILL_1_S + 4 * DECODE_S
    # Prompt and 29 generated tokens are computed again, which yields the 30th.
    assert requests["finish_s"].tolist() == near([end_1_s + (0.010 + 0.0129) + 70 * DECODE_S, end_1_s])
    assert requests["first_token_s"][0] == pytest.approx(PREFILL_0_S)
    assert requests["recomputed_tokens"].tolist() == [128, 0]
    assert requests["evictions"].tolist() == [1, 0]


def test_only_what_is_not_of_the_head_group_is_evicted(folder: Path) -> None:
    world = make(
        folder,
        *[(0.0, 10, 100, 0, 0)] * 4,
        *[(0.0, 10, 100, 0, 1)] * 3,
        engine={"max_num_seqs": 6},
        environment={"grouping": {"delta": 100}},
    )
    apply(world, Balance(0, 0), Balance(1, 0))
    pass_until(world, 0.105)
    batch = world.fleet.slot["request"][0]
    assert batch.tolist() == [0, 1, 2, 3, 4, 5]
    apply(world, Evict(0, keep_kv=False))
    pass_until(world, 0.115)
    # Group 0 came back behind the head, whose last request goes first; room is left for three of group 0.
    assert batch.tolist() == [4, 5, 6, 0, 1, 2]
    assert world.requests["evictions"].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert world.requests["recomputed_tokens"].tolist() == [10 + 11 - 1] * 4 + [0] * 3
    assert queue_order(world) == [0]


def test_evicted_groups_go_behind_the_head_of_their_queue(folder: Path) -> None:
    world = make(folder, *[(0.0, 10, 100)] * 4, engine={"max_num_seqs": 2}, environment=EACH_ALONE)
    apply(world, Balance(0, 0), Balance(1, 0))
    pass_until(world, 0.105)
    apply(world, Balance(2, 0), Balance(3, 0), Evict(0, keep_kv=True))
    pass_until(world, 0.115)
    # Group 2 was the head and went first, group 0 next, with its KV; group 1 is now ahead of group 3.
    assert world.fleet.slot["request"][0].tolist() == [2, 0]
    assert queue_order(world) == [1, 3]


def test_kept_kv_is_dropped_when_its_group_moves_to_another_host(folder: Path) -> None:
    world = make(folder, (0.0, 10, 100, 0), (0.0, 10, 10, 1), num_models=2, instances=[{}, {}], environment=EACH_ALONE)
    apply(world, Balance(0, 0))
    pass_until(world, 0.105)
    apply(world, Balance(1, 0), Evict(0, keep_kv=True))
    pass_until(world, 0.2)
    # The head is of a model that is not loaded, so the evicted request stays where it is.
    assert queue_order(world) == [1, 0]
    assert world.requests["kv_host"][0] == 0
    assert world.fleet.engine["host_kv_used_bytes"][0] == 20 * KV_BYTES_PER_TOKEN
    apply(world, Balance(0, 0, front=False))
    assert world.requests["kv_host"][0] == 0, "it stayed at its host"
    apply(world, Balance(0, 1))
    assert world.requests["kv_host"][0] == NOWHERE
    assert world.requests["recomputed_tokens"][0] == 20
    assert world.fleet.engine["host_kv_used_bytes"].tolist() == [0.0, 0.0]
    pass_until(world, 5.0)
    assert world.requests["finish_s"][0] == pytest.approx(0.2 + 89 * STEP_S)


def test_a_started_group_cannot_move_until_all_of_it_is_evicted(folder: Path) -> None:
    world = make(
        folder,
        *((0.0, 10, 100), (0.0, 10, 100), (0.0, 10, 10, 1)),
        num_models=2,
        instances=[{}, {}],
        engine={"max_num_seqs": 1},
        environment={"grouping": {"delta": 100}},
    )
    apply(world, Balance(0, 0))
    assert is_legal(world, *Balance(0, 1).code())
    pass_until(world, 0.105)
    assert not is_legal(world, *Balance(0, 1).code())
    assert is_legal(world, *Balance(0, 0, front=True).code())
    apply(world, Balance(1, 0, front=True), Evict(0, keep_kv=False))
    assert not is_legal(world, *Balance(0, 1).code())
    pass_until(world, 0.115)
    apply(world, Balance(0, 1))
    pass_until(world, 5.0)
    # On the other instance from 0.115 s on: 89 steps for the rest of request 0, then request 1.
    assert world.requests["finish_s"][:2].tolist() == pytest.approx([0.115 + 0.89, 0.115 + 0.89 + 1.0])


# --------------------------------------------------------------------------- models
def test_a_swap_lets_the_batch_drain_and_pulls_nothing_meanwhile(folder: Path) -> None:
    world = make(folder, (0.0, 10, 50, 0), (0.1, 10, 10, 0), (0.1, 10, 10, 1), num_models=2, environment=EACH_ALONE)
    apply(world, Balance(0, 0))
    pass_until(world, 0.1)
    apply(world, Balance(1, 0), SwapModel(0, 1))
    assert not is_legal(world, *SwapModel(0, 0).code()), "already swapping"
    pass_until(world, 0.505)
    assert world.requests["finish_s"][0] == pytest.approx(0.5)
    assert world.requests["state"].tolist() == [FINISHED, WAITING, WAITING]
    apply(world, Balance(2, 0, front=True))
    pass_until(world, 100.0)
    ready_s = 0.5 + COLD_START_S + SLEEP_S
    assert world.requests["first_scheduled_s"][2] == pytest.approx(ready_s)
    assert world.requests["finish_s"][2] == pytest.approx(ready_s + 0.1)
    assert np.isnan(world.requests["finish_s"][1])
    apply(world, SwapModel(0, 0))
    pass_until(world, 200.0)
    # Model 0 slept in host memory.
    assert world.requests["finish_s"][1] == pytest.approx(100.0 + WAKE_S + SLEEP_S + 0.1)
    assert (world.fleet.engine["cold_starts"][0], world.fleet.engine["warm_hits"][0]) == (1, 1)
    assert world.fleet.engine["swapping_s"][0] == pytest.approx(COLD_START_S + WAKE_S + 2 * SLEEP_S)


@pytest.mark.parametrize(
    ("swap_at_s", "ready_s", "warm"),
    [
        (50.0, 50.0 + WAKE_S, True),
        # Under way: the rest of the staging and the wake-up, as that is sooner than a cold start.
        (20.0, STAGE_S + WAKE_S, True),
        # Hardly begun: the other way round.
        (0.5, 0.5 + COLD_START_S, False),
    ],
)
def test_a_swap_after_a_warm_start(folder: Path, swap_at_s: float, ready_s: float, warm: bool) -> None:
    world = make(folder, (0.0, 10, 10, 1), num_models=2, environment=EACH_ALONE)
    apply(world, Balance(0, 0), WarmStart(0, 1))
    assert not is_legal(world, *WarmStart(0, 1).code())
    pass_until(world, swap_at_s)
    apply(world, SwapModel(0, 1))
    pass_until(world, 200.0)
    assert world.requests["first_scheduled_s"][0] == pytest.approx(ready_s + SLEEP_S)
    assert bool(world.fleet.engine["warm_hits"][0]) == warm


# --------------------------------------------------------------------------- epochs
def test_advance_stops_where_a_decision_is_called_for(folder: Path) -> None:
    world = make(
        folder,
        *((1.0, 10, 100, 0), (1.5, 10, 10, 0), (2.0, 10, 300, 1)),
        num_models=2,
        instances=[{}, {}],
        engine={"max_num_seqs": 1},
        environment={"grouping": {"delta": 100}},
        failures=[{"instance": 1, "at_s": 2.7, "duration_s": 2.0}],
    )

    def next_epoch(until_s: float = 1000.0) -> tuple[int, float]:
        reasons = advance(world, until_s, True)
        return reasons, float(world.clock[0].now_s)

    assert next_epoch(0.4) == (0, 0.4)
    assert next_epoch() == (GROUP_FORMED, 1.0)
    # Request 1 joins the group at 1.5 s, which calls for nothing.
    assert next_epoch() == (GROUP_FORMED, 2.0)
    apply(world, Balance(0, 0))
    # Request 0 is pulled at once, by the decision just taken, and at its end request 1, the group's last.
    assert next_epoch() == (INSTANCE_CHANGED, 2.7)
    assert next_epoch() == (HEAD_EMPTIED, near(3.0))
    apply(world, Balance(1, 0), SwapModel(0, 1))
    assert next_epoch() == (INSTANCE_CHANGED, 4.7)
    apply(world, WarmStart(1, 0))
    # The swap began when request 1 was done; the model's group is pulled the moment it is ready.
    assert next_epoch() == (MODEL_READY | HEAD_EMPTIED, near(3.1 + COLD_START_S + SLEEP_S))
    assert next_epoch() == (MODEL_READY, near(4.7 + STAGE_S))
    assert next_epoch() == (0, near(3.1 + COLD_START_S + SLEEP_S + 3.0))
    assert (world.requests["state"] == FINISHED).all()


def test_time_stops_when_everything_is_served(folder: Path) -> None:
    world = make(folder, (0.0, 10, 10))
    apply(world, Balance(0, 0))
    pass_until(world, 50.0)
    assert world.clock[0].now_s == pytest.approx(0.1)
    pass_until(world, 60.0)
    assert world.clock[0].now_s == pytest.approx(0.1)


# --------------------------------------------------------------------------- failures
def test_a_failure_loses_the_step_in_progress_and_all_kv(folder: Path) -> None:
    world = make(
        folder,
        *((0.0, 10, 100), (0.0, 10, 100)),
        instances=[{}, {}],
        engine={"max_num_seqs": 1},
        environment={"grouping": {"delta": 100}},
        failures=[{"instance": 0, "at_s": 0.105, "duration_s": 1.0}],
    )
    apply(world, Balance(0, 0))
    pass_until(world, 0.5)
    requests = world.requests
    assert requests["state"].tolist() == [WAITING, WAITING]
    assert requests["generated_tokens"].tolist() == [10, 0]
    assert requests["recomputed_tokens"].tolist() == [10 + 10 - 1, 0]
    group = world.queues.group[0]
    assert (group.waiting, group.in_engine, group.queue, group.queued) == (2, 0, NOWHERE, 0)
    assert not is_legal(world, *Balance(0, 0).code())
    apply(world, Balance(0, 1))
    pass_until(world, 5.0)
    assert requests["finish_s"].tolist() == near([0.5 + 0.9, 0.5 + 0.9 + 1.0])
    assert requests["first_token_s"].tolist() == near([0.01, 1.41])
    assert world.fleet.engine["up"].tolist() == [1, 1]
    assert world.fleet.engine["active_model"].tolist() == [NOWHERE, 0]


def short_of_blocks(folder: Path, failures: tuple[dict[str, Any], ...] = (), metric: str = "e2e") -> World:
    """Three requests prefill in one step, and then three KV blocks are too few.

    The second step runs request 0, preempts request 1, which is less urgent and needs a second block, and has
    nothing for request 2, though that stays in the batch.
    """
    world = make(
        folder,
        *((0.0, 8, 8, 0, 0), (0.0, 16, 20, 0, 1), (0.0, 8, 8, 0, 0)),
        engine={"num_gpu_blocks": 4, "scheduling_policy": "priority"},
        slo={
            "metric": metric,
            "classes": [{"name": "urgent", "target_s": 10.0}, {"name": "patient", "target_s": 60.0}],
        },
        environment=EACH_ALONE,
        failures=failures,
        context_tokens=48,
    )
    apply(world, Balance(0, 0), Balance(1, 0), Balance(2, 0))
    pass_until(world, 0.015)
    return world


def test_a_decode_that_a_preempting_step_leaves_out_is_a_step_late(folder: Path) -> None:
    world = short_of_blocks(folder)
    assert world.requests["state"].tolist() == [RUNNING, WAITING, RUNNING]
    assert world.requests["preemptions"].tolist() == [0, 1, 0]
    assert not is_legal(world, *Balance(1, 0).code()), "a preempted request is still in the engine"
    pass_until(world, 1.0)
    # Request 1 comes back when request 0 leaves its block, and its prefill then yields its second token.
    assert world.requests["finish_s"].tolist() == near([0.08, 0.08 + 19 * STEP_S, 0.09])
    assert world.requests["recomputed_tokens"].tolist() == [0, 16, 0]


def test_a_decode_that_a_preempting_step_leaves_out_loses_nothing_by_a_failure(folder: Path) -> None:
    world = short_of_blocks(folder, failures=({"instance": 0, "at_s": 0.014, "duration_s": 9.0},))
    assert world.requests["generated_tokens"].tolist() == [1, 1, 1]
    assert world.requests["recomputed_tokens"].tolist() == [8, 16, 8]


def test_a_failure_ends_the_booking_of_a_swap(folder: Path) -> None:
    world = make(folder, (0.0, 10, 10, 0), num_models=2, failures=[{"instance": 0, "at_s": 12.0, "duration_s": 1.0}])
    apply(world, SwapModel(0, 1))
    pass_until(world, 20.0)
    assert world.fleet.engine["swapping_s"][0] == pytest.approx(12.0)


# --------------------------------------------------------------------------- outcomes
def test_an_episode_cut_off_counts_first_tokens_that_came_in_time(folder: Path) -> None:
    """Request 1 had its first token in time and is preempted when the episode ends."""
    for metric, outcome in (("ttft", MET), ("e2e", -MET)):
        world = short_of_blocks(folder, metric=metric)
        assert world.requests["settled"][1] == UNSETTLED
        settle_rest_as_missed(world)
        assert world.requests["settled"][1] == outcome


# --------------------------------------------------------------------------- slices
def random_world(folder: Path, seed: int) -> World:
    """Preemption, chunked prefill, two models, failures: whatever can be cut in two by a decision."""
    rng = np.random.default_rng(seed)
    n = 40
    total = rng.integers(2, 200, n)
    output = rng.integers(1, total)
    requests = make_request_table(
        np.cumsum(rng.exponential(0.1, n)),
        total - output,
        output,
        rng.integers(0, 2, n),
        rng.integers(0, 2, n),
        rng.lognormal(0.0, 0.2, n),
    )
    write_toy_profile(
        folder,
        c1_s_per_token=1e-4,
        n0_tokens=8.0,
        c2_s_per_token=2e-4,
        c3_s_per_kv_token=1e-5,
        cold_start_s=1.3,
    )
    scenario = toy_scenario(
        num_models=2,
        instances=[{"host_kv_gb": 0.02}] * 2,
        engine={
            "max_num_batched_tokens": 40,
            "num_gpu_blocks": 20,
            "scheduling_policy": ["fcfs", "priority"][seed % 2],
        },
        environment={"grouping": {"delta": 1.0, "typical_request_tokens": 64}},
        failures=[{"instance": 0, "at_s": 2.345, "duration_s": 1.0}],
        context_tokens=200,
    )
    return toy_world(folder, requests, scenario)


def play(world: World, slice_s: float) -> None:
    """Decisions at fixed times, and advance in slices between them."""
    decide_s = 0.3701
    now_s = 0.0
    for k in range(120):
        while now_s < k * decide_s:
            now_s = min(now_s + slice_s, k * decide_s)
            pass_until(world, now_s)
        for g in world.queues.live[: world.queues.tally[0].live].tolist():
            if not world.queues.group[g].queued:
                apply_lso(world, *Balance(g, g % 2, front=g % 3 == 0).code())
        for i in range(2):
            head = world.queues.queue[i].head
            if head != NOWHERE:
                apply_lso(world, *SwapModel(i, int(world.queues.group[head].model)).code())
            if k % 4 == i:
                apply_lso(world, *Evict(i, keep_kv=k % 8 == i).code())
    pass_until(world, 1000.0)


@pytest.mark.parametrize("seed", range(6))
def test_decisions_in_the_middle_of_a_leap_change_nothing_that_is_fixed(folder: Path, seed: int) -> None:
    """Engine steps are cut into slices of 3 ms, or run from decision to decision: the same happens."""
    whole, sliced = random_world(folder, seed), random_world(folder, seed)
    play(whole, np.inf)
    play(sliced, 0.003)
    assert (whole.requests["state"] == FINISHED).all()
    assert whole.requests["preemptions"].sum() > 0
    assert whole.requests["evictions"].sum() > 0
    assert whole.fleet.engine["kv_swapped_bytes"].sum() > 0
    assert whole.fleet.engine["swaps"].sum() > 3
    for name in ("first_scheduled_s", "first_token_s", "finish_s"):
        np.testing.assert_allclose(sliced.requests[name], whole.requests[name], rtol=0, atol=1e-9, err_msg=name)
    for name in ("preemptions", "evictions", "recomputed_tokens", "settled", "group"):
        assert sliced.requests[name].tolist() == whole.requests[name].tolist(), name
    for name in ("busy_s", "swapping_s", "kv_swapped_bytes"):
        np.testing.assert_allclose(sliced.fleet.engine[name], whole.fleet.engine[name], rtol=1e-9, err_msg=name)
    assert sliced.fleet.engine["tick"].tolist() == whole.fleet.engine["tick"].tolist()
    assert sliced.clock[0].reward == pytest.approx(whole.clock[0].reward)
