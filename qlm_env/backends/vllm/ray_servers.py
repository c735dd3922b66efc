"""Servers placed on a Ray cluster: one actor per instance holds its devices and runs a server process per model.

The models of an instance share its GPUs, all but one asleep, so that the actor, and not each server, is what holds
them. Ray starts a lost actor again, on any node that has the devices; the servers in it are asked for anew.

Nodes need this package, the interpreter with vLLM and the model folders under the same paths, and the network between
them and this machine must be one in which servers may listen: they want a key for every path.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from qlm_env.backends.vllm.errors import ServerError, ServerStartFailed
from qlm_env.backends.vllm.launch import LaunchSettings, arguments, environment
from qlm_env.backends.vllm.local_servers import LocalModel
from qlm_env.backends.vllm.provider import RunningServer, ServerProvider
from qlm_env.backends.vllm.server import ServerCommand, VllmServer, free_port
from qlm_env.backends.vllm.server_side import REQUIRE_KEY, python_path
from qlm_env.backends.vllm.server_side.qlm_require_key import KEY_VARIABLE

LEAVE_CHILDREN = {"RAY_kill_child_processes_on_worker_exit": "false"}
"""Ray would kill the guard of a server, which has to end all of it when the actor is gone."""

_WATCH_INTERVAL_S = 0.5


class Resources(NamedTuple):
    """What an instance takes of a Ray cluster."""

    num_cpus: int
    num_gpus: int


class Started(NamedTuple):
    """How a server's start ended."""

    url: str = ""
    error: str = ""
    """One line; empty if it is healthy."""


class InstanceActor:
    """Runs the servers of one instance on the node where Ray has put it; they end with it."""

    def __init__(self) -> None:
        self._servers: dict[int, VllmServer] = {}

    async def start(self, model: int, command: ServerCommand, log: Path, start_timeout_s: float) -> Started:
        """Start a server on this node, on a free port of its address, and wait until it is healthy."""
        import ray

        await self.stop(model)
        host = ray.util.get_node_ip_address()
        given = dict(command.environment).get("PYTHONPATH", "")
        command = replace(
            command,
            host=host,
            port=free_port(host),
            environment=(*command.environment, ("PYTHONPATH", python_path(given))),
        )
        server = self._servers[model] = VllmServer(command, log, start_timeout_s)
        try:
            await server.__aenter__()
        except (ServerError, OSError) as error:
            return Started(error=f"on node {host}: {error}")
        return Started(server.url)

    async def ended(self, model: int) -> str:
        """Wait until a server has ended by itself, and say why."""
        server = self._servers[model]
        while (status := server.exit_status) is None:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        return f"the vLLM server at {server.url} ended with status {status} ({server.log}): {server.last_log_lines()}"

    async def stop(self, model: int, kill: bool = False) -> None:
        """End a server, if it runs."""
        server = self._servers.pop(model, None)
        if server is not None:
            await server.stop(kill)

    async def close(self) -> None:
        """End all servers."""
        await asyncio.gather(*(self.stop(model) for model in list(self._servers)))


class RayServer(RunningServer):
    """A server of :class:`RayServers`."""

    kv_store = None

    def __init__(self, actor: Any, model: int, url: str, model_name: str, api_key: str) -> None:
        self.url = url
        self.model_name = model_name
        self.api_key = api_key
        self._actor = actor
        self._model = model
        self._ended = actor.ended.remote(model)
        self._reason: str | None = None

    @property
    def exit_reason(self) -> str | None:
        import ray

        if self._reason is None and ray.wait([self._ended], timeout=0)[0]:
            try:
                self._reason = str(ray.get(self._ended))
            except ray.exceptions.RayError as error:
                self._reason = f"the Ray actor of {self.url} is lost: {_first_line(error)}"
        return self._reason

    async def stop(self, kill: bool = False) -> None:
        import ray

        # The servers of an actor that is lost have ended with it.
        with contextlib.suppress(ray.exceptions.RayError):
            await self._actor.stop.remote(self._model, kill)


