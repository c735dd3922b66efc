"""Servers started on this machine, one process group per (instance, model)."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qlm_env.backends.vllm.errors import ServerStartFailed
from qlm_env.backends.vllm.launch import LaunchSettings, arguments, environment
from qlm_env.backends.vllm.provider import RunningServer, ServerProvider
from qlm_env.backends.vllm.server import ServerCommand, VllmServer, free_port
from qlm_env.spec import ConfigError


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    name: str
    """Requests ask for it by this name."""
    folder: Path


class LocalServer(RunningServer):
    """A server process of :class:`LocalServers`."""

    def __init__(self, server: VllmServer, api_key: str, kv_store: Path | None) -> None:
        self._server = server
        self.url = server.url
        self.model_name = server.command.served_name
        self.api_key = api_key
        self.kv_store = kv_store

    @property
    def exit_reason(self) -> str | None:
        status = self._server.exit_status
        if status is None:
            return None
        return f"the vLLM server ended with status {status} ({self._server.log}): {self._server.last_log_lines()}"

    async def stop(self, kill: bool = False) -> None:
        await self._server.stop(kill)
        if self.kv_store is not None:
            await asyncio.to_thread(shutil.rmtree, self.kv_store, ignore_errors=True)


class LocalServers(ServerProvider):
    """Starts vLLM on this machine; servers listen on the loopback address and want a key that is made up here.

    Args:
        models: (M,) in the order of the backend's models.
        python: the interpreter of the environment that has vLLM.
        log_folder: takes one log per start.
        settings: of the server of an instance and model.
        kv_store_folder: in memory (``/dev/shm``); with it every server has an ``ExampleConnector`` with a folder of
            its own in there, which ends with the server.
        start_timeout_s: from starting a process until it is healthy, not counting the wait for others.
        base_port: of instance 0 and model 0; the others follow. ``None`` takes whatever is free.
        max_starting: so many start at the same time.

    Raises:
        ConfigError: a model's folder does not exist.
    """

    can_stop = True

    def __init__(
        self,
        models: Sequence[LocalModel],
        python: Path,
        log_folder: Path,
        settings: Callable[[int, int], LaunchSettings],
        *,
        kv_store_folder: Path | None = None,
        start_timeout_s: float = 300.0,
        base_port: int | None = None,
        max_starting: int = 2,
    ) -> None:
        for model in models:
            if not (model.folder / "config.json").is_file():
                raise ConfigError(f"no model {model.name!r} in {model.folder}: it has no config.json")
        self._models = models
        self._python = python
        self._log_folder = log_folder
        self._settings = settings
        self._kv_store_folder = kv_store_folder
        self._start_timeout_s = start_timeout_s
        self._base_port = base_port
        self._starting = asyncio.Semaphore(max_starting)
        self._started: list[LocalServer] = []
        self._starts: Counter[str] = Counter()

    async def start(self, instance: int, model: int) -> RunningServer:
        """As :meth:`.provider.ServerProvider.start`."""
        chosen, settings = self._models[model], self._settings(instance, model)
        name = f"instance-{instance}-{chosen.name}"
        kv_store = settings.kv_store if self._kv_store_folder is None else self._kv_store_folder / name
        key = secrets.token_urlsafe(24)
        async with self._starting, AsyncExitStack() as stack:
            if kv_store is not None:
                await asyncio.to_thread(shutil.rmtree, kv_store, ignore_errors=True)
                # What prompts say can be read off their KV cache.
                kv_store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                kv_store.mkdir()
                stack.callback(shutil.rmtree, kv_store, ignore_errors=True)
                settings = replace(settings, kv_store=kv_store)
            port = free_port()
            if self._base_port is not None:
                port = self._base_port + instance * len(self._models) + model
            command = ServerCommand(
                python=self._python,
                model=chosen.folder,
                served_name=chosen.name,
                port=port,
                arguments=arguments(settings),
                # In the environment, not on the command line, which every user of the machine can read.
                environment=(*environment(settings), ("VLLM_API_KEY", key)),
            )
            self._starts[name] += 1
            log = self._log_folder / f"{name}-{self._starts[name]}.log"
            server = VllmServer(command, log, self._start_timeout_s)
            try:
                await stack.enter_async_context(server)
            except OSError as error:
                raise ServerStartFailed(f"the vLLM server cannot be started: {error}") from None
            stack.pop_all()
        running = LocalServer(server, key, kv_store)
        self._started = [other for other in self._started if other.exit_reason is None]
        self._started.append(running)
        return running

    def serves(self, instance: int, model: int) -> bool:
        """Every model runs on every instance."""
        return 0 <= model < len(self._models)

    async def close(self) -> None:
        """Stop all servers at the same time."""
        await asyncio.gather(*(server.stop() for server in self._started))
        self._started = []
        if self._kv_store_folder is not None:
            # Where servers of another provider are left in it, it stays.
            with contextlib.suppress(OSError):
                self._kv_store_folder.rmdir()
