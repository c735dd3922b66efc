"""The HTTP client against a stand-in server: what it reads, and one line for everything that goes wrong."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from qlm_env.backends.vllm.client import Completion, CompletionRequest, EngineTimings, VllmClient
from qlm_env.backends.vllm.errors import RequestRefused, ServerError, ServerUnreachable
from qlm_env.spec import ConfigError
from tests.backends.vllm.fake_server import FakeServer

T = TypeVar("T")

PROMPT = CompletionRequest([20, 21, 22], 5)


def run(url: str, use: Callable[[VllmClient], Awaitable[T]], api_key: str | None = None, silence_s: float = 5.0) -> T:
    async def connected() -> T:
        async with VllmClient(url, api_key, silence_s) as client:
            return await use(client)

    return asyncio.run(connected())


def complete(client: VllmClient) -> Awaitable[Completion]:
    return client.complete("tiny", PROMPT)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_completion_brings_every_token_with_its_time() -> None:
    with FakeServer() as server:
        before_s = time.monotonic()
        completion = run(server.url, complete)
    assert completion.token_ids == [0, 1, 2, 3, 4]
    times_s = [before_s, completion.sent_s, *completion.token_received_s, time.monotonic()]
    assert times_s == sorted(times_s)
    assert completion.token_received_s[-1] - completion.token_received_s[0] >= 4 * server.TOKEN_S
    assert completion.cached_prompt_tokens == 0
    assert completion.timings == EngineTimings(queue_s=0.001, prefill_s=0.002, decode_s=0.003)


def test_a_completion_asks_for_exactly_so_many_tokens() -> None:
    with FakeServer() as server:
        run(server.url, complete)
        last = CompletionRequest([20], 1, priority=2, cache_salt="mine")
        run(server.url, lambda client: client.complete("tiny", last))
    first, second = server.bodies
    assert (first["prompt"], first["max_tokens"], first["ignore_eos"], first["stream"]) == ([20, 21, 22], 5, True, True)
    assert "priority" not in first  # which a server that schedules by arrival refuses
    assert "cache_salt" not in first
    assert (second["priority"], second["cache_salt"]) == (2, "mine")


def test_connections_are_used_again() -> None:
    async def three(client: VllmClient) -> None:
        for _ in range(3):
            await complete(client)

    with FakeServer() as server:
        run(server.url, three)
    assert len(server.peers) == 1


def test_leaving_a_stream_aborts_the_request() -> None:
    async def first_token(client: VllmClient) -> None:
        async with client.stream("tiny", CompletionRequest([20], 400)) as chunks:
            async for _ in chunks:
                break
        assert await asyncio.to_thread(server.aborted.wait, 5.0)

    with FakeServer() as server:
        run(server.url, first_token)


def test_cancelling_a_completion_aborts_the_request() -> None:
    async def cancelled(client: VllmClient) -> None:
        started = asyncio.Event()
        request = CompletionRequest([20], 400)
        task = asyncio.create_task(client.complete("tiny", request, lambda _: started.set()))
        await started.wait()
        task.cancel()
        assert await asyncio.to_thread(server.aborted.wait, 5.0)

    with FakeServer() as server:
        run(server.url, cancelled)


def test_nothing_at_the_address_is_one_line() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(ServerUnreachable, match=rf"^nothing answers at {url}: [a-z ]+$"):
        run(url, complete)
    assert run(url, lambda client: client.is_healthy()) is False


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://host:99999", "http://h?x=1"]
)
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^'url': expected an address such as http://127\.0\.0\.1:8000 \(got "):
        VllmClient(url)


def test_a_url_holds_no_secrets() -> None:
    with pytest.raises(ConfigError, match="must not hold a user name or password") as caught:
        VllmClient("http://user:secret@host:1")
    assert "secret" not in str(caught.value)


def test_a_refused_request_tells_the_servers_reason() -> None:
    with FakeServer() as server, pytest.raises(RequestRefused, match="answers 400: This model's maximum") as caught:
        run(server.url, lambda client: client.complete("tiny", CompletionRequest([20] * 600, 1)))
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


def test_a_missing_endpoint_is_named() -> None:
    refused = pytest.raises(RequestRefused, match=r"^http://127\.0\.0\.1:\d+/metrics answers 404: ")
    with FakeServer(missing=frozenset({"/metrics"})) as server, refused:
        run(server.url, lambda client: client.get_text("/metrics"))


def test_calls_without_a_body() -> None:
    with FakeServer() as server:
        assert "sleeping" in run(server.url, lambda client: client.post("/sleep?level=1"))
        assert run(server.url, lambda client: client.get_json("/is_sleeping")) == {"is_sleeping": True}
        with pytest.raises(RequestRefused, match="/nothing answers 404"):
            run(server.url, lambda client: client.post("/nothing"))


def test_a_server_that_dies_in_a_stream_is_told() -> None:
    broken = pytest.raises(ServerUnreachable, match=r"^the connection to http://\S+ broke during a completion")
    with FakeServer(dies_after_tokens=2) as server, broken:
        run(server.url, complete)


def test_a_silent_server_is_given_up() -> None:
    server = FakeServer()
    server.FIRST_TOKEN_S = 5.0  # type: ignore[misc]
    with server, pytest.raises(ServerUnreachable, match=r"did not answer a completion in time$"):
        run(server.url, complete, silence_s=0.05)


def test_another_web_server_is_no_vllm() -> None:
    with FakeServer(garbage=True) as server:
        with pytest.raises(ServerError, match="does not answer with JSON: is this a vLLM server"):
            run(server.url, lambda client: client.get_json("/v1/models"))
        with pytest.raises(ServerError, match="before its last token"):
            run(server.url, complete)


def test_the_api_key_is_sent_and_never_shown() -> None:
    with FakeServer(api_key="s3cret") as server:
        assert len(run(server.url, complete, api_key="s3cret").token_ids) == 5
        for key in (None, "wr0ng"):
            with pytest.raises(RequestRefused, match=r"answers 401: it wants an API key; .* api_key_env") as caught:
                run(server.url, complete, api_key=key)
            assert "wr0ng" not in str(caught.value)
    assert "s3cret" not in repr(VllmClient(server.url, "s3cret"))
