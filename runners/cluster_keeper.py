"""The process that keeps a cluster of vLLM servers up after the command that started it has ended.

``python -m runners.cluster_keeper FOLDER`` starts what ``FOLDER/request.json`` asks for, tells how it stands in the
state (:mod:`qlm_env.backends.vllm.cluster_state`), starts again what dies, and stops all on SIGTERM. Should it be
killed, the servers end with it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.cluster_state import STATE_FILE, ClusterState, ServerState, kept, write_state
from qlm_env.backends.vllm.configured import make_provider
from qlm_env.backends.vllm.errors import ServerError
from qlm_env.backends.vllm.provider import RunningServer, ServerProvider
from qlm_env.cluster import instance_names, make_cluster
from qlm_env.profiles import check_placement
from qlm_env.spec import ConfigError, ScenarioSpec, Spec

REQUEST_FILE = "request.json"
WATCH_INTERVAL_S = 1.0
BACKOFF_S = (1.0, 60.0)
"""Before a server is started again: at first, and at most after failures in a row."""


class UpRequest(Spec):
    """What a keeper is asked for."""

    scenario: ScenarioSpec
    servers: Literal["all", "initial"]


class Planned(NamedTuple):
    """A server to start."""

    instance: int
    model: int
    awake: bool
    """Whether its model is the active one at first; others sleep."""


def plan_servers(scenario: ScenarioSpec, servers: Literal["all", "initial"]) -> list[Planned]:
    """The servers of a cluster, instance by instance, with the one that stays awake last: the others make room for it.

    Raises:
        ConfigError: a model fits nowhere, or the weights of those that sleep exceed an instance's host memory.
    """
    models = scenario.workload.models
    check_placement(scenario.cluster, scenario.workload, scenario.cluster.profile_path)
    fleet = make_cluster(scenario.cluster, models)
    planned = []
    for i, name in enumerate(instance_names(scenario.cluster)):
        active = int(fleet.engine["active_model"][i])
        fitting = [m for m in range(len(models)) if fleet.placement["num_blocks"][i, m] > 0]
        asleep = [m for m in fitting if m != active] if servers == "all" else []
        needed, there = fleet.placement["weight_bytes"][i, asleep].sum(), fleet.engine["host_memory_bytes"][i]
        if needed > there:
            raise ConfigError(
                f"'cluster.instances': the {len(asleep)} models that sleep on instance {name.name} have "
                f"{needed / 1e9:.1f}e9 bytes of weights, more than its host memory of {there / 1e9:.1f}e9; "
                "give servers=initial"
            )
        planned += [Planned(i, m, awake=False) for m in asleep]
        planned += [Planned(i, active, awake=True)] if active in fitting else []
    return planned


class Keeper:
    """Keeps planned servers up.

    Args:
        folder: of the state.
        planned: the servers, in the order in which those of an instance start.
    """

    def __init__(
        self, folder: Path, scenario: ScenarioSpec, planned: Sequence[Planned], provider: ServerProvider
    ) -> None:
        names = instance_names(scenario.cluster)
        self._folder = folder
        self._provider = provider
        self._planned = planned
        self._running: dict[Planned, RunningServer] = {}
        self._servers = {
            pair: ServerState(
                instance=pair.instance,
                instance_name=names[pair.instance].name,
                model=scenario.workload.models[pair.model].name,
            )
            for pair in planned
        }
        self._state = ClusterState(
            cluster=scenario.cluster.name,
            keeper_pid=os.getpid(),
            started_s=time.time(),
            phase="starting",
            servers=(),
        )
        self._write()

    async def keep(self) -> None:
        """Start all, then watch until cancelled; nothing is left running.

        Raises:
            ConfigError: a server could not be started at first.
        """
        try:
            await self._start_all()
            self._write(phase="up")
            await asyncio.gather(*(self._watch(pair) for pair in self._planned))
        except ConfigError as error:
            self._write(phase="failed", error=str(error))
            raise
        finally:
            await asyncio.shield(self._provider.close())

    async def _start_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for instance in dict.fromkeys(pair.instance for pair in self._planned):
                    group.create_task(self._start_instance(instance))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _start_instance(self, instance: int) -> None:
        for pair in self._planned:
            if pair.instance == instance:
                self._tell(pair, phase="starting")
                await self._start(pair)

    async def _start(self, pair: Planned) -> None:
        server = await self._provider.start(pair.instance, pair.model)
        if not pair.awake:
            async with VllmClient(server.url, server.api_key) as client:
                await client.post("/sleep?level=1")
        self._running[pair] = server
        self._tell(
            pair,
            phase="up",
            url=server.url,
            api_key=server.api_key,
            kv_store=None if server.kv_store is None else str(server.kv_store),
            healthy_since_s=time.time(),
        )

    async def _watch(self, pair: Planned) -> None:
        """Start ``pair`` again whenever it has died."""
        backoff_s = BACKOFF_S[0]
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            reason = self._running[pair].exit_reason
            if reason is None:
                continue
            self._tell(pair, phase="restarting", error=reason, healthy_since_s=None)
            await self._running[pair].stop()
            while True:
                await asyncio.sleep(backoff_s)
                try:
                    await self._start(pair)
                    break
                except ServerError as error:
                    self._tell(pair, phase="restarting", error=str(error))
                    backoff_s = min(2 * backoff_s, BACKOFF_S[1])
            backoff_s = BACKOFF_S[0]

    def _tell(self, pair: Planned, **changed: Any) -> None:
        self._servers[pair] = self._servers[pair].model_copy(update=changed)
        self._write()

    def _write(self, **changed: Any) -> None:
        update = {"servers": tuple(self._servers.values()), **changed}
        self._state = self._state.model_copy(update=update)
        write_state(self._folder, self._state)


def main(arguments: Sequence[str]) -> int:
    """Keep the cluster that ``FOLDER`` asks for; returns the exit status."""
    folder = Path(arguments[0])
    request = UpRequest.model_validate_json((folder / REQUEST_FILE).read_bytes())
    try:
        with kept(folder):
            asyncio.run(_keep(folder, request))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


async def _keep(folder: Path, request: UpRequest) -> None:
    scenario = request.scenario
    keeping = asyncio.current_task()
    assert keeping is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, keeping.cancel)
    models = scenario.workload.models
    provider = make_provider(scenario.cluster, models, make_cluster(scenario.cluster, models))
    try:
        await Keeper(folder, scenario, plan_servers(scenario, request.servers), provider).keep()
    except asyncio.CancelledError:
        (folder / STATE_FILE).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
