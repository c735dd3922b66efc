from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlm_env.dynamics import settle_rest_as_missed
from qlm_env.lso import Balance, Evict, SwapModel, WarmStart
from qlm_env.metrics import episode_metrics
from qlm_env.spec import FailureSpec
from tests.toy_world import CLASSES, COLD_START_S, FAST, SLEEP_S, SLOW, STAGE_S, Request, ToyWorld, toy_world

NAMES = [c.name for c in CLASSES]
PERCENTILES = [f"{name}_{p}_s" for name in ("ttft", "tpot", "e2e", "queueing") for p in ("p50", "p99")]
AGREED = [
    "requests",
    "finished",
    "rejected",
    "unfinished",
    "slo_attainment",
    "slo_attainment_weighted",
    "slo_attainment_per_class",
    "request_throughput_per_s",
    "token_throughput_per_s",
    "goodput_per_s",
    "latency_per_class",
    "hol_blocking_s",
    "utilisation",
    "utilisation_per_instance",
    "kv_occupancy",
    "swaps",
    "warm_hits",
    "cold_starts",
    "warm_starts",
    "swapping_s",
    "evictions",
    "preemptions",
    "recomputed_tokens",
    "kv_swapped_bytes",
    "emulated_s",
]


def measure(toy: ToyWorld) -> dict[str, Any]:
    settle_rest_as_missed(toy.world)
    return episode_metrics(toy.world, NAMES)


@pytest.fixture
def five_requests(tmp_path: Path) -> ToyWorld:
    """One at a time from t = 10: steps 10-13, 13-15, then 15-16 and 16-17; the last can never run.

    ============ ===== ===== ======== =====
    request      sched first finished e2e_s
    ============ ===== ===== ======== =====
    fast, 3 out  10    11    13       3 met
    fast, 2 out  13    14    15       5
    slow, 1 out  15    16    16       4 met
    slow, 1 out  16    17    17       5 met
    ============ ===== ===== ======== =====
    """
    toy = toy_world(
        tmp_path,
        [
            Request(10, 4, 3, FAST),
            Request(10, 4, 2, FAST),
            Request(12, 4, 1, SLOW),
            Request(12, 4, 1, SLOW),
            Request(12, 4, 1000, SLOW),
        ],
    )
    toy.serve()
    return toy


def test_an_episode_by_hand(five_requests: ToyWorld) -> None:
    metrics = measure(five_requests)
    assert five_requests.now_s == 17
    assert metrics.pop("utilisation_per_instance") == [1.0]
    assert metrics.pop("slo_attainment_per_class") == pytest.approx({"fast": 1 / 2, "slow": 2 / 3})
    per_class = metrics.pop("latency_per_class")
    expected = {
        "requests": 5,
        "finished": 4,
        "rejected": 1,
        "unfinished": 0,
        "slo_attainment": 3 / 5,
        "slo_attainment_weighted": (3 + 1 + 1) / (2 * 3 + 3 * 1),
        "emulated_s": 7.0,
        "request_throughput_per_s": 4 / 7,
        "token_throughput_per_s": (3 + 2 + 1 + 1) / 7,
        "goodput_per_s": 3 / 7,
        # Sorted 1, 4, 4, 5: the 99th percentile lies 0.97 of the way from the third to the fourth.
        "ttft_p50_s": 4.0,
        "ttft_p99_s": 4.97,
        "tpot_p50_s": 1.0,
        "tpot_p99_s": 1.0,
        "e2e_p50_s": 4.5,
        "e2e_p99_s": 5.0,
        "queueing_p50_s": 3.0,
        "queueing_p99_s": 3.97,
        "hol_blocking_s": 0.0,
        "utilisation": 1.0,
        "kv_occupancy": 1 / 100,
        **dict.fromkeys(("swaps", "warm_hits", "cold_starts", "warm_starts", "evictions", "preemptions"), 0),
        "swapping_s": 0.0,
        "recomputed_tokens": 0,
        "kv_swapped_bytes": 0.0,
    }
    assert metrics == pytest.approx(expected)
    assert per_class["fast"] == pytest.approx(
        {
            "ttft_p50_s": 2.5,
            "ttft_p99_s": 3.97,
            "tpot_p50_s": 1.0,
            "tpot_p99_s": 1.0,
            "e2e_p50_s": 4.0,
            "e2e_p99_s": 4.98,
            "queueing_p50_s": 1.5,
            "queueing_p99_s": 2.97,
        }
    )
    assert per_class["slow"]["tpot_p50_s"] is None
    assert per_class["slow"]["ttft_p50_s"] == pytest.approx(4.5)


