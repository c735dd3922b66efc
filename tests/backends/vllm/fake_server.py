"""A stand-in for a vLLM server: its protocol without an engine, on a loopback port, with faults to order."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from aiohttp import web


@dataclass
class FakeServer:
    """A context manager that serves from a thread of its own.

    A first token takes ``FIRST_TOKEN_S`` and ``PROMPT_TOKEN_S`` per prompt token, every further one ``TOKEN_S``;
    requests do not see each other.
    """

    model: str = "tiny"
    max_model_len: int = 512
    missing: frozenset[str] = frozenset()
    """Endpoints that answer 404."""
    api_key: str | None = None
    dies_after_tokens: int | None = None
    """Tokens over all requests after which the server drops its connections and its port."""
    garbage: bool = False
    """Answer everything with a page, as another web server would."""
    scheduling_policy: str = "fcfs"
    block_size: int = 16
    num_gpu_blocks: int = 1000
    hung: bool = False
    """Take requests and answer nothing any more."""
    asleep: bool = False
    running: int = 0
    """Completions under way."""
    cached: dict[str, list[int]] = field(default_factory=dict)
    """By cache salt, the tokens whose KV is there; without a salt nothing is cached."""
    kv_store: Path | None = None
    """Store prompts there as vLLM's ExampleConnector does; salts mean nothing to it."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """The completions asked for."""
    peers: set[Any] = field(default_factory=set)
    """Connections that completions came over."""
    aborted: threading.Event = field(default_factory=threading.Event)
    """A completion was dropped by its client."""
    url: str = ""

    FIRST_TOKEN_S = 0.004
    PROMPT_TOKEN_S = 0.0002
    TOKEN_S = 0.002

    def __enter__(self) -> FakeServer:
        self._loop = asyncio.new_event_loop()
        self._tokens = 0
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    @property
    def has_died(self) -> bool:
        """Whether it ended by a fault of its own."""
        return self._dead.is_set()

    def die(self) -> None:
        """Drop every connection and the port."""
        self._loop.call_soon_threadsafe(self._dead.set)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._stopped = asyncio.Event()
        self._dead = asyncio.Event()
        app = web.Application(middlewares=[self._gate])
        for path, handler in (
            ("/health", self._health),
            ("/v1/models", self._models),
            ("/metrics", self._metrics),
            ("/version", self._version),
            ("/server_info", self._server_info),
        ):
            app.router.add_get(path, handler)
        app.router.add_get("/is_sleeping", self._is_sleeping)
        for path, handler in (
            ("/v1/completions", self._completions),
            ("/sleep", self._sleep),
            ("/wake_up", self._wake_up),
        ):
            app.router.add_post(path, handler)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        ready.set()
        waits = [asyncio.ensure_future(event.wait()) for event in (self._stopped, self._dead)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        await runner.cleanup()
        await self._stopped.wait()

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.garbage:
            return web.Response(text="<html>hello</html>", content_type="text/html")
        if request.path in self.missing:
            raise web.HTTPNotFound
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.hung:
            await self._stopped.wait()
        response: web.StreamResponse = await handler(request)
        return response

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model, "root": "x", "max_model_len": self.max_model_len}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        sizes = f'block_size="{self.block_size}",num_gpu_blocks="{self.num_gpu_blocks}"'
        labels = f'{sizes},enable_prefix_caching="True",cache_dtype="auto"'
        return web.Response(
            text=f"# HELP x y\nvllm:cache_config_info{{{labels}}} 1.0\n"
            'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_waiting{engine="0"} 2.0\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
            f'vllm:generation_tokens_total{{engine="0"}} {self._tokens}\n'
        )

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _server_info(self, _: web.Request) -> web.Response:
        scheduler = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "policy": self.scheduling_policy}
        config = {"scheduler_config": scheduler, "cache_config": {}}
        return web.json_response({"vllm_config": config, "vllm_env": {"VLLM_API_KEY": self.api_key}})

    async def _is_sleeping(self, _: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": self.asleep})

    async def _sleep(self, _: web.Request) -> web.Response:
        self.asleep = True
        self.cached.clear()
        return web.json_response({"status": "sleeping"})

    async def _wake_up(self, _: web.Request) -> web.Response:
        self.asleep = False
        return web.json_response({"status": "awake"})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] != self.model:
            return self._error(f"The model `{body['model']}` does not exist.", 404)
        prompt = len(body["prompt"])
        if prompt + body["max_tokens"] > self.max_model_len:
            return self._error(f"This model's maximum context length is {self.max_model_len} tokens.", 400)
        self.bodies.append(body)
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        assert not self.asleep, "a completion was asked of a sleeping server"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens = list(body["prompt"])
        found = self._found(body.get("cache_salt"), tokens)
        found += self._found_in_store(tokens, found)
        self.running += 1
        try:
            await asyncio.sleep(self.FIRST_TOKEN_S + prompt * self.PROMPT_TOKEN_S)
            for index in range(body["max_tokens"]):
                if index:
                    await asyncio.sleep(self.TOKEN_S)
                self._tokens += 1
                if self.dies_after_tokens is not None and self._tokens > self.dies_after_tokens:
                    self._dead.set()
                    request.transport.abort()
                    return response
                while self.hung:
                    await asyncio.sleep(self.TOKEN_S)
                tokens.append(index)
                if "cache_salt" in body:
                    self.cached[body["cache_salt"]] = tokens[:-1]
                await self._send(response, {"choices": [{"index": 0, "text": "x", "token_ids": [index]}]})
            usage = {"prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": found}}
            metrics = {"queue_time_ms": 1.0, "time_to_first_token_ms": 2.0, "generation_time_ms": 3.0}
            await self._send(response, {"choices": [], "usage": usage, "metrics": metrics})
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.aborted.set()
            raise
        finally:
            self.running -= 1
        return response

    def _found(self, salt: str | None, tokens: list[int]) -> int:
        """Tokens in whole blocks at the beginning that are cached, never all of them."""
        equal = 0
        for mine, cached in zip(tokens[:-1], self.cached.get(salt or "", ()), strict=False):
            if mine != cached:
                break
            equal += 1
        return equal // self.block_size * self.block_size

    def _found_in_store(self, tokens: list[int], cached: int) -> int:
        """What the store has of a prompt beside what is cached; one that it has not is stored."""
        if self.kv_store is None:
            return 0
        found, whole = ((len(tokens) - back) // self.block_size * self.block_size for back in (2, 1))
        entry = self._entry(tokens[:whole])
        if self._entry(tokens[:found]).exists():
            assert found >= cached, "the engine would die of a negative number of tokens"
            assert found == 0 or entry.exists(), "the engine would die of a missing file"
            return found - cached
        entry.mkdir(exist_ok=True)
        return 0

    def _entry(self, tokens: list[int]) -> Path:
        assert self.kv_store is not None
        return self.kv_store / hashlib.md5(b"".join(token.to_bytes(8, "little") for token in tokens)).hexdigest()

    @staticmethod
    async def _send(response: web.StreamResponse, message: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(message).encode() + b"\n\n")

    @staticmethod
    def _error(message: str, status: int) -> web.Response:
        return web.json_response({"error": {"message": message, "code": status}}, status=status)
