"""Runs of the step-by-step reference, replayed: the two engines serve every request at the same times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlm_env.fidelity import read_run, replay
from qlm_env.fidelity.errors import emulated_latencies_s, recorded_latencies_s
from qlm_env.fidelity.replay import sample_counts
from qlm_env.spec import ConfigError, EngineSpec
from tests.fidelity_runs.runs import META, ROW, random_requests, run_by_steps, write_run
from tests.profiles.toy import toy_profile

CLASSES = ("urgent", "patient")

ENGINES = {
    "ample": EngineSpec(max_num_seqs=16, max_num_batched_tokens=256, num_gpu_blocks=1000),
    "scarce": EngineSpec(max_num_seqs=32, max_num_batched_tokens=128, num_gpu_blocks=60),
    "async": EngineSpec(max_num_seqs=16, max_num_batched_tokens=256, num_gpu_blocks=1000, async_scheduling=True),
    "async, scarce, cached": EngineSpec(
        max_num_seqs=32,
        max_num_batched_tokens=128,
        num_gpu_blocks=60,
        async_scheduling=True,
        enable_prefix_caching=True,
    ),
    "priority": EngineSpec(max_num_seqs=8, max_num_batched_tokens=128, num_gpu_blocks=60, scheduling_policy="priority"),
    "whole prompts": EngineSpec(
        max_num_seqs=16, max_num_batched_tokens=512, num_gpu_blocks=1000, enable_chunked_prefill=False
    ),
}


@pytest.mark.parametrize("name", list(ENGINES))
def test_a_replay_of_the_reference_has_no_error(name: str, tmp_path: Path) -> None:
    requests = random_requests(np.random.default_rng(3), 80, CLASSES)
    profile = toy_profile()
    run = read_run(run_by_steps(tmp_path, profile, ENGINES[name], requests, CLASSES))
    assert run.engine.settings == ENGINES[name]
    replayed = replay(run, profile, CLASSES)
    recorded, emulated = recorded_latencies_s(run.requests), emulated_latencies_s(run.requests, replayed)
    for latency in recorded:
        # Clock readings of 1.7e9 s hold a quarter of a microsecond.
        np.testing.assert_allclose(emulated[latency], recorded[latency], atol=1e-5, err_msg=latency)
    assert replayed.preemptions == sum(request.preemptions for request in requests)
    assert (replayed.preemptions > 0) == (name in ("scarce", "async, scarce, cached", "priority"))


def test_other_step_times_show_as_an_error(tmp_path: Path) -> None:
    requests = random_requests(np.random.default_rng(3), 80, CLASSES)
    run = read_run(run_by_steps(tmp_path, toy_profile(), ENGINES["ample"], requests, CLASSES))
    slower = replay(run, toy_profile(c0_s=0.011), CLASSES)
    error_s = slower.last_token_s - run.requests.last_token_s
    # A tenth more for about every step; single requests may gain from the other batches that follow.
    assert error_s.mean() > 0.05
    assert (error_s > 0).mean() > 0.9


def test_counts_over_time_are_those_of_the_requests(tmp_path: Path) -> None:
    requests = random_requests(np.random.default_rng(3), 80, CLASSES)
    profile = toy_profile()
    run = read_run(run_by_steps(tmp_path, profile, ENGINES["ample"], requests, CLASSES))
    replayed = replay(run, profile, CLASSES)
    counts = sample_counts(run, profile, CLASSES, 40)
    # Between two events; nothing is preempted, so a request runs from its scheduling to its end.
    for time_s, running, waiting in zip(*counts, strict=True):
        in_batch = (replayed.scheduled_s <= time_s) & (replayed.last_token_s > time_s)
        assert running == in_batch.sum()
        assert waiting == (run.requests.arrival_s <= time_s).sum() - (replayed.scheduled_s <= time_s).sum()
    assert counts.waiting.max() > 0


def test_the_profile_gives_the_blocks_that_the_run_does_not_tell(tmp_path: Path) -> None:
    meta = META | {"kv_cache": {}}
    run = read_run(write_run(tmp_path, [ROW | {"input_toks": 200}], meta))
    assert replay(run, toy_profile(num_gpu_blocks=14), CLASSES).preemptions == 0
    with pytest.raises(ConfigError, match=r"line 1: 200 prompt and 5 output tokens are more than the 192 tokens of KV"):
        replay(run, toy_profile(num_gpu_blocks=13), CLASSES)


def test_a_class_that_is_not_known_is_named(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, [ROW | {"slo_class": "golden"}]))
    with pytest.raises(ConfigError, match="line 1, field 'slo_class': 'golden' is no SLO class; allowed: urgent, pati"):
        replay(run, toy_profile(), CLASSES)


def test_an_input_that_is_never_admitted_is_named(tmp_path: Path) -> None:
    meta = META | {"resolved_config": {"scheduler_config": {"enable_chunked_prefill": False}}}
    run = read_run(write_run(tmp_path, [ROW], meta))
    with pytest.raises(ConfigError, match="line 1: an input of 100 tokens is never admitted without chunked prefill"):
        replay(run, toy_profile(), CLASSES)
