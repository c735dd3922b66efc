"""Middleware for vLLM's API server: every path but ``/health`` wants the API key.

vLLM itself asks for its key below ``/v1`` alone, so that whoever reaches the server could put its model to sleep or end
its requests. The key is that of ``VLLM_API_KEY``; without one nothing is let through. The folder of this file has
to be in ``PYTHONPATH``, and ``--middleware qlm_require_key.RequireKey`` among the server's arguments.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OPEN_PATHS = ("/health",)
KEY_VARIABLE = "VLLM_API_KEY"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RequireKey:
    """An ASGI middleware that answers 401 to what comes without the key."""

    def __init__(self, app: App) -> None:
        self._app = app
        key = os.environ.get(KEY_VARIABLE, "")
        self._expected = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS or self._is_authorised(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _is_authorised(self, scope: Message) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        return self._expected is not None and len(given) == 1 and hmac.compare_digest(given[0], self._expected)