class RayServers(ServerProvider):
    """Starts vLLM on a Ray cluster.

    Args:
        models: (M,) in the order of the backend's models.
        python: the interpreter of the environment that has vLLM, on the nodes.
        log_folder: takes one log per (instance, model), on the node.
        settings: of the server of an instance and model.
        resources: of an instance.
        address: of the Ray cluster; ``None`` takes the one this machine is in, or starts one here.
        api_key: of all servers; ``None`` makes one up.
        max_restarts: of an actor; -1 is without limit.
        max_starting: so many servers start at the same time.

    Raises:
        ConfigError: Ray is not installed.
    """

    can_stop = True

    def __init__(
        self,
        models: Sequence[LocalModel],
        python: Path,
        log_folder: Path,
        settings: Callable[[int, int], LaunchSettings],
        resources: Callable[[int], Resources],
        *,
        address: str | None = None,
        api_key: str | None = None,
        start_timeout_s: float = 300.0,
        max_restarts: int = -1,
        max_starting: int = 2,
    ) -> None:
        try:
            import ray
        except ImportError:
            raise ServerError("'cluster.vllm.kind': ray needs the package: pip install 'qlm-env[ray]'") from None
        self._ray = ray
        self._models = models
        self._python = python
        self._log_folder = log_folder.resolve()
        self._settings = settings
        self._resources = resources
        self._address = address
        self._api_key = api_key or secrets.token_urlsafe(24)
        self._start_timeout_s = start_timeout_s
        self._max_restarts = max_restarts
        self._starting = asyncio.Semaphore(max_starting)
        self._actors: dict[int, Any] = {}
        self._has_connected = False

    async def start(self, instance: int, model: int) -> RunningServer:
        """As :meth:`.provider.ServerProvider.start`."""
        async with self._starting:
            await asyncio.to_thread(self._connect)
            actor = await self._actor(instance)
            chosen = self._models[model]
            command = self._command(instance, model)
            log = self._log_folder / f"instance-{instance}-{chosen.name}.log"
            try:
                started = await actor.start.remote(model, command, log, self._start_timeout_s)
            except self._ray.exceptions.RayError as error:
                self._forget_if_dead(instance, error)
                raise ServerStartFailed(f"the Ray actor of instance {instance} is lost: {_first_line(error)}") from None
            except asyncio.CancelledError:
                actor.stop.remote(model, True)
                raise
        if started.error:
            raise ServerStartFailed(started.error)
        return RayServer(actor, model, started.url, chosen.name, self._api_key)

    def serves(self, instance: int, model: int) -> bool:
        """Every model runs on every instance."""
        return 0 <= model < len(self._models)

    async def close(self) -> None:
        """Stop all servers, and leave Ray as it was."""
        actors, self._actors = self._actors, {}
        await asyncio.gather(*(self._end(actor) for actor in actors.values()))
        if self._has_connected:
            self._has_connected = False
            await asyncio.to_thread(self._ray.shutdown)

    async def _end(self, actor: Any) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            await actor.close.remote()
        self._ray.kill(actor)

    def _connect(self) -> None:
        if self._ray.is_initialized():
            return
        try:
            self._ray.init(address=self._address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ServerError(f"'cluster.vllm.address': cannot join the Ray cluster: {_first_line(error)}") from None
        self._has_connected = True

    async def _actor(self, instance: int) -> Any:
        """The actor of ``instance``, once Ray has found room for it.

        Raises:
            ServerStartFailed: no node has its devices free.
        """
        if instance in self._actors:
            return self._actors[instance]
        resources = self._resources(instance)
        remote = self._ray.remote(InstanceActor)
        actor = remote.options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=self._max_restarts,
            runtime_env={"env_vars": LEAVE_CHILDREN},
        ).remote()
        try:
            await asyncio.wait_for(asyncio.wrap_future(actor.__ray_ready__.remote().future()), self._start_timeout_s)
        except TimeoutError:
            self._ray.kill(actor)
            raise ServerStartFailed(
                f"no node of the Ray cluster has {resources.num_cpus} CPUs and {resources.num_gpus} GPUs free for "
                f"instance {instance} within {self._start_timeout_s:g} s"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise ServerStartFailed(f"the Ray actor of instance {instance} is lost: {_first_line(error)}") from None
        self._actors[instance] = actor
        return actor

    def _forget_if_dead(self, instance: int, error: Exception) -> None:
        """An actor that Ray starts again answers later; one that it has given up is replaced at the next start."""
        if isinstance(error, self._ray.exceptions.ActorDiedError):
            self._actors.pop(instance, None)

    def _command(self, instance: int, model: int) -> ServerCommand:
        settings = self._settings(instance, model)
        # Ray says to its actors which GPUs are theirs.
        variables = tuple(item for item in environment(settings) if item[0] != "CUDA_VISIBLE_DEVICES")
        chosen = self._models[model]
        return ServerCommand(
            python=self._python,
            model=chosen.folder.resolve(),
            served_name=chosen.name,
            port=0,
            arguments=(*arguments(settings), *REQUIRE_KEY),
            environment=(*variables, (KEY_VARIABLE, self._api_key)),
        )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
