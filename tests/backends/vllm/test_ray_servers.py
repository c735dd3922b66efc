"""Servers on a Ray cluster of this machine, played by a small script."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.errors import RequestRefused, ServerError, ServerStartFailed
from qlm_env.backends.vllm.launch import LaunchSettings
from qlm_env.backends.vllm.local_servers import LocalModel
from qlm_env.backends.vllm.provider import RunningServer
from qlm_env.backends.vllm.ray_servers import RayServers, Resources
from tests.backends.vllm.fake_interpreter import pids, write_interpreter
from tests.backends.vllm.test_server import is_running, until

SETTINGS = LaunchSettings(max_model_len=512, max_num_seqs=4, max_num_batched_tokens=128)


def make_servers(tmp_path: Path, num_gpus: int = 0, start_timeout_s: float = 60.0) -> RayServers:
    models = [LocalModel(name, tmp_path) for name in ("chat", "broken")]
    return RayServers(
        models,
        write_interpreter(tmp_path),
        tmp_path / "logs",
        lambda i, m: SETTINGS,
        lambda i: Resources(1, num_gpus),
        start_timeout_s=start_timeout_s,
    )


def test_without_ray_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ServerError, match=r"^'cluster.vllm.kind': ray needs the package: pip install 'qlm-env\[ray\]'$"
    ):
        make_servers(tmp_path)


def test_servers_on_a_ray_cluster(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    log = tmp_path / "logs" / "instance-0-chat.log"

    async def use() -> None:
        servers = make_servers(tmp_path)
        try:
            server = await servers.start(0, 0)
            assert server.exit_reason is None
            assert server.api_key
            async with VllmClient(server.url, server.api_key) as client:
                await client.get_json("/is_sleeping")
            async with VllmClient(server.url) as client:
                with pytest.raises(RequestRefused, match="API key"):
                    await client.get_json("/is_sleeping")

            os.kill(pids(log)[0], signal.SIGKILL)
            await asyncio.to_thread(until, lambda: server.exit_reason is not None)
            assert server.exit_reason is not None
            assert "ended with status" in server.exit_reason
            await server.stop()
            with pytest.raises(ServerStartFailed, match=r"ended with status 3 .*no memory left$"):
                await servers.start(0, 1)

            # An actor that is lost takes its servers along, and Ray starts it again.
            server = await servers.start(0, 0)
            processes = pids(log)
            ray.kill(servers._actors[0], no_restart=False)
            await asyncio.to_thread(until, lambda: server.exit_reason is not None)
            assert server.exit_reason is not None
            assert server.exit_reason.startswith(f"the Ray actor of {server.url} is lost")
            assert await asyncio.to_thread(until, lambda: not any(map(is_running, processes)), 30.0)
            await server.stop()
            again = await started(servers)
            assert again.exit_reason is None
        finally:
            await servers.close()

    asyncio.run(use())
    assert until(lambda: not any(map(is_running, pids(log))), 30.0)
    assert not ray.is_initialized()


async def started(servers: RayServers) -> RunningServer:
    """A server, as soon as its actor is back."""
    for _ in range(30):
        try:
            return await servers.start(0, 0)
        except ServerStartFailed:
            await asyncio.sleep(1.0)
    raise AssertionError


def test_devices_that_no_node_has_are_named(tmp_path: Path) -> None:
    pytest.importorskip("ray")

    async def use() -> None:
        servers = make_servers(tmp_path, num_gpus=7, start_timeout_s=1.0)
        try:
            with pytest.raises(ServerStartFailed, match=r"has 1 CPUs and 7 GPUs free for instance 0 within 1 s$"):
                await servers.start(0, 0)
        finally:
            await servers.close()

    asyncio.run(use())
