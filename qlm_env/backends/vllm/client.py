"""Asynchronous HTTP client of one vLLM server: streamed completions with a time stamp for every token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from qlm_env.backends.vllm.errors import RequestRefused, ServerError, ServerUnreachable

CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 3.0
"""Idle connections are dropped before vLLM does so itself, 5 s after their last use by default."""

MAX_LINE_BYTES = 1 << 24
"""Longest line of a stream; the first one repeats the prompt's token ids."""

_ERROR_TEXT_LIMIT = 300


class CompletionRequest(NamedTuple):
    """One prompt and how far to answer it. Generation always runs to ``max_tokens``, whatever is generated."""

    prompt_token_ids: Sequence[int]
    max_tokens: int
    priority: int = 0
    """Smaller is served earlier, by a server that schedules by priority."""
    cache_salt: str | None = None
    """KV that the prefix cache has from requests of another salt is not found."""


class TokenChunk(NamedTuple):
    """What one message of a stream brought."""

    received_s: float
    """``time.monotonic()`` of its arrival."""
    token_ids: tuple[int, ...]


class EngineTimings(NamedTuple):
    """A request's times by the engine's own clock, in seconds; ``vllm serve --enable-per-request-metrics``."""

    queue_s: float
    """From the engine's queue into the batch."""
    prefill_s: float
    """From the first time in the batch to the first token."""
    decode_s: float
    """From the first token to the last."""


@dataclass
class Completion:
    """An answer, as far as it has arrived."""

    sent_s: float
    """``time.monotonic()`` when the request was handed to its connection."""
    token_ids: list[int] = field(default_factory=list)
    token_received_s: list[float] = field(default_factory=list)
    """``time.monotonic()`` of each token's arrival; tokens of one message share theirs."""
    cached_prompt_tokens: int | None = None
    """Prompt tokens found in the prefix cache; ``vllm serve --enable-prompt-tokens-details``."""
    timings: EngineTimings | None = None

    def add(self, chunk: TokenChunk) -> None:
        self.token_ids.extend(chunk.token_ids)
        self.token_received_s.extend([chunk.received_s] * len(chunk.token_ids))


