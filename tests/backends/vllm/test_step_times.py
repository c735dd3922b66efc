"""Step times measured on an engine with a virtual clock, whose every step takes a known time."""

from __future__ import annotations

import asyncio
from typing import cast

import numpy as np
import pytest

from qlm_env.backends.vllm.client import CompletionRequest, VllmClient
from qlm_env.backends.vllm.errors import ServerError
from qlm_env.backends.vllm.step_grid import StepGrid, StepPoint, default_grid
from qlm_env.backends.vllm.step_times import DecodeBatch, Measurement, StepMeter, measure_steps
from tests.backends.vllm.virtual_engine import VirtualEngine, make_facts

OVERHEAD_S = 0.007
FACTS = make_facts()
GRID = StepGrid((16, 64, 200), (0, 512), (1, 3, 8), (32, 400), decode_steps=8)


def step_s(prefill: list[tuple[int, int]], decodes: list[int]) -> float:
    """A step's duration in the form of a profile."""
    tokens = sum(chunk for chunk, _ in prefill) + len(decodes)
    attention = sum(chunk * (cached + chunk / 2) for chunk, cached in prefill)
    return 0.005 + 1e-4 * tokens + 1e-6 * sum(decodes) + 1e-8 * attention


def measured(repeats: int = 1, caches_prefixes: bool = True) -> Measurement:
    async def run() -> Measurement:
        engine = VirtualEngine(FACTS, step_s, OVERHEAD_S, caches_prefixes)
        meter = StepMeter(cast(VllmClient, engine), FACTS, np.random.default_rng(0))
        return await measure_steps(meter, GRID, repeats, parts.append)

    parts: list[str] = []
    measurement = asyncio.run(run())
    assert len(parts) == repeats * GRID.num_parts(FACTS)
    return measurement


@pytest.fixture(scope="module")
def measurement() -> Measurement:
    return measured(repeats=2)


def test_every_step_of_the_grid_is_measured_once_per_repeat(measurement: Measurement) -> None:
    kinds = [point.kind for point in measurement.steps]
    assert kinds.count("prefill") == 6
    assert kinds.count("decode") == 6
    assert kinds.count("mixed") == 2 * 2 * 2  # beside two batches at two contexts: 16 tokens, and what fills the step
    assert {len(samples) for samples in measurement.steps.values()} == {2}


def test_steps_take_what_the_engine_took(measurement: Measurement) -> None:
    for point, samples in measurement.steps.items():
        for sample in samples:
            decodes = [sample.context_len] * point.decode_seqs
            prefill = [(point.prefill_tokens, point.prefix)] if point.prefill_tokens else []
            expected_s = step_s(prefill, cast(list[int], decodes))
            if point.kind == "prefill":
                # The overhead is read off a decode of 32 tokens in the place of a prompt of one.
                expected_s += 8 * 1e-6 * 4
            assert sample.latency_s == pytest.approx(expected_s, abs=5e-5), point


def test_the_front_ends_overhead_is_told_apart(measurement: Measurement) -> None:
    assert measurement.overhead_s == pytest.approx(OVERHEAD_S, abs=5e-5)


def test_context_is_what_was_cached_before_the_step(measurement: Measurement) -> None:
    for point, samples in measurement.steps.items():
        for sample in samples:
            if point.decode_seqs:
                assert point.context_len < sample.context_len < point.context_len + 64
    # One sequence: prompt, then 1 + 2 tokens while settling, then the mean of 8 steps.
    alone = measurement.steps[StepPoint("decode", 0, 0, 1, 32)][0]
    assert alone.context_len == 32 + 2 + 3.5


def test_a_server_without_a_prefix_cache_gives_the_same_decodes() -> None:
    with_cache, without = measured(), measured(caches_prefixes=False)
    for point in with_cache.steps:
        if point.kind == "decode":
            expected_s, got_s = (m.steps[point][0].latency_s for m in (with_cache, without))
            assert got_s == pytest.approx(expected_s, abs=5e-5)


def test_a_stream_that_ends_too_early_is_told() -> None:
    async def run() -> None:
        engine = cast(VllmClient, VirtualEngine(FACTS, step_s))
        async with DecodeBatch(engine, "tiny", [CompletionRequest([20], 100), CompletionRequest([20], 3)]) as batch:
            await batch.more_tokens(10)

    with pytest.raises(ServerError, match="ended a completion before max_tokens"):
        asyncio.run(run())


def test_the_default_grid_runs_within_the_context() -> None:
    facts = make_facts(max_model_len=400)

    async def run() -> Measurement:
        engine = VirtualEngine(facts, step_s, OVERHEAD_S)  # asserts that no request is longer
        meter = StepMeter(cast(VllmClient, engine), facts, np.random.default_rng(0))
        return await measure_steps(meter, default_grid(facts), 1, lambda _: None)

    assert len(asyncio.run(run()).steps) > 20
