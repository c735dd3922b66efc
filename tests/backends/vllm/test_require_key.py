"""The middleware that keeps a server's development endpoints closed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qlm_env.backends.vllm.server_side.qlm_require_key import KEY_VARIABLE, RequireKey


def statuses(scope: dict[str, Any]) -> list[Any]:
    """What a request gets: 200 from the application behind the middleware, or the middleware's own answer."""
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        sent.append(200)

    async def send(message: Any) -> None:
        sent.append(message.get("status", message["type"]))

    async def receive() -> Any:
        raise AssertionError

    asyncio.run(RequireKey(application)(scope, receive, send))
    return sent


def request(path: str, *keys: bytes) -> dict[str, Any]:
    headers = [(b"Authorization", b"Bearer " + key) for key in keys]
    return {"type": "http", "path": path, "headers": headers}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")


@pytest.mark.parametrize("path", ["/sleep", "/metrics", "/v1/completions", "/healthy", "/health/", "/"])
def test_every_path_wants_the_key(path: str) -> None:
    assert statuses(request(path, b"secret")) == [200]
    for keys in ((), (b"Secret",), (b"",), (b"secre",), (b"secret", b"other")):
        assert statuses(request(path, *keys))[0] == 401


def test_health_is_open() -> None:
    assert statuses(request("/health")) == [200]


def test_without_a_key_nothing_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    assert statuses(request("/metrics", b""))[0] == 401
    assert statuses(request("/health")) == [200]


def test_other_protocols() -> None:
    assert statuses({"type": "lifespan"}) == [200]
    assert statuses({"type": "websocket", "path": "/v1/realtime", "headers": []}) == ["websocket.close"]
