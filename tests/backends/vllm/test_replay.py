"""A workload sent to a stand-in server."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.errors import ServerError, ServerUnreachable
from qlm_env.backends.vllm.facts import read_facts
from qlm_env.backends.vllm.replay import Replay, replay
from qlm_env.requests import RequestTable, make_request_table
from tests.backends.vllm.fake_server import FakeServer


def table(arrival_s: list[float], output_tokens: int = 4, prompt_tokens: int = 10) -> RequestTable:
    n = len(arrival_s)
    return make_request_table(
        np.array(arrival_s),
        np.full(n, prompt_tokens) + np.arange(n),
        np.full(n, output_tokens),
        np.zeros(n, np.int64),
        np.arange(n) % 3,
    )


def replayed(server: FakeServer, requests: RequestTable, tick_s: float = 0.05) -> Replay:
    async def run() -> Replay:
        async with VllmClient(server.url) as client:
            facts = await read_facts(client, None)
            return await replay(client, facts, requests, np.random.default_rng(0), tick_s, answered.append)

    answered: list[str] = []
    result = asyncio.run(run())
    assert len(answered) == len(requests)
    return result


def test_requests_are_sent_at_their_arrival_times_whatever_the_servers_pace() -> None:
    server = FakeServer()
    server.TOKEN_S = 0.1  # type: ignore[misc]  # an answer takes longer than all arrivals
    arrival_s = [0.0, 0.05, 0.05, 0.15]
    with server:
        result = replayed(server, table(arrival_s))
    sent_s = [completion.sent_s - result.start_s for completion in result.completions]
    for sent, arrival in zip(sent_s, arrival_s, strict=True):
        assert 0 <= sent - arrival <= result.latest_send_s
    assert result.completions[0].token_received_s[-1] - result.start_s > arrival_s[-1]


def test_every_request_gets_its_own_answer() -> None:
    with FakeServer() as server:
        result = replayed(server, table([0.0, 0.01, 0.02], output_tokens=7))
    assert [len(completion.token_ids) for completion in result.completions] == [7, 7, 7]
    assert sorted(len(body["prompt"]) for body in server.bodies) == [10, 11, 12]
    prompts = {tuple(body["prompt"][:5]) for body in server.bodies}
    assert len(prompts) == 3


@pytest.mark.parametrize(("policy", "priorities"), [("fcfs", [0, 0, 0]), ("priority", [0, 1, 2])])
def test_the_slo_class_is_the_priority_of_a_server_that_schedules_by_it(policy: str, priorities: list[int]) -> None:
    with FakeServer(scheduling_policy=policy) as server:
        replayed(server, table([0.0, 0.01, 0.02]))
    assert [
        body.get("priority", 0) for body in sorted(server.bodies, key=lambda body: len(body["prompt"]))
    ] == priorities


def test_the_engine_is_watched() -> None:
    with FakeServer() as server:
        result = replayed(server, table([0.0, 0.2]))
    times_s = [tick.t_s for tick in result.ticks]
    assert times_s == sorted(times_s)
    assert len(times_s) > 4
    assert (result.ticks[0].running, result.ticks[0].waiting, result.ticks[0].kv_usage) == (3.0, 2.0, 0.25)
    assert result.ticks[-1].generated_tokens == 8


def test_a_request_longer_than_the_context_is_found_before_anything_is_sent() -> None:
    too_long = pytest.raises(
        ServerError,
        match=r"^request 1 has 500 prompt and 13 output tokens, more than the context of 512 .*context_tokens=512 cuts",
    )
    with FakeServer() as server, too_long:
        replayed(server, table([0.0, 0.0], output_tokens=13, prompt_tokens=499))
    assert not server.bodies


def test_a_server_that_dies_ends_the_replay() -> None:
    with FakeServer(dies_after_tokens=5) as server, pytest.raises(ServerUnreachable):
        replayed(server, table([0.0, 0.01, 30.0]))
