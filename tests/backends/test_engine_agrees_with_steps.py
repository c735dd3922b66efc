"""The compiled, leaping engine against the step-by-step oracle, on random workloads and settings."""

from __future__ import annotations

import numpy as np
import pytest

from qlm_env.backends.emulator.reference import StepEngine, StepRequest, serve_by_steps
from qlm_env.backends.emulator.serve import serve
from qlm_env.backends.emulator.state import FCFS, PLACEMENT_DTYPE, PRIORITY, Fleet, make_fleet, size_prefix_cache
from qlm_env.prefixes import PromptPrefixes
from qlm_env.profiles.token_curve import MAX_KNOTS
from qlm_env.requests import FINISHED, RequestTable, make_request_table

CASES = 2000
CHUNKS = 20
COEFFICIENT_NAMES = ("c0", "c1", "n0", "c2", "c3", "c4", "c5", "c6")


def random_knots(rng: np.random.Generator) -> list[tuple[float, float]]:
    """A curve over new tokens with treads and steps, as GEMM tiles make them."""
    count = int(rng.choice([2, 3, 10, MAX_KNOTS]))
    tokens = 1 + np.cumsum(rng.integers(1, 40, count))
    seconds = 5e-3 + np.cumsum(rng.choice([0.0, 1e-5, 2e-3], count))
    return list(zip(tokens.tolist(), seconds.tolist(), strict=True))


