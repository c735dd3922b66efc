"""The client and the commands against a real vLLM server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from qlm_env.backends.vllm.client import CompletionRequest, VllmClient
from qlm_env.backends.vllm.errors import RequestRefused
from qlm_env.backends.vllm.facts import GENERATED_TOKENS, RUNNING, metric_sum, parse_metrics, read_facts
from qlm_env.fidelity.recorded import read_run
from qlm_env.profiles.load import read_profile
from runners.cli import main

GRID = (
    "prefill_tokens=[8,16,24,32,48,64,96,128]",
    "decode_seqs=[1,2,4]",
    "context_lens=[16,64,128]",
    "repeats=1",
    "force=true",
)
NUMBERS = ("cold_start_s=40", "stage_s=41", "wake_s=1", "sleep_s=1", "kv_swap_bytes_per_s=1e9")


def test_a_completion_and_an_abort(live_url: str) -> None:
    async def use() -> None:
        async with VllmClient(live_url) as client:
            facts = await read_facts(client, None)
            assert (facts.model, facts.max_model_len) == ("tiny", 512)
            assert (facts.engine.max_num_seqs, facts.engine.max_num_batched_tokens) == (4, 128)
            completion = await client.complete("tiny", CompletionRequest([20] * 40, 9))
            assert len(completion.token_ids) == 9
            assert completion.token_received_s == sorted(completion.token_received_s)
            assert completion.timings is not None
            elapsed_s = completion.token_received_s[-1] - completion.sent_s
            assert 0 < completion.timings.prefill_s + completion.timings.decode_s < elapsed_s
            with pytest.raises(RequestRefused, match="maximum context length is 512"):
                await client.complete("tiny", CompletionRequest([20] * 600, 1))
            before = await generated_tokens(client)
            async with client.stream("tiny", CompletionRequest([20] * 40, 400)) as chunks:
                async for _ in chunks:
                    break
            while await metric(client, RUNNING):
                await asyncio.sleep(0.1)
            # vLLM counts no finished request here; that it stopped shows in the tokens.
            assert await generated_tokens(client) - before < 200

    asyncio.run(use())


async def metric(client: VllmClient, name: str) -> float:
    return metric_sum(parse_metrics(await client.get_text("/metrics")), name)


async def generated_tokens(client: VllmClient) -> float:
    return await metric(client, GENERATED_TOKENS)


def test_measure_then_record(live_url: str, tmp_path: Path) -> None:
    measured, recorded = tmp_path / "measured", tmp_path / "recorded"
    names = ("device=CPU", "architecture=tiny")
    assert main(["profile", "measure", f"url={live_url}", f"out={measured}", *names, *GRID, *NUMBERS]) == 0
    profile = read_profile(measured / "cpu_tiny_tp1.yaml")
    assert profile.weight_bytes.value == pytest.approx(2 * 9.8e6, rel=0.05)
    load = [f"profile={measured / 'cpu_tiny_tp1.yaml'}", "workload.arrivals.load=1.0", "workload.num_requests=12"]
    load.append("workload.models.0.context_tokens=512")
    assert main(["profile", "record", f"url={live_url}", f"out={recorded}", *load]) == 0
    run = read_run(recorded)
    assert len(run.requests.arrival_s) == 12
    assert run.engine.settings.max_num_seqs == 4
    assert run.engine.settings.async_scheduling is False
    assert json.loads((recorded / "meta.json").read_text())["vllm_version"]
