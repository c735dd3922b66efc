"""Waiting times as distributions, against what happens in the emulator and against plain formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import ndtri

from planners import make_planner
from planners.spec import FcfsSpec
from planners.step_times import StepTimes
from planners.token_posterior import TokenPosterior, TokenPosteriors
from planners.waiting import WaitingTimes, memory_spread, waiting_times
from qlm_env.backends.emulator.latency import step_time_s
from qlm_env.env import QLMEnv
from qlm_env.lso import Balance, SwapModel
from runners.bench_rwt import accuracy, look_at_queue
from runners.config import BenchRwtOptions

ONE_A100: dict[str, Any] = {"instances": [{"device": "A100"}], "engine": {"max_num_seqs": 16}}
ALIKE: dict[str, Any] = {"kind": "uniform", "prompt_min_tokens": 64, "prompt_max_tokens": 64}


def known(mean: float, variance: float = 1.0) -> Any:
    """Posteriors that are sure of one length."""
    return lambda model, slo_class: TokenPosterior(mean, variance, 0.0)


def backlog_env(num_requests: int, output_tokens: int, **workload: Any) -> QLMEnv:
    lengths = {**ALIKE, "output_min_tokens": output_tokens, "output_max_tokens": output_tokens}
    changes = {"num_requests": num_requests, "arrivals": {"kind": "batch"}, "lengths": lengths, **workload}
    return QLMEnv(ONE_A100, {"preset": "w_a", **changes})


def dispatch_until_running(env: QLMEnv) -> None:
    env.reset(seed=0)
    planner = make_planner(FcfsSpec())
    planner.reset(env.view, np.random.default_rng(0))
    while not env.view.instances[0].num_running:
        env.step_plan(planner.act(env.view))


def predict(env: QLMEnv, lengths: Any, **options: Any) -> WaitingTimes:
    instance = env.view.instances[0]
    return waiting_times(env.view, instance, instance.queue, lengths, **options)


def test_step_times_add_up_to_the_emulators() -> None:
    env = backlog_env(1, 10)
    env.reset(seed=0)
    placement = env.view.instances[0].placement(0)
    times = StepTimes(env.scenario.cluster.engine, placement, 1.0)
    record = env.view._world.fleet.placement[0, 0]
    decode = step_time_s(record, 16, 16, 9000, 0.0)
    assert times.decode_s(16, 9000) == pytest.approx(decode)
    mixed = step_time_s(record, 16 + 500, 16, 9000, 500 * 250.0)
    assert times.decode_s(16, 9000) + times.prefill_s(500, 16, 9000) == pytest.approx(mixed)
    twice = StepTimes(env.scenario.cluster.engine, placement, 2.0)
    assert twice.decode_s(16, 9000) == pytest.approx(2 * decode)


def test_requests_all_alike_wait_for_whole_batches() -> None:
    """With 16 places and one length, every 16th request begins another round of so many steps."""
    env = backlog_env(200, 100)
    dispatch_until_running(env)
    waits = predict(env, known(100.0))
    assert len(waits.group) == env.view.instances[0].waiting == 184
    assert np.all(np.diff(waits.mean_s) >= -1e-9)
    env_requests = env.view._world.requests
    rows = np.flatnonzero(env_requests["state"] == 1)
    now_s = env.now_s
    planner = make_planner(FcfsSpec())
    planner.reset(env.view, np.random.default_rng(0))
    while np.isnan(env_requests["first_scheduled_s"][rows]).any():
        env.step_plan(planner.act(env.view))
    actual = np.sort(np.asarray(env_requests["first_scheduled_s"][rows])) - now_s
    assert waits.mean_s == pytest.approx(actual, rel=0.08, abs=0.15)
    # Nothing is left to chance but the steps' rounding.
    assert np.sqrt(waits.variance_s2[-1]) < 0.03 * waits.mean_s[-1]


def test_long_queues_are_predicted_as_the_targets_ask() -> None:
    options = BenchRwtOptions(queues=(200,), histories=(600,), profile_factors=(1.2,))
    looks = [look_at_queue(options, 200, 600, seed) for seed in range(6)]
    exact, off = accuracy(looks, 1.0), accuracy(looks, 1.2)
    assert exact.r2 > 0.95
    assert 0.75 < exact.coverage[1] < 0.99
    assert exact.coverage[0] < exact.coverage[1] < exact.coverage[2]
    assert off.relative_error > 1.5 * exact.relative_error


def test_where_memory_bounds_the_batch_the_intervals_still_hold() -> None:
    """A 7B model on an A10, which preempts all the time."""
    options = BenchRwtOptions(device="A10", queues=(100,), histories=(100,), profile_factors=())
    looks = [look_at_queue(options, 100, 100, seed) for seed in range(40, 44)]
    found = accuracy(looks, 1.0)
    assert found.r2 > 0.7
    assert found.coverage[1] > 0.7


def test_memory_spreads_admissions_as_sampling_says() -> None:
    rng = np.random.default_rng(0)
    lengths = TokenPosterior(300.0, 240.0**2, 0.0)
    output = rng.gamma(lengths.shape, lengths.scale_tokens, 400_000)
    prompt = rng.gamma(0.5, 400.0, 400_000)
    held = output * prompt + output**2 / 2
    expected = (held.var() / held.mean() ** 2) / (output.var() / output.mean() ** 2)
    assert memory_spread(lengths, 200.0, 200.0 * 400.0) == pytest.approx(expected, rel=0.05)
    # Lengths that hardly vary: prompts do.
    assert memory_spread(TokenPosterior(300.0, 1.0, 0.0), 200.0, 1e4) > 100


def test_a_profile_that_is_wrong_by_a_factor_stretches_all_times() -> None:
    env = backlog_env(100, 100)
    dispatch_until_running(env)
    waits, stretched = predict(env, known(100.0, 900.0)), predict(env, known(100.0, 900.0), coefficient_factor=1.2)
    assert stretched.mean_s == pytest.approx(1.2 * waits.mean_s)
    assert stretched.variance_s2 == pytest.approx(1.44 * waits.variance_s2)


def test_what_is_not_known_of_the_mean_does_not_average_out() -> None:
    env = backlog_env(600, 100)
    dispatch_until_running(env)
    unsure = predict(env, lambda model, slo_class: TokenPosterior(100.0, 1e3, 100.0, 100.0))
    relative = np.sqrt(unsure.common_variance_s2) / unsure.mean_s
    # A tenth of the mean, whatever the position; the part that is there already does not wait.
    assert relative[-1] == pytest.approx(0.1, abs=0.02)
    assert relative[200] == pytest.approx(0.1, abs=0.02)
    own = np.sqrt(unsure.own_variance_s2) / unsure.mean_s
    assert own[-1] < 0.7 * own[150]
    # Errors that classes do not share partly cancel.
    apart = predict(env, lambda model, slo_class: TokenPosterior(100.0, 1e3, 100.0, 0.0))
    assert apart.common_variance_s2[-1] == pytest.approx(unsure.common_variance_s2[-1] / 3, rel=0.1)


def test_quantiles_are_normal_and_never_negative() -> None:
    waits = WaitingTimes(
        np.array([3, 3]), np.array([10.0, 0.1]), np.array([3.0, 3.0]), np.array([1.0, 1.0]), np.ones(2), np.full(2, 5.0)
    )
    assert waits.quantile_s(0.9) == pytest.approx([10 + 2 * ndtri(0.9), 0.1 + 2 * ndtri(0.9)])
    assert waits.quantile_s(0.05)[1] == 0.0
    assert waits.completion_quantile_s(0.9)[0] == pytest.approx(11 + 3 * ndtri(0.9))
    assert len(waits.of_group(3).group) == 2
    assert len(waits.of_group(4).group) == 0


def test_another_model_waits_for_the_batch_to_drain_and_for_the_swap() -> None:
    env = QLMEnv(
        {"instances": [{"device": "A100", "initial_model": "vicuna-7b"}], "engine": {"max_num_seqs": 16}},
        {
            "preset": "smoke",
            "num_requests": 60,
            "arrivals": {"kind": "batch"},
            "lengths": {**ALIKE, "output_min_tokens": 200, "output_max_tokens": 200},
        },
    )
    env.reset(seed=0)
    view = env.view
    first = [g for g in view.groups if g.model == 0]
    other = [g for g in view.groups if g.model == 1]
    env.step_plan([Balance(g.id, 0) for g in [*first, *other]])
    requests = view._world.requests
    queue = view.instances[0].queue
    waits = waiting_times(view, view.instances[0], queue, known(200.0))
    now_s = env.now_s
    second = waits.of_group(other[0].id)
    last = [g.id for g in first if g.id in queue][-1]
    swap_s = view.instances[0].swap_s(1)
    assert second.mean_s[0] > waits.of_group(last).mean_s[-1] + swap_s
    info: dict[str, Any] = {}
    rows = np.flatnonzero(requests["group"] == other[0].id)
    while np.isnan(requests["first_scheduled_s"][rows[0]]) and "metrics" not in info:
        head = view.instances[0].queue[:1]
        swap = SwapModel(0, 1)
        wants = bool(head) and view.group(head[0]).model == 1 and view.is_legal(swap)
        info = env.step_plan([swap] if wants else [])[-1]
    assert second.mean_s[0] == pytest.approx(float(requests["first_scheduled_s"][rows[0]]) - now_s, rel=0.05)
    # Asked in the middle of loading, it is what is left of that.
    assert np.all(np.isfinite(second.latency_mean_s))


def test_a_group_whose_model_does_not_fit_waits_for_ever_and_so_does_what_follows() -> None:
    env = QLMEnv(
        {"instances": [{"device": "A10"}, {"device": "A100"}]},
        {"preset": "smoke", "num_requests": 40, "arrivals": {"kind": "batch"}},
    )
    env.reset(seed=0)
    view = env.view
    by_model = [next(g.id for g in view.groups if g.model == m) for m in (0, 1)]
    waits = waiting_times(view, view.instances[0], [by_model[0], by_model[1], by_model[0]], TokenPosteriors(view).of)
    assert np.all(np.isfinite(waits.mean_s[: view.group(by_model[0]).waiting]))
    assert np.all(np.isinf(waits.of_group(by_model[1]).mean_s))
    assert np.isinf(waits.mean_s[-1])
    assert np.all(waits.common_variance_s2 >= 0)


def test_an_empty_queue_and_an_instance_that_is_down() -> None:
    failures = [{"instance": 0, "at_s": 0.0, "duration_s": 100.0}]
    env = QLMEnv({**ONE_A100, "failures": failures}, {"preset": "w_a", "num_requests": 5})
    env.reset(seed=0)
    env.step_plan([])
    with pytest.raises(ValueError, match="instance 0 is down"):
        waiting_times(env.view, env.view.instances[0], [], known(100.0))
    up = backlog_env(5, 10)
    up.reset(seed=0)
    assert len(waiting_times(up.view, up.view.instances[0], [], known(100.0)).group) == 0
