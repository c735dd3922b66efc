"""What a server tells about its engine."""

from __future__ import annotations

import asyncio

import pytest

from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.errors import ServerError
from qlm_env.backends.vllm.facts import EngineFacts, EngineLimits, Sample, metric_sum, parse_metrics, read_facts
from tests.backends.vllm.fake_server import FakeServer


def facts_of(server: FakeServer, model: str | None = None, limits: EngineLimits | None = None) -> EngineFacts:
    async def read() -> EngineFacts:
        async with VllmClient(server.url) as client:
            return await read_facts(client, model, limits)

    return asyncio.run(read())


def test_prometheus_text_is_read_line_by_line() -> None:
    samples = parse_metrics(
        '# HELP a b\n# TYPE a gauge\na{x="1,2}",y="say \\"hi\\""} 2.5e-1\na{x="3"} 1\nb 7\n\nno sample here'
    )
    assert samples["a"] == [Sample({"x": "1,2}", "y": 'say \\"hi\\"'}, 0.25), Sample({"x": "3"}, 1.0)]
    assert metric_sum(samples, "a") == 1.25
    assert metric_sum(samples, "b") == 7
    assert metric_sum(samples, "absent") == 0


def test_a_server_in_development_mode_tells_everything() -> None:
    with FakeServer(scheduling_policy="priority") as server:
        facts = facts_of(server)
    assert (facts.model, facts.max_model_len, facts.vllm_version) == ("tiny", 512, "0.32.0")
    assert facts.engine.model_dump() == {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
        "block_size": 16,
        "num_gpu_blocks": 1000,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "async_scheduling": False,
        "scheduling_policy": "priority",
    }


def test_what_the_user_says_goes_before_what_the_server_says() -> None:
    with FakeServer() as server:
        facts = facts_of(server, limits=EngineLimits(max_num_seqs=2, max_num_batched_tokens=64))
    assert (facts.engine.max_num_seqs, facts.engine.max_num_batched_tokens) == (2, 64)


def test_without_development_mode_the_limits_must_be_given() -> None:
    with FakeServer(missing=frozenset({"/server_info"})) as server:
        with pytest.raises(ServerError, match=r"does not tell its max_num_seqs .* give max_num_seqs=\.\.\.$"):
            facts_of(server)
        with pytest.raises(ServerError, match="give max_num_batched_tokens="):
            facts_of(server, limits=EngineLimits(max_num_seqs=2))
        facts = facts_of(server, limits=EngineLimits(max_num_seqs=2, max_num_batched_tokens=64))
    assert facts.engine.num_gpu_blocks == 1000


def test_another_model_is_refused() -> None:
    refused = pytest.raises(ServerError, match=r"^'model': http://\S+ does not serve big; it serves tiny$")
    with FakeServer() as server, refused:
        facts_of(server, "big")


@pytest.mark.parametrize("endpoint", ["/v1/models", "/metrics", "/version"])
def test_a_missing_endpoint_is_named(endpoint: str) -> None:
    with (
        FakeServer(missing=frozenset({endpoint})) as server,
        pytest.raises(ServerError, match=f"{endpoint} answers 404"),
    ):
        facts_of(server)
