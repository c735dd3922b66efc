"""The upper bound: never below what a policy reaches, equal to what plain reasoning gives where that is easy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from planners import make_planner
from planners.attainable import SOLVER_TOLERANCE, attainable
from planners.least_work import least_work, token_knots, token_lines
from planners.spec import parse_planner
from qlm_env.cluster import make_placements
from qlm_env.env import QLMEnv
from qlm_env.profiles import load_profile
from qlm_env.requests import make_request_table

ONE_A100: dict[str, Any] = {"instances": [{"device": "A100", "count": 1}], "engine": {"max_num_seqs": 16}}
ONE_MODEL = {"name": "m", "architecture": "llama-2-7b", "context_tokens": 4096}


def one_class_env(target_s: float = 60.0, metric: str = "e2e", cluster: Any = ONE_A100, **engine: Any) -> QLMEnv:
    """One model in one class."""
    cluster = {**cluster, "engine": {**cluster.get("engine", {}), **engine}}
    workload = {
        "kind": "synthetic",
        "models": [ONE_MODEL],
        "mix": [{"model": "m", "slo_class": "only"}],
        "num_requests": 10,
        "arrivals": {"kind": "poisson", "rate_per_s": 1.0},
    }
    slo = {"metric": metric, "classes": [{"name": "only", "target_s": target_s, "weight": 1.0}]}
    return QLMEnv(cluster, workload, slo)


def table(arrival_s: list[float], prompt: int, output: int) -> Any:
    n = len(arrival_s)
    whole = np.ones(n, np.int32)
    return make_request_table(np.array(arrival_s), prompt * whole, output * whole, 0 * whole, 0 * whole)


def attained(env: QLMEnv, planner: str, requests: Any) -> dict[str, Any]:
    _, info = env.start(requests)
    policy = make_planner(parse_planner(planner, {}))
    policy.reset(env.view, np.random.default_rng(0))
    while "metrics" not in info:
        info = env.step_plan(policy.act(env.view))[-1]
    metrics: dict[str, Any] = info["metrics"]
    return metrics


SCENARIOS: dict[str, tuple[Any, Any, Any]] = {
    "one model, overloaded": (
        {"instances": [{"device": "A10", "count": 1}, {"device": "A100", "count": 1}], "engine": {"max_num_seqs": 48}},
        {"preset": "w_a", "num_requests": 300, "arrivals": {"kind": "poisson", "load": 6.0}},
        {"classes": [{"name": n, "target_s": t} for n, t in (("interactive", 8), ("batch-1", 15), ("batch-2", 30))]},
    ),
    "swaps": (
        "smoke",
        {
            "preset": "smoke",
            "models": [
                {"name": "vicuna-7b", "architecture": "llama-2-7b"},
                {"name": "vicuna-13b", "architecture": "llama-2-13b"},
                {"name": "third", "architecture": "llama-2-7b"},
            ],
            "mix": [
                {"model": "vicuna-7b", "slo_class": "interactive", "weight": 1.0},
                {"model": "vicuna-13b", "slo_class": "batch-1", "weight": 2.0},
                {"model": "third", "slo_class": "batch-1", "weight": 1.0},
            ],
            "arrivals": {"kind": "poisson", "load": 3.0},
        },
        None,
    ),
    "weights, noise, a failure": (
        {
            "instances": [{"device": "A100", "count": 2}],
            "engine": {"max_num_seqs": 24},
            "failures": [{"instance": 0, "at_s": 4.0, "duration_s": 20.0}],
        },
        {"preset": "w_a", "num_requests": 300, "service_noise_cv": 0.2, "arrivals": {"kind": "poisson", "load": 4.0}},
        {
            "classes": [
                {"name": "interactive", "target_s": 6, "weight": 3.0},
                {"name": "batch-1", "target_s": 12},
                {"name": "batch-2", "target_s": 24, "weight": 0.5},
            ]
        },
    ),
    "time to first token": (
        {"instances": [{"device": "A10", "count": 1}], "engine": {"max_num_seqs": 128}},
        {
            "preset": "w_a",
            "num_requests": 300,
            "arrivals": {"kind": "batch", "at_s": 0.0},
            "lengths": {"kind": "lognormal", "prompt_mean_tokens": 1500, "output_mean_tokens": 8},
        },
        {
            "metric": "ttft",
            "classes": [{"name": n, "target_s": t} for n, t in (("interactive", 5), ("batch-1", 10), ("batch-2", 20))],
        },
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_planner_beats_the_bound(name: str) -> None:
    cluster, workload, slo = SCENARIOS[name]
    env = QLMEnv(cluster, workload, slo)
    best = 0.0
    for seed in (0, 1):
        env.reset(seed=seed)
        requests = env.view._world.requests.copy()
        bound = attainable(env.scenario, requests)
        for planner in ("fcfs", "edf", "sjf", "shepherd"):
            metrics = attained(env, planner, requests.copy())
            assert metrics["slo_attainment"] <= bound.slo_attainment
            assert metrics["slo_attainment_weighted"] <= bound.slo_attainment_weighted
            best = max(best, metrics["slo_attainment"] / bound.slo_attainment)
    # A bound far above everything would hold as well.
    assert best > 0.25


def test_a_light_load_can_be_served_whole() -> None:
    env = one_class_env()
    assert attainable(env.scenario, table([0.0, 10.0, 20.0], 100, 50)).slo_attainment == 1.0


def test_what_takes_too_long_even_alone_is_missed() -> None:
    env = one_class_env(target_s=5.0)
    alone_s = attained(env, "fcfs", table([0.0], 100, 420))["e2e_p50_s"]
    assert alone_s > 5.0
    bound = attainable(env.scenario, table([0.0, 1.0, 2.0, 3.0], 100, 420))
    assert bound.slo_attainment == 0.0
    mixed = table([0.0, 1.0, 2.0, 3.0], 100, 420)
    mixed["output_tokens"][2] = 10
    assert attainable(env.scenario, mixed).slo_attainment == pytest.approx(0.25, abs=2 * SOLVER_TOLERANCE)


def test_what_can_never_run_is_missed() -> None:
    env = one_class_env()
    assert attainable(env.scenario, table([0.0, 1.0], 5000, 10)).slo_attainment == 0.0


@pytest.mark.parametrize("metric", ["e2e", "ttft"])
def test_a_backlog_is_served_as_far_as_time_goes(metric: str) -> None:
    """All arrive at once with one deadline: the bound is the time over the work of one."""
    target_s, prompt, output, count = 4.0, 1000, 4, 200
    env = one_class_env(target_s, metric)
    profile = load_profile("A100", "llama-2-7b", 1).step_time
    # A step of 2,048 tokens, at the slope beyond n0; the line through it meets n = 0 at `fixed_s`.
    fixed_s = profile.c0_s - (profile.c2_s_per_token - profile.c1_s_per_token) * profile.n0_tokens
    decodes = output - 1 if metric == "e2e" else 0
    kv_s = profile.c3_s_per_kv_token * (decodes * prompt + decodes * (decodes - 1) / 2)
    own_s = profile.c4_s_per_token2 * prompt**2 / 2 + decodes * profile.c5_s_per_sequence + kv_s
    flat = profile.c0_s * (decodes + 1) / 16 + profile.c1_s_per_token * (prompt + decodes)
    by_slot = fixed_s * (decodes + 1) / 16 + profile.c2_s_per_token * (prompt + decodes)
    by_token = (fixed_s / 2048 + profile.c2_s_per_token) * (prompt + decodes)
    work_s = max(flat, by_slot, by_token) + own_s
    bound = attainable(env.scenario, table([0.0] * count, prompt, output)).slo_attainment
    assert bound == pytest.approx(target_s / work_s / count, rel=1e-3)
    best = attained(env, "edf", table([0.0] * count, prompt, output))["slo_attainment"]
    assert 0.8 * bound < best <= bound


def test_little_kv_memory_bounds_the_batch() -> None:
    target_s, prompt, output, count = 20.0, 1000, 200, 60
    env = one_class_env(target_s, num_gpu_blocks=260)
    profile = load_profile("A100", "llama-2-7b", 1).step_time
    decodes = output - 1
    held = prompt + decodes * prompt + decodes * (decodes + 1) / 2
    kv_s = profile.c3_s_per_kv_token * (decodes * prompt + decodes * (decodes - 1) / 2)
    own_s = profile.c4_s_per_token2 * prompt**2 / 2 + decodes * profile.c5_s_per_sequence + kv_s
    # In a batch of three, what is fixed in a step outweighs its tokens, so the flatter line counts.
    work_s = profile.c0_s * held / (259 * 16) + profile.c1_s_per_token * (prompt + decodes) + own_s
    bound = attainable(env.scenario, table([0.0] * count, prompt, output)).slo_attainment
    assert bound == pytest.approx(target_s / work_s / count, rel=1e-3)
    assert attained(env, "edf", table([0.0] * count, prompt, output))["slo_attainment"] <= bound


def most_by_brute_force(arrival_s: Any, deadline_s: Any, work_s: Any) -> int:
    """The largest set of jobs that one machine can do by their deadlines, with preemption.

    That is possible if and only if no span of time from an arrival to a deadline holds more work than time.
    """
    jobs = range(len(arrival_s))
    for size in range(len(jobs), 0, -1):
        for chosen in itertools.combinations(jobs, size):
            spans = [(arrival_s[i], deadline_s[j]) for i in chosen for j in chosen if arrival_s[i] < deadline_s[j]]
            if all(
                sum(work_s[r] for r in chosen if start_s <= arrival_s[r] and deadline_s[r] <= end_s) <= end_s - start_s
                for start_s, end_s in spans
            ):
                return size
    return 0


@pytest.mark.parametrize("seed", range(12))
def test_it_is_above_the_best_schedule_of_a_few_requests(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    count, target_s = 9, 0.8
    env = one_class_env(target_s, "ttft")
    requests = table(sorted(rng.uniform(0.0, 1.5, count)), 100, 2)
    requests["prompt_tokens"] = rng.integers(1000, 4000, count)
    work_s = least_work(env.scenario, requests).work_s[0]
    arrival_s = requests["arrival_s"]
    brute = most_by_brute_force(arrival_s, arrival_s + target_s, work_s) / count
    coarse = attainable(env.scenario, requests).slo_attainment
    monkeypatch.setattr("planners.attainable.CELLS", 500)
    monkeypatch.setattr("planners.attainable.CELLS_PER_TARGET", 300)
    monkeypatch.setattr("planners.attainable.BUCKETS_PER_TARGET", 300)
    fine = attainable(env.scenario, requests).slo_attainment
    assert brute <= fine <= coarse + 2 * SOLVER_TOLERANCE
    # Requests may count in part, one at each end of a busy time.
    assert fine <= brute + 2.0 / count


def test_instances_count_while_they_are_up() -> None:
    """Two instances serve twice as much, and one that is down for half of the time three quarters of that."""

    def bound(count: int, failures: list[dict[str, Any]]) -> float:
        cluster = {"instances": [{"device": "A100", "count": count}], "failures": failures}
        env = one_class_env(4.0, cluster=cluster, max_num_seqs=16)
        return attainable(env.scenario, table([0.0] * 400, 1000, 4)).slo_attainment

    one, two = bound(1, []), bound(2, [])
    assert two == pytest.approx(2 * one, rel=1e-3)
    assert bound(2, [{"instance": 1, "at_s": 2.0, "duration_s": 60.0}]) == pytest.approx(1.5 * one, rel=1e-3)


def test_a_model_that_has_to_be_loaded_first_serves_nobody_before() -> None:
    env = QLMEnv(
        {"instances": [{"device": "A100", "count": 1, "initial_model": "a"}]},
        {
            "kind": "synthetic",
            "models": [{"name": n, "architecture": "llama-2-7b"} for n in ("a", "b")],
            "mix": [{"model": n, "slo_class": "batch-1"} for n in ("a", "b")],
            "arrivals": {"kind": "poisson", "rate_per_s": 1.0},
        },
        {"classes": [{"name": "batch-1", "target_s": 20.0}]},
    )
    requests = table([0.0, 1.0, 60.0, 61.0], 100, 20)
    requests["model"] = [0, 1, 0, 1]
    assert attainable(env.scenario, requests).slo_attainment == pytest.approx(0.75, abs=2 * SOLVER_TOLERANCE)


def test_coarser_cells_and_bundles_only_raise_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, workload, slo = SCENARIOS["one model, overloaded"]
    env = QLMEnv(cluster, workload, slo)
    env.reset(seed=0)
    requests = env.view._world.requests
    bounds = []
    for cells, ratios in ((8, 1), (32, 1), (400, 6)):
        monkeypatch.setattr("planners.attainable.CELLS", cells)
        monkeypatch.setattr("planners.attainable.CELLS_PER_TARGET", cells)
        monkeypatch.setattr("planners.attainable.BUCKETS_PER_TARGET", cells)
        monkeypatch.setattr("planners.attainable.RATIO_CLASSES", ratios)
        bounds.append(attainable(env.scenario, requests).slo_attainment)
    assert bounds[0] >= bounds[1] - 1e-3 >= bounds[2] - 2e-3
    assert bounds[0] - bounds[2] < 0.2


@pytest.mark.parametrize("seed", range(20))
def test_token_lines_stay_below_the_curve(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([[0.0], np.cumsum(rng.uniform(1, 500, rng.integers(1, 6)))])
    seconds = rng.uniform(0.001, 0.01) + np.concatenate([[0.0], np.cumsum(rng.uniform(0, 0.1, len(tokens) - 1))])
    lines = token_lines(tokens, seconds)
    n = np.linspace(0, tokens[-1], 500)
    curve = np.interp(n, tokens, seconds)
    assert lines
    for line in lines:
        assert line.fixed_s >= 0
        assert (line.fixed_s + line.token_s * n <= curve + 1e-12).all()
    # The first line touches the curve at 0.
    assert lines[0].fixed_s == pytest.approx(seconds[0])


def test_work_of_kinds_that_are_alike_is_not_reduced_for_splitting() -> None:
    def work(instances: list[dict[str, Any]]) -> Any:
        env = one_class_env(cluster={"instances": instances}, max_num_seqs=16)
        return least_work(env.scenario, table([0.0, 1.0], 200, 300)).work_s

    alone = work([{"device": "A100", "count": 1}])
    twice = work([{"device": "A100", "count": 1}, {"device": "A100", "count": 2}])
    mixed = work([{"device": "A100", "count": 1}, {"device": "A10", "count": 1}])
    assert np.allclose(twice, alone[0])
    # Some of the request may be done where that is cheaper than the rest of it.
    assert (mixed[0] < alone[0]).all()
    assert (mixed[0] > 0.8 * alone[0]).all()
    assert (mixed[1] > mixed[0]).all()


def test_prompts_that_may_be_cached_are_not_charged() -> None:
    requests = table([0.0, 1.0], 500, 20)
    computed = least_work(one_class_env().scenario, requests)
    cached = least_work(one_class_env(enable_prefix_caching=True).scenario, requests)
    # What is left is a share of each of twenty steps.
    fixed_s = load_profile("A100", "llama-2-7b", 1).step_time.c0_s * 20 / 16
    assert (cached.work_s >= fixed_s).all()
    assert (cached.work_s < 1.2 * fixed_s).all()
    assert (cached.work_s < 0.5 * computed.work_s).all()
    assert (cached.latency_s < computed.latency_s).all()


def test_the_token_part_of_a_step_is_that_of_the_formula() -> None:
    env = one_class_env()
    placement = make_placements(env.scenario.cluster, env.scenario.workload.models).view(np.ndarray)[0, 0]
    tokens, seconds = token_knots(placement, 2048)
    assert tokens[0] == 0.0
    assert tokens[-1] == 2048.0
    for n in (1, 50, 96, 97, 2000):
        expected = placement["c0"] + placement["c1"] * min(n, 96) + placement["c2"] * max(0, n - 96)
        assert np.interp(n, tokens, seconds) == pytest.approx(expected)