def test_the_names_are_the_agreed_ones_and_json_holds_the_values(five_requests: ToyWorld) -> None:
    metrics = measure(five_requests)
    assert set(metrics) == {*AGREED, *PERCENTILES}
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_the_return_is_twice_the_weighted_attainment_minus_one(five_requests: ToyWorld) -> None:
    metrics = measure(five_requests)
    assert five_requests.world.clock[0].reward == pytest.approx(2 * metrics["slo_attainment_weighted"] - 1)


def test_all_met_is_exactly_one(tmp_path: Path) -> None:
    toy = toy_world(tmp_path, [Request(0, 4, 1, FAST), *(Request(0, 4, 1, SLOW) for _ in range(9))])
    toy.serve()
    metrics = measure(toy)
    assert metrics["slo_attainment"] == 1
    assert metrics["slo_attainment_weighted"] == 1


def test_nothing_finished(tmp_path: Path) -> None:
    """Cut off after 2 of 60 steps: no latency, no attainment, but time was used."""
    toy = toy_world(tmp_path, [Request(1, 4, 60, FAST), Request(1, 4, 60, FAST)], instances=2)
    toy.serve(until_s=3)
    metrics = measure(toy)
    counts = ("requests", "finished", "rejected", "unfinished")
    assert [metrics[name] for name in counts] == [2, 0, 0, 2]
    assert metrics["slo_attainment"] == metrics["slo_attainment_weighted"] == 0
    assert metrics["slo_attainment_per_class"] == {"fast": 0.0}
    assert all(metrics[name] is None for name in PERCENTILES)
    assert metrics["request_throughput_per_s"] == metrics["token_throughput_per_s"] == 0
    assert metrics["utilisation_per_instance"] == [1.0, 0.0]
    assert metrics["utilisation"] == 0.5
    json.dumps(metrics, allow_nan=False)


def test_all_rejected_takes_no_time(tmp_path: Path) -> None:
    toy = toy_world(tmp_path, [Request(3, 4, 1000), Request(3, 1000, 4)])
    toy.pass_time(3)
    metrics = measure(toy)
    assert metrics["rejected"] == 2
    assert metrics["slo_attainment"] == 0
    assert metrics["emulated_s"] == 0
    assert metrics["request_throughput_per_s"] == metrics["utilisation"] == 0
    assert metrics["kv_occupancy"] is None


def test_time_to_first_token_settles_before_the_end(tmp_path: Path) -> None:
    """First tokens at 1 and 11 against a target of 4 s; the second request still runs when time is up."""
    requests = [Request(0, 4, 10, FAST), Request(9, 4, 60, FAST)]
    toy = toy_world(tmp_path, requests, metric="ttft")
    toy.serve(until_s=20)
    metrics = measure(toy)
    assert (metrics["finished"], metrics["unfinished"]) == (1, 1)
    assert metrics["slo_attainment"] == 1
    assert metrics["goodput_per_s"] == pytest.approx(2 / 20)
    assert metrics["ttft_p50_s"] == 1

    toy = toy_world(tmp_path, requests, metric="e2e")
    toy.serve(until_s=20)
    assert measure(toy)["slo_attainment"] == 0


def test_a_request_without_room_behind_a_less_urgent_one_is_blocked(tmp_path: Path) -> None:
    """The slow request holds 4 to 6 of 8 blocks until 20; the fast one wants 5 from the step end at 2 on."""
    requests = [Request(0, 64, 20, SLOW), Request(1.5, 80, 1, FAST)]
    toy = toy_world(tmp_path, requests, num_blocks=8, max_num_seqs=2)
    toy.serve(until_s=10.5)
    assert measure(toy)["hol_blocking_s"] == pytest.approx(10.5 - 2)

    toy = toy_world(tmp_path, requests, num_blocks=8, max_num_seqs=2)
    toy.serve()
    assert measure(toy)["hol_blocking_s"] == pytest.approx(20 - 2)
    assert toy.now_s == 21


def test_swaps_are_counted_and_only_the_time_that_passed_in_them(tmp_path: Path) -> None:
    """Cold to blue (put red to sleep first), back to red from host memory, cut off 0.5 s into that."""
    toy = toy_world(tmp_path, [Request(0, 4, 1, model=1), Request(100, 4, 1), Request(101, 4, 1)])
    toy.pass_time(0)
    toy.do(Balance(0, 0), SwapModel(0, 1))
    toy.serve(until_s=60)
    metrics = measure(toy)
    assert (metrics["swaps"], metrics["cold_starts"], metrics["warm_hits"]) == (1, 1, 0)
    assert metrics["swapping_s"] == pytest.approx(SLEEP_S + COLD_START_S)
    assert metrics["e2e_p50_s"] == pytest.approx(SLEEP_S + COLD_START_S + 1)

    toy.do(SwapModel(0, 0))
    toy.pass_time(60.5)
    metrics = measure(toy)
    assert (metrics["swaps"], metrics["cold_starts"], metrics["warm_hits"]) == (2, 1, 1)
    assert metrics["swapping_s"] == pytest.approx(SLEEP_S + COLD_START_S + 0.5)