class VllmClient:
    """A vLLM server behind its URL; an asynchronous context manager that keeps connections for reuse.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        api_key: sent as a bearer token, and never shown.
        silence_s: longest time a stream may bring nothing before the server counts as gone. It has to cover
            waiting in the engine's queue.

    Raises:
        ServerError: the URL is malformed.
    """

    def __init__(self, url: str, api_key: str | None = None, silence_s: float = 600.0) -> None:
        self.url = _checked_url(url)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._silence_s = silence_s
        self._open_session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> VllmClient:
        self._open_session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=self._silence_s),
            read_bufsize=MAX_LINE_BYTES,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        assert self._open_session is not None, "use the client as `async with VllmClient(url) as client`"
        return self._open_session

    async def get_text(self, path: str) -> str:
        """The body of ``path``, such as ``/metrics``.

        Raises:
            ServerUnreachable: nothing answers.
            RequestRefused: the server answers with an error, 404 where it has no such endpoint.
        """
        return await self._call("GET", path)

    async def post(self, path: str) -> str:
        """Call ``path``, such as ``/wake_up``, without a body and return what it answers.

        Raises:
            ServerError: as :meth:`get_text`.
        """
        return await self._call("POST", path)

    async def get_json(self, path: str) -> Any:
        """The body of ``path`` as JSON values.

        Raises:
            ServerError: as :meth:`get_text`, and for what is no JSON.
        """
        text = await self.get_text(path)
        try:
            return json.loads(text)
        except ValueError:
            raise ServerError(f"{self.url}{path} does not answer with JSON: is this a vLLM server?") from None

    async def is_healthy(self) -> bool:
        """Whether the server is up and its engine alive."""
        try:
            await self.get_text("/health")
        except (ServerUnreachable, RequestRefused):
            return False
        return True

    async def complete(
        self, model: str, request: CompletionRequest, on_chunk: Callable[[Completion], None] | None = None
    ) -> Completion:
        """Send ``request`` and collect the answer; cancelling this aborts the request on the server.

        Args:
            on_chunk: called whenever tokens have arrived, with the answer so far.

        Raises:
            ServerError: as :meth:`stream`.
        """
        completion = Completion(sent_s=time.monotonic())
        async with self.stream(model, request, completion) as chunks:
            async for chunk in chunks:
                completion.add(chunk)
                if on_chunk is not None:
                    on_chunk(completion)
        return completion

    @asynccontextmanager
    async def stream(
        self, model: str, request: CompletionRequest, completion: Completion | None = None
    ) -> AsyncIterator[AsyncIterator[TokenChunk]]:
        """Open the streamed answer to ``request``; leaving the block early aborts the request on the server.

        Args:
            completion: takes what the end of the stream tells about the request as a whole.

        Raises:
            ServerUnreachable: nothing answers, or the connection breaks before the answer is complete.
            RequestRefused: the server refuses the request, such as a prompt longer than its context.
        """
        body = {
            "model": model,
            "prompt": list(request.prompt_token_ids),
            "max_tokens": request.max_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if request.priority:
            body["priority"] = request.priority
        if request.cache_salt is not None:
            body["cache_salt"] = request.cache_salt
        with self._explained("a completion"):
            async with self._session.post(f"{self.url}/v1/completions", json=body) as response:
                await self._check(response, "/v1/completions")
                yield self._chunks(response, completion)

    async def _chunks(
        self, response: aiohttp.ClientResponse, completion: Completion | None
    ) -> AsyncIterator[TokenChunk]:
        async for line in response.content:
            received_s = time.monotonic()
            if not line.startswith(b"data: "):
                continue
            data = line[len(b"data: ") :].strip()
            if data == b"[DONE]":
                # Read to the end of the body, or the connection could not be used again.
                await response.content.read()
                return
            message = self._message(data)
            for choice in message["choices"]:
                if choice["token_ids"]:
                    yield TokenChunk(received_s, tuple(choice["token_ids"]))
            if completion is not None and message.get("usage"):
                completion.cached_prompt_tokens = _cached_tokens(message["usage"])
                completion.timings = _timings(message.get("metrics"))
        raise ServerUnreachable(f"{self.url} ended a completion before its last token: the server has stopped")

    def _message(self, data: bytes) -> dict[str, Any]:
        message: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            message = json.loads(data)
        if "error" in message:
            raise ServerError(f"{self.url} ended a completion: {_shortened(message['error'])}")
        if not all("token_ids" in choice for choice in message.get("choices", [{}])):
            raise ServerError(f"{self.url} streams no token ids: is this vLLM 0.10.2 or newer?")
        return message

    async def _call(self, method: str, path: str) -> str:
        with self._explained(f"{method} {path}"):
            async with self._session.request(method, f"{self.url}{path}") as response:
                await self._check(response, path)
                return await response.text()

    async def _check(self, response: aiohttp.ClientResponse, path: str) -> None:
        if response.status == 200:
            return
        text = await response.text()
        try:
            reason = _shortened(json.loads(text)["error"])
        except (ValueError, KeyError, TypeError):
            reason = _shortened(text) or str(response.reason)
        if response.status == 401:
            reason = "it wants an API key; name the environment variable that holds it with api_key_env"
        raise RequestRefused(f"{self.url}{path} answers {response.status}: {reason}", response.status)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Failures of the connection as one line."""
        try:
            yield
        except aiohttp.ClientConnectorError as error:
            raise ServerUnreachable(f"nothing answers at {self.url}: {_os_reason(error)}") from None
        except TimeoutError:
            raise ServerUnreachable(f"{self.url} did not answer {what} in time") from None
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise ServerUnreachable(
                f"the connection to {self.url} broke during {what} ({type(error).__name__}): the server has stopped"
            ) from None


def _checked_url(url: str) -> str:
    """``url`` without a trailing slash."""
    problem = f"'url': expected an address such as http://127.0.0.1:8000 (got {url!r})"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ServerError(problem) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ServerError(problem)
    if parts.username is not None or parts.password is not None:
        raise ServerError("'url': must not hold a user name or password; api_key_env names a key's variable")
    return url.rstrip("/")


def _cached_tokens(usage: dict[str, Any]) -> int | None:
    details = usage.get("prompt_tokens_details")
    return None if details is None else int(details["cached_tokens"])


def _timings(metrics: dict[str, float | None] | None) -> EngineTimings | None:
    if metrics is None:
        return None
    values = [metrics.get(name) for name in ("queue_time_ms", "time_to_first_token_ms", "generation_time_ms")]
    known = [value / 1e3 for value in values if value is not None]
    return EngineTimings(*known) if len(known) == len(values) else None


def _shortened(error: Any) -> str:
    text = str(error.get("message", error) if isinstance(error, dict) else error)
    line = " ".join(text.split())
    return line if len(line) <= _ERROR_TEXT_LIMIT else line[: _ERROR_TEXT_LIMIT - 3] + "..."


def _os_reason(error: aiohttp.ClientConnectorError) -> str:
    number = error.os_error.errno
    return (os.strerror(number) if number else str(error.os_error)).lower()
