"""Greedy decoding in float32: interruptions do not change what a model says."""

from __future__ import annotations

import asyncio

import pytest

from qlm_env.backends.base import EventKind
from qlm_env.backends.vllm.backend import VllmBackend
from qlm_env.backends.vllm.client import CompletionRequest, VllmClient
from tests.backends.conformance import make_requests
from tests.vllm.observed import evict, wait_for, wait_for_tokens

PROMPT_TOKENS, OUTPUT_TOKENS = 80, 400


def undisturbed(cluster: VllmBackend, prompt: list[int]) -> list[int]:
    """The answer of instance 0's server, asked directly."""
    server = cluster.servers()[0, 0]

    async def ask() -> list[int]:
        async with VllmClient(server.url, server.api_key) as client:
            answer = await client.complete(server.model_name, CompletionRequest(prompt, OUTPUT_TOKENS))
            return answer.token_ids

    return asyncio.run(ask())


@pytest.mark.parametrize("instance", [0, 1])
@pytest.mark.parametrize("keep_kv", [True, False])
def test_an_interrupted_request_says_the_same(cluster: VllmBackend, instance: int, keep_kv: bool) -> None:
    cluster.reset(make_requests((PROMPT_TOKENS, OUTPUT_TOKENS)))
    cluster.pull(instance, 0)
    for more in (30, 20):
        wait_for_tokens(cluster, 0, int(cluster.requests["generated_tokens"][0]) + more)
        evict(cluster, instance, 0, keep_kv)
        cluster.pull(instance, 0)
    wait_for(cluster, EventKind.FINISHED, 0)
    prompt, answer = cluster.transcript(0)
    assert len(prompt) == PROMPT_TOKENS
    expected = undisturbed(cluster, prompt)
    assert len(set(expected[:100])) >= 20, "an answer that goes in a circle shows nothing"
    assert answer == expected