def test_operations_are_counted(tmp_path: Path) -> None:
    """A batch of two is evicted after its second step, one step more than its prefill, and served again."""
    toy = toy_world(
        tmp_path,
        [Request(0, 8, 4), Request(0, 8, 4), Request(0, 8, 1, FAST, model=1)],
        max_num_seqs=2,
    )
    toy.pass_time(0)
    toy.do(Balance(0, 0), WarmStart(0, 1))
    toy.pass_time(1.5)
    toy.do(Balance(1, 0, front=True), Evict(0, keep_kv=False))
    toy.pass_time(STAGE_S + 1)
    toy.do(SwapModel(0, 1))
    toy.pass_time(STAGE_S + 10)
    metrics = measure(toy)
    assert metrics["warm_starts"] == 1
    assert metrics["warm_hits"] == 1
    assert metrics["evictions"] == 2
    # Prompt and one generated token each: the last token of a step is not yet cached.
    assert metrics["recomputed_tokens"] == 2 * (8 + 1)
    assert metrics["kv_swapped_bytes"] == 0


def test_kept_kv_crosses_to_the_host_and_back(tmp_path: Path) -> None:
    toy = toy_world(tmp_path, [Request(0, 8, 4), Request(0, 8, 1, FAST)])
    toy.pass_time(0)
    toy.do(Balance(0, 0))
    toy.pass_time(1.5)
    toy.do(Balance(1, 0, front=True), Evict(0, keep_kv=True))
    toy.serve()
    metrics = measure(toy)
    bytes_per_token = float(toy.world.fleet.placement[0, 0].kv_bytes_per_token)
    assert metrics["finished"] == 2
    assert metrics["evictions"] == 1
    assert metrics["recomputed_tokens"] == 0
    assert metrics["kv_swapped_bytes"] == pytest.approx(2 * (8 + 1) * bytes_per_token)


def test_preemption_recomputes(tmp_path: Path) -> None:
    """Two requests that outgrow 8 blocks together; the later one starts over."""
    toy = toy_world(tmp_path, [Request(0, 48, 40), Request(0, 48, 40)], num_blocks=8, max_num_seqs=2)
    toy.serve()
    metrics = measure(toy)
    assert metrics["finished"] == 2
    # Both hold 48 + 16 tokens in 8 blocks after the step that ends at 17.
    assert metrics["preemptions"] == 1
    assert metrics["recomputed_tokens"] == 64


def test_a_failed_instance_is_not_used(tmp_path: Path) -> None:
    """Five whole steps of ten seconds; the sixth, and the prompt and four tokens cached by then, are lost."""
    failure = FailureSpec(instance=0, at_s=5.5, duration_s=4.5)
    toy = toy_world(tmp_path, [Request(0, 4, 60)], failures=(failure,))
    toy.serve(until_s=5)
    toy.pass_time(10)
    metrics = measure(toy)
    assert metrics["utilisation"] == pytest.approx(0.5)
    assert metrics["recomputed_tokens"] == 4 + 4


@pytest.mark.parametrize("seed", range(5))
def test_against_a_plain_recount(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrival_s = np.sort(rng.uniform(0, 60, 80))
    toy = toy_world(
        tmp_path,
        [Request(t, int(rng.integers(1, 60)), int(rng.integers(1, 90)), int(rng.integers(2))) for t in arrival_s],
        num_blocks=20,
        max_num_seqs=4,
    )
    toy.serve(until_s=700)
    metrics = measure(toy)
    rows = [row for row in toy.world.requests if row.state == 3]
    e2e_s = [row.finish_s - row.arrival_s for row in rows]
    met = [row.finish_s - row.arrival_s <= CLASSES[row.slo_class].target_s for row in rows]
    assert metrics["finished"] == len(rows)
    assert metrics["finished"] + metrics["rejected"] + metrics["unfinished"] == 80
    assert metrics["slo_attainment"] == pytest.approx(sum(met) / 80)
    weights = [CLASSES[row.slo_class].weight for row in toy.world.requests]
    weight_met = sum(CLASSES[row.slo_class].weight for row, ok in zip(rows, met, strict=True) if ok)
    assert metrics["slo_attainment_weighted"] == pytest.approx(weight_met / sum(weights))
    assert metrics["e2e_p50_s"] == pytest.approx(float(np.median(e2e_s)))
    assert metrics["emulated_s"] == pytest.approx(toy.now_s - arrival_s[0])
    assert 0 < metrics["kv_occupancy"] <= 1
    assert 0 < metrics["utilisation"] <= 1
