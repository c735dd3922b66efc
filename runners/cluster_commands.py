"""`qlm cluster up|status|down`: vLLM servers that outlive one run, and how they stand."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.cluster_state import (
    STATE_FILE,
    ClusterState,
    ServerState,
    already_up,
    is_kept,
    read_running,
    read_state,
)
from qlm_env.backends.vllm.configured import make_provider
from qlm_env.backends.vllm.errors import ServerError
from qlm_env.backends.vllm.facts import KV_USAGE, RUNNING, WAITING, metric_sum, parse_metrics
from qlm_env.cluster import make_cluster
from qlm_env.spec import ConfigError
from runners import cluster_keeper
from runners.cluster_config import FolderOptions, UpConfig
from runners.cluster_keeper import REQUEST_FILE, UpRequest, plan_servers
from runners.errors import CommandFailed
from runners.files import write_text
from runners.progress import CountedProgress
from runners.tables import console

KEEPER_LOG = "keeper.log"
POLL_S = 0.3
STOP_TIMEOUT_S = 60.0
"""For a keeper to stop its servers, before it is killed; they end with it."""

ASK_TIMEOUT_S = 10.0


# --------------------------------------------------------------------------- up
def up(config: UpConfig) -> None:
    """Start a keeper, wait until its servers are healthy, and leave them running.

    Raises:
        ConfigError: a cluster is up there, or the configuration asks for what is not there.
        CommandFailed: a server could not be started; what had been is stopped.
    """
    folder, scenario = config.out, config.scenario
    if is_kept(folder):
        raise ConfigError(already_up(folder))
    models = scenario.workload.models
    planned = plan_servers(scenario, config.servers)
    # Only to be told what is missing before a process of its own is.
    make_provider(scenario.cluster, models, make_cluster(scenario.cluster, models))
    (folder / STATE_FILE).unlink(missing_ok=True)
    write_text(folder / REQUEST_FILE, UpRequest(scenario=scenario, servers=config.servers).model_dump_json(indent=1))
    keeper = _start_keeper(folder)
    print(f"starting {len(planned)} servers; their logs are in {folder / 'logs'}", file=sys.stderr)
    try:
        state = _until_up(folder, keeper, len(planned))
    except BaseException:
        _stop_keeper(keeper.pid, lambda: keeper.poll() is not None)
        (folder / STATE_FILE).unlink(missing_ok=True)
        raise
    for server in state.servers:
        print(f"{server.instance_name}  {server.model}  {server.url}")
    print(
        f"up; use it with cluster.vllm.state={folder}, look at it with `qlm cluster status out={folder}`, "
        f"stop it with `qlm cluster down out={folder}`",
        file=sys.stderr,
    )


def _start_keeper(folder: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own, which neither the terminal's Ctrl-C nor its end reaches."""
    with (folder / KEEPER_LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", cluster_keeper.__name__, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _until_up(folder: Path, keeper: subprocess.Popen[bytes], total: int) -> ClusterState:
    told: set[tuple[int, str]] = set()
    begin_s = time.monotonic()
    with CountedProgress("servers", total) as progress:
        while True:
            ended = keeper.poll() is not None
            state = read_state(folder)
            for server in state.servers if state is not None else ():
                if server.phase == "up" and (server.instance, server.model) not in told:
                    told.add((server.instance, server.model))
                    elapsed_s = time.monotonic() - begin_s
                    progress.advance(f"{server.instance_name}: {server.model} is up after {elapsed_s:.0f} s")
            if state is not None and state.phase == "up":
                return state
            if ended:
                raise CommandFailed((state and state.error) or _last_line(folder / KEEPER_LOG))
            time.sleep(POLL_S)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"the keeper ended without a word ({log})")


# --------------------------------------------------------------------------- down
def down(options: FolderOptions) -> None:
    """Stop a cluster, with all its servers.

    Raises:
        ConfigError: none is up there.
        CommandFailed: it does not end.
    """
    folder = Path(options.out)
    state = read_running(folder)
    _stop_keeper(state.keeper_pid, lambda: not is_kept(folder))
    (folder / STATE_FILE).unlink(missing_ok=True)
    print(f"{len(state.servers)} servers are stopped", file=sys.stderr)


def _stop_keeper(pid: int, has_ended: Callable[[], bool]) -> None:
    """Ask the keeper to end, and kill it if it does not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if has_ended():
            return
        os.kill(pid, number)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while not has_ended() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    if not has_ended():
        raise CommandFailed(f"the cluster's keeper, process {pid}, does not end")


# --------------------------------------------------------------------------- status
class Standing(NamedTuple):
    """What a server says of itself."""

    awake: str
    running: str
    waiting: str
    kv_use: str


UNKNOWN = Standing("-", "-", "-", "-")


def status(options: FolderOptions) -> None:
    """Print how every server of a cluster stands.

    Raises:
        ConfigError: none is up there.
    """
    state = read_running(Path(options.out))
    standings = asyncio.run(_ask_all(state))
    rows = [
        [
            server.instance_name,
            server.model,
            server.url or "-",
            server.phase,
            *standing,
            _duration(server.healthy_since_s),
            server.error or "",
        ]
        for server, standing in zip(state.servers, standings, strict=True)
    ]
    columns = ["instance", "model", "url", "process", "model is", "running", "waiting", "KV use", "for", "last error"]
    table = Table(*columns, title=f"{state.cluster}, up for {_duration(state.started_s)}")
    for row in rows:
        table.add_row(*row)
    console().print(table)


async def _ask_all(state: ClusterState) -> list[Standing]:
    return list(await asyncio.gather(*(_ask(server) for server in state.servers)))


async def _ask(server: ServerState) -> Standing:
    if server.url is None or server.phase != "up":
        return UNKNOWN
    try:
        async with VllmClient(server.url, server.api_key, ASK_TIMEOUT_S) as client:
            sleeps = (await client.get_json("/is_sleeping"))["is_sleeping"]
            samples = parse_metrics(await client.get_text("/metrics"))
    except ServerError:
        return UNKNOWN._replace(awake="silent")
    return Standing(
        "asleep" if sleeps else "awake",
        f"{metric_sum(samples, RUNNING):.0f}",
        f"{metric_sum(samples, WAITING):.0f}",
        f"{metric_sum(samples, KV_USAGE):.0%}",
    )


def _duration(since_s: float | None) -> str:
    if since_s is None:
        return "-"
    minutes, seconds = divmod(int(max(0.0, time.time() - since_s)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
