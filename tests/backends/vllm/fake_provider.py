"""A provider of stand-in servers, which start fast."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from qlm_env.backends.vllm.backend import VllmBackend
from qlm_env.backends.vllm.errors import ServerStartFailed
from qlm_env.backends.vllm.instance import Patience
from qlm_env.backends.vllm.provider import RunningServer, ServerProvider
from qlm_env.cluster import make_cluster
from tests.backends.toy_cluster import KV_BYTES_PER_TOKEN, WEIGHT_BYTES, toy_scenario
from tests.backends.vllm.fake_server import FakeServer
from tests.profiles.toy import toy_profile, write_profile

BLOCK_SIZE = 16
NUM_BLOCKS = 90


class FakeRunning(RunningServer):
    """A stand-in as a provider hands it out."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.url = server.url
        self.model_name = server.model
        self.api_key = server.api_key
        self.kv_store = server.kv_store
        self.stopped = False
        self.killed = False

    @property
    def exit_reason(self) -> str | None:
        return "it has ended" if self.stopped or self.server.has_died else None

    async def stop(self, kill: bool = False) -> None:
        if not self.stopped:
            self.stopped, self.killed = True, kill
            await asyncio.to_thread(self.server.__exit__, None, None, None)
            if self.kv_store is not None:
                shutil.rmtree(self.kv_store)


class FakeServers(ServerProvider):
    """Starts stand-ins whose time per token is that of a small model on a busy machine.

    Args:
        block_size, num_gpu_blocks, max_model_len: what the servers say they have.
        start_s: what a start takes.
        kv_store: takes the folders of the servers' KV connectors.
    """

    def __init__(
        self,
        block_size: int = BLOCK_SIZE,
        num_gpu_blocks: int = NUM_BLOCKS,
        max_model_len: int = 512,
        start_s: float = 0.15,
        can_stop: bool = True,
        kv_store: Path | None = None,
    ) -> None:
        self.can_stop = can_stop
        self.start_s = start_s
        self.refuse: set[int] = set()
        """Models that do not start."""
        self.started: list[tuple[int, int]] = []
        """(instance, model) of every start."""
        self.running: dict[tuple[int, int], FakeRunning] = {}
        """The last server of each."""
        self._kv_store = kv_store
        self._sizes = {"block_size": block_size, "num_gpu_blocks": num_gpu_blocks, "max_model_len": max_model_len}

    def now_running(self) -> set[tuple[int, int]]:
        return {pair for pair, server in self.running.items() if not server.stopped}

    async def start(self, instance: int, model: int) -> RunningServer:
        await asyncio.sleep(self.start_s)
        if model in self.refuse:
            raise ServerStartFailed(f"model {model} is not to start")
        folder = None if self._kv_store is None else self._kv_store / f"{instance}-{model}"
        if folder is not None:
            folder.mkdir(parents=True)
        server = FakeServer(model=f"m{model}", api_key="s3cret", kv_store=folder, **self._sizes)
        server.__enter__()
        self.started.append((instance, model))
        self.running[instance, model] = FakeRunning(server)
        return self.running[instance, model]

    def serves(self, instance: int, model: int) -> bool:
        return model < 4

    async def close(self) -> None:
        for server in self.running.values():
            await server.stop()


def fake_backend(
    folder: Path, provider: ServerProvider, patience: Patience | None = None, scheduling_policy: str = "fcfs"
) -> VllmBackend:
    """Two instances and four models, as the conformance suite wants them."""
    write_profile(folder, toy_profile(num_gpu_blocks=NUM_BLOCKS))
    instance = {"host_memory_gb": 2.5 * WEIGHT_BYTES / 1e9, "host_kv_gb": 119.5 * KV_BYTES_PER_TOKEN / 1e9}
    engine = {"scheduling_policy": scheduling_policy}
    scenario = toy_scenario(num_models=4, instances=[instance, instance], engine=engine)
    return VllmBackend(provider, lambda: make_cluster(scenario.cluster, scenario.workload.models, folder), patience)
