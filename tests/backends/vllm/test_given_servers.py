"""Servers given by their addresses: what is checked of them, and that they are left alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qlm_env.backends.vllm.errors import ServerError, ServerStartFailed
from qlm_env.backends.vllm.given_servers import Address, GivenServers, Needed, Pair
from qlm_env.backends.vllm.provider import RunningServer
from qlm_env.spec import EngineSpec
from tests.backends.vllm.fake_server import FakeServer
from tests.backends.vllm.test_client import closed_port

ENGINE = EngineSpec(max_num_seqs=4, max_num_batched_tokens=128, block_size=16, num_gpu_blocks=1000)
"""What a FakeServer runs with."""


def start(
    server: FakeServer, engine: EngineSpec = ENGINE, context_tokens: int = 512, models: int = 1, **address: Any
) -> RunningServer:
    """The server of model 0 for instance 0, on which there are ``models``."""
    addresses = {Pair(0, m): Address(server.url, "tiny", **address) for m in range(models)}
    provider = GivenServers(lambda: addresses, lambda _: Needed(engine, context_tokens))
    return asyncio.run(provider.start(0, 0))


def test_a_server_is_used_and_left_running() -> None:
    with FakeServer(api_key="secret") as server:
        given = start(server, models=2, api_key="secret")
        assert (given.url, given.model_name, given.kv_store, given.exit_reason) == (server.url, "tiny", None, None)
        asyncio.run(given.stop(kill=True))
        assert start(server, api_key="secret").url == server.url
        assert [body["max_tokens"] for body in server.bodies] == [1, 1]


def test_a_sleeping_server_is_asked_for_no_token() -> None:
    with FakeServer(asleep=True) as server:
        start(server)
        assert server.bodies == []


def test_addresses_are_looked_up_at_every_start() -> None:
    addresses: dict[Pair, Address | None] = {Pair(1, 0): None}
    provider = GivenServers(lambda: addresses, lambda _: Needed(ENGINE, 512))
    assert not provider.can_stop
    assert not provider.serves(0, 0)
    assert provider.serves(1, 0)
    for instance in (0, 1):
        with pytest.raises(ServerStartFailed, match=f"the server of model 0 for instance {instance} is not up"):
            asyncio.run(provider.start(instance, 0))
    with FakeServer() as server:
        addresses[Pair(0, 0)] = Address(server.url, "tiny")
        assert provider.serves(0, 0)
        assert asyncio.run(provider.start(0, 0)).url == server.url
    asyncio.run(provider.close())


def test_nobody_there_can_be_tried_again() -> None:
    """Whoever runs it may start it again: this is no mistake of the configuration."""
    server = FakeServer(url=f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ServerStartFailed, match=f"^nothing answers at {server.url}: connection refused$"):
        start(server)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("max_num_seqs", 5, "max_num_seqs=4, but the cluster counts on 5; give cluster.engine.max_num_seqs=4"),
        ("num_gpu_blocks", 1001, "num_gpu_blocks=1000, but the cluster counts on 1001"),
        ("block_size", 128, "block_size=16, but the cluster with 128; give cluster.engine.block_size=16"),
        ("max_num_batched_tokens", 256, "max_num_batched_tokens=128, but the cluster with 256"),
    ],
)
def test_other_settings_are_refused(setting: str, value: int, expected: str) -> None:
    with FakeServer() as server, pytest.raises(ServerError, match=expected):
        start(server, ENGINE.model_copy(update={setting: value}))


def test_more_than_is_needed_will_do() -> None:
    with FakeServer() as server:
        start(server, ENGINE.model_copy(update={"max_num_seqs": 2, "num_gpu_blocks": 500}), context_tokens=100)


def test_what_a_server_must_have_is_named() -> None:
    with FakeServer() as server:
        with pytest.raises(ServerError, match="a context of 512 tokens, but its context_tokens is 513"):
            start(server, context_tokens=513)
        with pytest.raises(ServerError, match="api_key_env"), FakeServer(api_key="secret") as closed:
            start(closed)
    with FakeServer(model="other") as server, pytest.raises(ServerError, match="does not serve tiny; it serves other"):
        start(server)


def test_without_development_mode_only_what_shares_an_instance_is_refused() -> None:
    with FakeServer(missing=frozenset({"/is_sleeping", "/server_info"})) as server:
        start(server)
        with pytest.raises(ServerError, match=r"has no /is_sleeping.*VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"):
            start(server, models=2)


def test_an_address_shows_no_key() -> None:
    assert "secret" not in repr(Address("http://h", "tiny", api_key="secret"))
