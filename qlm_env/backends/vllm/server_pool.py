"""The servers of one instance: which models are awake, asleep or have none."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.errors import RequestRefused, ServerError, ServerStartFailed, ServerUnreachable
from qlm_env.backends.vllm.kv_store import KvStore
from qlm_env.backends.vllm.provider import RunningServer, ServerProvider

_log = logging.getLogger(__name__)

_MISSING = 404


class PooledServer:
    """A running server and the connections to it.

    Args:
        block_size: tokens per KV block.
    """

    def __init__(self, running: RunningServer, client: VllmClient, block_size: int) -> None:
        self.running = running
        self.client = client
        self.kv_store = None if running.kv_store is None else KvStore(running.kv_store, block_size)
        self.asleep = False
        self._connections = AsyncExitStack()

    async def open(self) -> None:
        await self._connections.enter_async_context(self.client)

    async def close(self) -> None:
        await self._connections.aclose()


class ServerPool:
    """One server per model at most, brought to where it is wanted; what concerns one model happens in turn.

    Args:
        check: looks at a server that has just started; raises ServerError if it does not suit.
        silence_s: longest time a server may take to answer.
        block_size: tokens per KV block.
    """

    def __init__(
        self,
        instance: int,
        provider: ServerProvider,
        check: Callable[[int, PooledServer], Awaitable[None]],
        silence_s: float,
        block_size: int,
    ) -> None:
        self._instance = instance
        self._provider = provider
        self._check = check
        self._silence_s = silence_s
        self._block_size = block_size
        self._servers: dict[int, PooledServer] = {}
        self._turn: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    def get(self, model: int) -> PooledServer | None:
        return self._servers.get(model)

    def running(self) -> dict[int, RunningServer]:
        """The servers by model."""
        return {model: server.running for model, server in self._servers.items()}

    async def take_dead(self) -> dict[int, str]:
        """The servers that have died since the last look, and why; they are in the pool no more."""
        dead = {model: reason for model, server in self._servers.items() if (reason := server.running.exit_reason)}
        await asyncio.gather(*(self._stop(model, kill=True) for model in dead))
        return dead

    async def wake(self, model: int) -> PooledServer:
        """The model's server, running and awake.

        Raises:
            ServerError: it does not start or wake.
        """
        async with self._turn[model]:
            server = await self._started(model)
            if server.asleep:
                await server.client.post("/wake_up")
                server.asleep = False
            return server

    async def put_to_sleep(self, model: int) -> None:
        """The model's weights in host memory; a server that cannot sleep stays as it is.

        Raises:
            ServerError: it does not start or fall asleep.
        """
        async with self._turn[model]:
            await self._sleep(await self._started(model))

    async def put_away(self, model: int) -> None:
        """The model's weights out of memory, or as far as its provider lets them go.

        Raises:
            ServerError: a server that cannot be stopped cannot be reached or does not fall asleep.
        """
        async with self._turn[model]:
            if not self._provider.can_stop and self._provider.serves(self._instance, model):
                await self._sleep(await self._started(model))
            elif model in self._servers:
                await self._stop(model, kill=False)

    async def kill(self) -> None:
        """Every server's processes killed, or asleep where that is as far as it goes; never raises."""

        async def one(model: int) -> None:
            async with self._turn[model]:
                if model not in self._servers:
                    return
                try:
                    if not self._provider.can_stop:
                        await self._sleep(self._servers[model])
                        return
                except ServerError as error:
                    _log.warning("instance %d: %s", self._instance, error)
                await self._stop(model, kill=True)

        await asyncio.gather(*(one(model) for model in list(self._servers)))

    async def close(self) -> None:
        """Drop the connections; the servers are the provider's to stop."""
        for server in self._servers.values():
            await server.close()
        self._servers.clear()

    async def _started(self, model: int) -> PooledServer:
        server = self._servers.get(model)
        if server is not None and server.running.exit_reason is None and await server.client.is_healthy():
            return server
        if server is not None:
            await self._stop(model, kill=True)
        before_s = time.monotonic()
        running = await self._provider.start(self._instance, model)
        server = PooledServer(running, VllmClient(running.url, running.api_key, self._silence_s), self._block_size)
        try:
            await server.open()
            await self._check(model, server)
            server.asleep = await _is_sleeping(server.client)
        except BaseException:
            await server.close()
            await running.stop()
            raise
        self._servers[model] = server
        _log.info(
            "instance %d: %s is up at %s after %.0f s",
            self._instance,
            running.model_name,
            running.url,
            time.monotonic() - before_s,
        )
        return server

    async def _sleep(self, server: PooledServer) -> None:
        if server.asleep:
            return
        try:
            await server.client.post("/sleep?level=1")
            if not await _is_sleeping(server.client):
                raise ServerStartFailed(f"{server.running.url} took the call to sleep and is awake")
        except RequestRefused as error:
            if error.status != _MISSING:
                raise
            _log.warning("instance %d: %s has no sleep mode and stays awake", self._instance, server.running.url)
            return
        server.asleep = True

    async def _stop(self, model: int, kill: bool) -> None:
        server = self._servers.pop(model)
        await server.close()
        await server.running.stop(kill)


async def _is_sleeping(client: VllmClient) -> bool:
    """Whether the server is asleep; one without sleep mode never is."""
    try:
        answer = await client.get_json("/is_sleeping")
    except RequestRefused as error:
        if error.status != _MISSING:
            raise
        return False
    if not isinstance(answer, dict) or "is_sleeping" not in answer:
        raise ServerUnreachable(f"{client.url}/is_sleeping does not tell whether it is")
    return bool(answer["is_sleeping"])
