"""Real vLLM runs against profiles of layer times alone.

The bars: mean TTFT within 6 %, TPOT within 3 %, end to end within 4 %, and every p99 within 8 %.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from qlm_env.fidelity import Comparison, compare_runs, read_run, replay
from qlm_env.fidelity.layer_steps import read_layer_steps, replay_by_steps
from qlm_env.profiles import load_profile
from qlm_env.spec import SloSpec
from tests.workload.published_data import published_file

RUNS = {
    "RTX4090": ("vllm_runs/RTX4090/Llama-3.1-8B", "RTX4090/meta-llama/Llama-3.1-8B", "llama-3.1-8b", 1),
    "RTXPRO6000": ("vllm_runs/RTXPRO6000/Qwen3-32B", "RTXPRO6000/Qwen/Qwen3-32B", "qwen3-32b", 2),
}
MEAN_BARS = {"ttft": 0.06, "tpot": 0.03, "e2e": 0.04}
P99_BAR = 0.08


@functools.cache
def fitted(device: str) -> Comparison:
    """With the shipped profile, on the compiled engine."""
    folder, _, architecture, tp = RUNS[device]
    run = read_run(published_file(folder))
    replayed = replay(run, load_profile(device, architecture, tp), ())
    return compare_runs(run.requests, replayed, SloSpec(), (20.0, 60.0))


@functools.cache
def interpolated(device: str) -> Comparison:
    """With every bend of the layer times, on the step-by-step engine."""
    folder, layers, architecture, tp = RUNS[device]
    run, profile = read_run(published_file(folder)), load_profile(device, architecture, tp)
    steps = read_layer_steps(published_file(f"profiles/vllm_layerwise/{layers}/bf16"), profile)
    return compare_runs(run.requests, replay_by_steps(run, profile, steps, ()), SloSpec(), (20.0, 60.0))


@pytest.mark.parametrize("device", list(RUNS))
@pytest.mark.parametrize("replayed", [fitted, interpolated], ids=["fitted", "interpolated"])
def test_means(replayed: Callable[[str], Comparison], device: str) -> None:
    errors = {name: abs(replayed(device).latencies[name].relative_error.mean) for name in MEAN_BARS}
    assert all(errors[name] <= bar for name, bar in MEAN_BARS.items()), errors


@pytest.mark.parametrize("device", list(RUNS))
@pytest.mark.parametrize("replayed", [fitted, interpolated], ids=["fitted", "interpolated"])
def test_tails_and_attainment(replayed: Callable[[str], Comparison], device: str) -> None:
    compared = replayed(device)
    tails = {name: abs(compared.latencies[name].relative_error.p99) for name in MEAN_BARS}
    assert max(tails.values()) <= P99_BAR, tails
    for row in compared.attainment:
        assert abs(row.emulated - row.recorded) <= 0.03, row