def random_engines(rng: np.random.Generator) -> tuple[Fleet, StepEngine, int]:
    """The same engine twice, and the longest request it can hold."""
    block_size = int(rng.choice([1, 4, 16, 32]))
    max_num_seqs = int(rng.choice([1, 2, 5, 16, 64]))
    budget = max_num_seqs + int(rng.choice([1, 7, 60, 500, 4000]))
    chunked = bool(rng.random() < 0.8)
    priority = bool(rng.random() < 0.4)
    async_scheduling = bool(rng.random() < 0.5)
    prefix_caching = bool(rng.random() < 0.5)
    longest = int(rng.integers(20, 400))
    if not chunked:
        longest = min(longest, budget)
    # From blocks for one request, where nearly every step preempts, to blocks for all.
    num_blocks = -(-longest // block_size) + int(rng.choice([0, 2, 20, 4000]))
    coefficients = (
        float(rng.uniform(1e-3, 2e-2)),
        float(rng.uniform(0, 1e-4)),
        float(rng.choice([0, 64, 512])),
        float(rng.uniform(0, 2e-4)),
        float(rng.choice([0.0, rng.uniform(0, 1e-6)])),
        float(rng.uniform(0, 1e-7)),
        float(rng.uniform(0, 1e-4)),
        float(rng.choice([0.0, rng.uniform(0, 1e-6)])),
    )
    placement = np.zeros((1, 1), PLACEMENT_DTYPE).view(np.recarray)
    for name, value in zip(COEFFICIENT_NAMES, coefficients, strict=True):
        placement[name] = value
    knots = random_knots(rng) if rng.random() < 0.3 else []
    chunk_s = 3e-3 if knots and rng.random() < 0.5 else 0.0
    placement["num_knots"], placement["chunk_s"] = len(knots), chunk_s
    for index, (tokens, seconds) in enumerate(knots):
        placement["knot_tokens"][0, 0, index] = tokens
        placement["knot_s"][0, 0, index] = seconds
    placement["num_blocks"] = num_blocks
    fleet = make_fleet(
        placement,
        host_memory_bytes=np.zeros(1),
        host_kv_bytes=np.zeros(1),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
        chunked_prefill=chunked,
        scheduling_policy=PRIORITY if priority else FCFS,
        async_scheduling=async_scheduling,
        prefix_caching=prefix_caching,
    )
    fleet.engine["active_model"] = 0
    fleet.engine["free_blocks"] = num_blocks
    oracle = StepEngine(
        coefficients,
        num_blocks,
        max_num_seqs,
        budget,
        block_size,
        chunked,
        priority,
        async_scheduling,
        prefix_caching,
        knots,
        chunk_s,
    )
    return fleet, oracle, longest


def random_requests(rng: np.random.Generator, longest: int) -> tuple[RequestTable, list[StepRequest]]:
    n = int(rng.integers(1, 40))
    arrival_s = np.cumsum(rng.exponential(float(rng.choice([0.0, 0.01, 0.2, 2.0])), n))
    total = rng.integers(2, longest + 1, n)
    output = np.maximum(1, (total * rng.beta(0.8, 1.5, n)).astype(int))
    prompt = np.maximum(1, total - output)
    slo_class = rng.integers(0, 3, n)
    factor = rng.lognormal(0, 0.3, n) if rng.random() < 0.3 else np.ones(n)
    table = make_request_table(arrival_s, prompt, output, np.zeros(n, int), slo_class, factor)
    requests = [
        StepRequest(r, arrival_s[r], int(prompt[r]), int(output[r]), int(slo_class[r]), float(factor[r]))
        for r in range(n)
    ]
    return table, requests


def random_prefixes(rng: np.random.Generator, requests: list[StepRequest], block_size: int) -> PromptPrefixes:
    """Prompts that begin alike: each continues one of a few conversations up to some turn."""
    blocks_per_id = int(rng.choice([1, 2, 4]))
    id_tokens = blocks_per_id * block_size
    ids: list[list[int]] = []
    for request in requests:
        talk = int(rng.integers(0, 3))
        length = int(rng.integers(0, -(-request.prompt // id_tokens) + 1))
        ids.append([1000 * talk + index for index in range(length)])
        request.prefix = tuple(
            ids[-1][block // blocks_per_id] * blocks_per_id + block % blocks_per_id
            for block in range(min(length * blocks_per_id, request.prompt // block_size))
        )
    first = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    return PromptPrefixes(first, np.array([i for row in ids for i in row], np.int64), id_tokens)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_engine_agrees_with_step_by_step_oracle(chunk: int) -> None:
    for case in range(chunk * CASES // CHUNKS, (chunk + 1) * CASES // CHUNKS):
        rng = np.random.default_rng(case)
        fleet, oracle, longest = random_engines(rng)
        table, requests = random_requests(rng, longest)
        fleet = size_prefix_cache(fleet, table, random_prefixes(rng, requests, oracle.block_size))
        serve(fleet, table, 0, np.inf)
        serve_by_steps(oracle, requests)

        assert np.all(table.state == FINISHED), case
        for name in ("first_token_s", "finish_s"):
            expected = [getattr(request, name) for request in requests]
            np.testing.assert_allclose(table[name], expected, rtol=1e-9, atol=1e-12, err_msg=f"{case} {name}")
        np.testing.assert_allclose(
            table.first_scheduled_s, [r.scheduled_s for r in requests], rtol=1e-9, atol=1e-12, err_msg=str(case)
        )
        assert table.preemptions.tolist() == [r.preemptions for r in requests], case
        assert table.recomputed_tokens.tolist() == [r.recomputed for r in requests], case
        engine = fleet.engine[0]
        assert engine.tick == oracle.steps, case
        assert engine.free_blocks == oracle.num_blocks, case
        assert engine.preemptions == len(oracle.preemption_log), case
        assert (engine.num_running, engine.decodes, engine.decode_kv_tokens, engine.queue_length) == (0, 0, 0, 0)
        assert not fleet.block_phase.any(), case


def test_cases_cover_preemption_and_chunking() -> None:
    """The random cases reach the branches they are there for."""
    preempted = chunked = shifted = 0
    for case in range(0, CASES, 10):
        rng = np.random.default_rng(case)
        fleet, oracle, longest = random_engines(rng)
        table, requests = random_requests(rng, longest)
        fleet = size_prefix_cache(fleet, table, random_prefixes(rng, requests, oracle.block_size))
        serve(fleet, table, 0, np.inf)
        preempted += bool(fleet.engine[0].preemptions)
        shifted += bool(fleet.engine[0].preemptions and oracle.priority)
        chunked += bool((table.prompt_tokens > oracle.max_num_batched_tokens).any())
    assert preempted > 20
    assert shifted > 5
    assert chunked > 10
