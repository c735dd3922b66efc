from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlm_env.cluster import InstanceName
from qlm_env.dynamics import (
    BALANCE,
    EVICT,
    FAIL,
    PREEMPT,
    PULL,
    RECOVER,
    SWAP_BEGIN,
    SWAP_END,
    WARM_BEGIN,
    WARM_END,
)
from qlm_env.lso import Balance, Evict, SwapModel, WarmStart, apply_lso
from qlm_env.requests import NOWHERE
from qlm_env.spec import FailureSpec
from qlm_env.timeline import FIRST_INSTANCE_PID, MAX_SAMPLES, TRACKS, Timeline
from tests.toy_world import COLD_START_S, SLEEP_S, STAGE_S, WAKE_S, Request, ToyWorld, toy_world

TraceEvent = dict[str, Any]
METADATA = {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}


def check_trace(trace: dict[str, Any]) -> None:
    """What Perfetto's JSON importer asks for (Trace Event Format, JSON object form)."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    slices = defaultdict(list)
    named = set()
    for event in trace["traceEvents"]:
        assert event["ph"] in "XiCM"
        assert isinstance(event["pid"], int)
        assert event["pid"] > 0
        if event["ph"] == "M":
            assert event["name"] in METADATA
            named.add((event["pid"], event.get("tid")))
            continue
        assert isinstance(event["ts"], int)
        assert event["ts"] >= 0
        assert isinstance(event["name"], str)
        assert (event["pid"], event.get("tid")) in named, "metadata comes first"
        if event["ph"] == "X":
            assert isinstance(event["dur"], int)
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "i":
            assert event["s"] == "t"
        else:
            assert all(isinstance(value, int) for value in event["args"].values())
    for spans in slices.values():
        spans.sort()
        for (_, end), (start, _) in pairwise(spans):
            assert start >= end, "slices of a track overlap"


def on_track(trace: dict[str, Any], track: str, instance: int = 0) -> list[TraceEvent]:
    """The events of a track, in order of time."""
    key = FIRST_INSTANCE_PID + instance, 1 + TRACKS.index(track)
    found = [e for e in trace["traceEvents"] if e["ph"] in "Xi" and (e["pid"], e["tid"]) == key]
    return sorted(found, key=lambda event: int(event["ts"]))


def spans(trace: dict[str, Any], track: str, instance: int = 0) -> list[tuple[str, float, float]]:
    """(name, start, end) of a track's slices, in seconds."""
    return [(e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in on_track(trace, track, instance)]


def marks(trace: dict[str, Any], track: str, instance: int = 0) -> list[tuple[float, dict[str, Any]]]:
    """(time in seconds, args) of a track's instants."""
    return [(e["ts"] / 1e6, e["args"]) for e in on_track(trace, track, instance)]


def everything(folder: Path) -> ToyWorld:
    """Two instances. On the first: every operation. On the second: a failure."""
    toy = toy_world(
        folder,
        [Request(0, 48, 40), Request(0, 48, 40), Request(0.5, 8, 4, model=1)],
        instances=2,
        num_blocks=8,
        max_num_seqs=2,
        failures=(FailureSpec(instance=1, at_s=5, duration_s=3),),
    )
    toy.pass_time(0)
    toy.do(Balance(0, 0), WarmStart(0, 1), WarmStart(1, 1))
    # The two outgrow the KV cache after the step that ends at 17, and one is preempted.
    toy.pass_time(20.25)
    toy.do(Balance(1, 0, front=True), Evict(0, keep_kv=False))
    toy.pass_time(STAGE_S + 1)
    toy.do(SwapModel(0, 1))
    toy.serve(until_s=400)
    return toy


def test_every_operation_is_on_its_track(tmp_path: Path) -> None:
    toy = everything(tmp_path)
    trace = toy.timeline.to_chrome_trace()
    check_trace(trace)
    kinds = set(toy.timeline.events["kind"].tolist())
    assert kinds == {
        PULL, EVICT, PREEMPT, SWAP_BEGIN, SWAP_END, WARM_BEGIN, WARM_END, FAIL, RECOVER, BALANCE
    }  # fmt: skip

    assert marks(trace, "balance") == [
        (0.0, {"requests": 2, "group": 0, "model": "red"}),
        (20.25, {"requests": 1, "group": 1, "model": "blue"}),
    ]
    pulls = marks(trace, "pull")
    swapped_s = STAGE_S + 1 + WAKE_S + SLEEP_S
    assert pulls[0] == (0.0, {"requests": 2, "group": 0, "model": "red"})
    assert pulls[1] == (swapped_s, {"requests": 1, "group": 1, "model": "blue"})
    assert marks(trace, "preempt") == [(17.0, {"requests": 1})]
    # At the end of the step in progress: the one in the batch; the preempted one was not in it.
    assert marks(trace, "evict") == [(21.0, {"requests": 1})]
    assert spans(trace, "warm start") == [("staging blue", 0.0, STAGE_S)]
    assert spans(trace, "model")[:3] == [
        ("red", 0.0, STAGE_S + 1),
        ("loading blue", STAGE_S + 1, swapped_s),
        ("blue", swapped_s, toy.now_s),
    ]
    # The failure ends the model and the warm start, and leaves the GPU empty.
    assert spans(trace, "model", 1) == [("red", 0.0, 5.0), ("down", 5.0, 8.0)]
    assert spans(trace, "warm start", 1) == [("staging blue", 0.0, 5.0)]


def test_operations_add_up_to_the_engines_counters(tmp_path: Path) -> None:
    toy = busy(tmp_path, seed=0)
    trace = toy.timeline.to_chrome_trace()
    check_trace(trace)
    engine = toy.world.fleet.engine
    for i in range(2):
        names = [name for name, _, _ in spans(trace, "model", i)]
        assert sum(name.startswith("loading") for name in names) == engine[i].swaps > 0
        assert len(spans(trace, "warm start", i)) == engine[i].warm_starts
        for track, counter in (("evict", "evictions"), ("preempt", "preemptions")):
            count = sum(args["requests"] for _, args in marks(trace, track, i))
            assert count == engine[i][counter] > 0
    taken_out = int(engine.evictions.sum())
    pulled = sum(args["requests"] for i in range(2) for _, args in marks(trace, "pull", i))
    assert pulled >= len(toy.world.requests)
    assert pulled <= len(toy.world.requests) + taken_out + int(engine.preemptions.sum())


def busy(folder: Path, seed: int) -> ToyWorld:
    """Random operations on two instances that are short of blocks."""
    rng = np.random.default_rng(seed)
    arrival_s = np.sort(rng.uniform(0, 200, 60))
    requests = [
        Request(float(t), int(rng.integers(1, 60)), int(rng.integers(10, 60)), int(rng.integers(2)), int(m))
        for t, m in zip(arrival_s, rng.integers(2, size=60), strict=True)
    ]
    toy = toy_world(folder, requests, instances=2, num_blocks=10, max_num_seqs=4, group_members=6)
    while not toy.over:
        for group in toy.view.groups:
            if not group.queued:
                apply_lso(toy.world, *Balance(group.id, int(rng.integers(2)), bool(rng.random() < 0.5)).code())
        for instance in toy.view.instances:
            if instance.queue:
                head = toy.view.group(instance.queue[0]).model
                if rng.random() < 0.2:
                    apply_lso(toy.world, *Evict(instance.index, bool(rng.random() < 0.5)).code())
                if head != instance.serving_model:
                    apply_lso(toy.world, *SwapModel(instance.index, head).code())
            if rng.random() < 0.05:
                apply_lso(toy.world, *WarmStart(instance.index, int(rng.integers(2))).code())
        toy.pass_time(toy.now_s + 1, stop_at_epoch=True)
    return toy


@pytest.mark.parametrize("seed", range(1, 6))
def test_traces_of_random_episodes_are_valid(tmp_path: Path, seed: int) -> None:
    toy = busy(tmp_path, seed)
    check_trace(toy.timeline.to_chrome_trace())
    assert (np.diff(toy.timeline.events["time_s"]) >= 0).all()
    assert (np.diff(toy.timeline.samples["time_s"]) >= 0).all()


def test_a_swap_takes_over_what_is_being_staged(tmp_path: Path) -> None:
    toy = toy_world(tmp_path, [Request(0, 8, 4, model=1)])
    toy.pass_time(0)
    toy.do(WarmStart(0, 1))
    toy.pass_time(10)
    toy.do(SwapModel(0, 1))
    toy.pass_time(15)
    trace = toy.timeline.to_chrome_trace()
    check_trace(trace)
    assert spans(trace, "warm start") == [("staging blue", 0.0, 10.0)]
    # Still loading: the slice ends at the present.
    assert spans(trace, "model") == [("red", 0.0, 10.0), ("loading blue", 10.0, 15.0)]


def test_a_failure_breaks_off_a_swap(tmp_path: Path) -> None:
    failure = FailureSpec(instance=0, at_s=COLD_START_S / 2, duration_s=1)
    toy = toy_world(tmp_path, [Request(0, 8, 4, model=1)], failures=(failure,))
    toy.pass_time(0)
    toy.do(SwapModel(0, 1))
    toy.pass_time(100)
    trace = toy.timeline.to_chrome_trace()
    assert spans(trace, "model") == [
        ("loading blue", 0.0, 20.0),
        ("down", 20.0, 21.0),
    ]


def test_the_first_model_is_left_out_where_no_sample_shows_it(tmp_path: Path) -> None:
    """Recorded from a time on at which the instance has changed already, its model before is not known."""
    toy = toy_world(tmp_path, [Request(0, 8, 4), Request(60, 8, 4)])
    late = ToyWorld(toy.world, Timeline(toy.timeline.instances, toy.timeline.models), toy.view)
    late.do(SwapModel(0, 1))
    late.pass_time(50)
    assert spans(late.timeline.to_chrome_trace(), "model") == [
        ("loading blue", 0.0, 41.0),
        ("blue", 41.0, 50.0),
    ]


# --------------------------------------------------------------------------- samples
def test_a_sample_by_hand(tmp_path: Path) -> None:
    requests = [Request(0, 30, 4), Request(0, 30, 9), Request(0, 30, 9), Request(1, 8, 4, model=1)]
    toy = toy_world(tmp_path, requests, instances=2, num_blocks=16, max_num_seqs=2)
    toy.pass_time(0)
    toy.do(Balance(0, 0), SwapModel(1, 1))
    toy.pass_time(4.5)
    sample = toy.timeline.samples[-1]
    assert sample["time_s"] == 4.5
    assert sample["running"].tolist() == [1 + 1, 0]
    assert sample["waiting"].tolist() == [0, 0]
    assert sample["unqueued"] == 1
    # 33 and 30 cached tokens of the second and third request, in 3 and 2 of 16 blocks.
    assert sample["kv_used"].tolist() == pytest.approx([5 / 16, 0])
    assert sample["active_model"].tolist() == [0, NOWHERE]
    assert sample["loading_model"].tolist() == [NOWHERE, 1]
    assert sample["up"].tolist() == [True, True]
    assert (sample["settled"], sample["met"]) == (1, 1)


def test_a_preempted_request_is_waiting_again(tmp_path: Path) -> None:
    toy = toy_world(tmp_path, [Request(0, 48, 40), Request(0, 48, 40)], num_blocks=8, max_num_seqs=2)
    toy.pass_time(0)
    toy.do(Balance(0, 0))
    toy.pass_time(16.5)
    assert (toy.timeline.samples["running"][-1], toy.timeline.samples["waiting"][-1]) == ([2], [0])
    toy.pass_time(17.5)
    assert (toy.timeline.samples["running"][-1], toy.timeline.samples["waiting"][-1]) == ([1], [1])


def test_the_last_sample_is_the_present_and_the_others_keep_their_distance(tmp_path: Path) -> None:
    toy = toy_world(tmp_path, [Request(0, 8, 100)])
    toy.pass_time(0)
    toy.do(Balance(0, 0))
    for time_s in np.arange(0.25, 5.2, 0.25):
        toy.pass_time(float(time_s))
        assert toy.timeline.samples["time_s"][-1] == time_s
    toy.pass_time(5.25)
    assert toy.timeline.samples["time_s"].tolist() == [0, 1, 2, 3, 4, 5, 5.25]


def test_samples_stay_bounded(tmp_path: Path) -> None:
    toy = toy_world(tmp_path, [Request(0, 8, 119)])
    timeline = Timeline(toy.timeline.instances, toy.timeline.models, max_samples=8)
    toy = ToyWorld(toy.world, timeline, toy.view)
    toy.pass_time(0)
    toy.do(Balance(0, 0))
    for time_s in range(1, 101):
        toy.pass_time(time_s)
        assert len(timeline.samples) <= 8
    sampled_s = timeline.samples["time_s"]
    assert (sampled_s[0], sampled_s[-1]) == (0, 100)
    assert np.diff(sampled_s).max() <= 2 * timeline.sample_interval_s


def test_counters_show_changes_only(tmp_path: Path) -> None:
    toy = toy_world(tmp_path, [Request(0, 8, 3), Request(30, 8, 3)])
    toy.serve()
    counts = [
        (event["ts"], event["args"])
        for event in toy.timeline.to_chrome_trace()["traceEvents"]
        if event["ph"] == "C" and event["pid"] == FIRST_INSTANCE_PID and event["name"] == "requests"
    ]
    states = [(args["running"], args["waiting"]) for _, args in counts]
    assert all(a != b for a, b in pairwise(states))
    assert [running for running, _ in states] == [0, 1, 0, 1, 0]


# --------------------------------------------------------------------------- files
def test_write_leaves_one_whole_file(tmp_path: Path) -> None:
    toy = everything(tmp_path)
    path = tmp_path / "traces" / "episode.json"
    toy.timeline.write(path)
    assert json.loads(path.read_text(encoding="utf-8")) == toy.timeline.to_chrome_trace()
    assert [file.name for file in path.parent.iterdir()] == ["episode.json"]


def test_an_empty_timeline_is_valid() -> None:
    check_trace(Timeline([InstanceName("0 A100", "A100", 1)], ["red"]).to_chrome_trace())


def test_the_trace_of_a_long_episode_of_a_large_cluster_stays_small(tmp_path: Path) -> None:
    """As many samples as there can be, each different from the one before, on 80 instances."""
    rng = np.random.default_rng(0)
    timeline = Timeline([InstanceName(f"{i} A100", "A100", 1) for i in range(80)], ["red"])
    samples = timeline._samples.extend(MAX_SAMPLES)
    samples["time_s"] = np.arange(MAX_SAMPLES)
    for name in ("running", "waiting"):
        samples[name] = rng.integers(0, 200, (MAX_SAMPLES, 80))
    timeline.write(tmp_path / "trace.json")
    assert (tmp_path / "trace.json").stat().st_size < 20e6
