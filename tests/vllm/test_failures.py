"""Real servers killed and stopped in the middle of a run: everything finishes, and nothing is left."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qlm_env.backends.base import BackendEvent, EventKind
from qlm_env.backends.vllm.backend import VllmBackend
from qlm_env.requests import FINISHED, NOWHERE, WAITING
from tests.backends.conformance import make_requests
from tests.vllm.observed import PATIENCE_S, until, wait_for, wait_for_tokens


def processes_of(port: int) -> dict[int, str]:
    """The server's processes by id: the API server has the port on its command line, the others descend from it."""
    parents, names, roots = {}, {}, []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            name = (folder / "comm").read_text().strip()
        except OSError:
            continue
        if status[0] == "Z":
            continue
        pid = int(folder.name)
        parents[pid], names[pid] = int(status[1]), name
        if (
            str(port).encode() in words
            and b"vllm.entrypoints.openai.api_server" in words
            and b"guard.py" not in words[1]
        ):
            roots.append(pid)
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found}


def run_to_the_end(backend: VllmBackend) -> list[BackendEvent]:
    """Pull whatever waits where it can run, load model 0 where nothing is loaded."""
    told: list[BackendEvent] = []
    requests, engine = backend.requests, backend.fleet.engine
    deadline_s = backend.now_s + PATIENCE_S
    while (requests["state"] != FINISHED).any():
        assert backend.now_s < deadline_s
        for i in range(len(engine)):
            if engine["up"][i] and engine["active_model"][i] == NOWHERE and engine["swap_target"][i] == NOWHERE:
                backend.swap_model(i, 0)
            for r in range(len(requests)):
                if requests["state"][r] <= WAITING and requests["instance"][r] == NOWHERE and backend.has_room(i, r):
                    backend.pull(i, r)
        told += backend.advance(backend.now_s + 1.0)
    return told


@pytest.mark.parametrize("victim", ["the API server", "the engine"])
def test_a_killed_server_loses_nothing(cluster: VllmBackend, victim: str) -> None:
    requests = make_requests(*[(20, 200)] * 10)
    cluster.reset(requests)
    port = urlsplit(cluster.servers()[0, 0].url).port
    assert port is not None
    processes = processes_of(port)
    assert len(processes) >= 2
    for r in range(4):
        cluster.pull(0, r)
    wait_for_tokens(cluster, 0, 5)
    engines = [pid for pid, name in processes.items() if "Engine" in name]
    os.kill(engines[0] if victim == "the engine" else min(processes), signal.SIGKILL)
    told = run_to_the_end(cluster)
    kinds = [event.kind for event in told if event.instance == 0]
    assert EventKind.DOWN in kinds
    assert EventKind.UP in kinds
    assert (requests["generated_tokens"] == 200).all()
    finished = sorted(event.subject for event in told if event.kind == EventKind.FINISHED)
    assert finished == sorted(set(finished))
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes)), "an orphan"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_a_told_failure_kills_every_process(cluster: VllmBackend) -> None:
    cluster.reset(make_requests((20, 50)))
    port = urlsplit(cluster.servers()[1, 0].url).port
    assert port is not None
    processes = processes_of(port)
    assert processes
    cluster.fail(1)
    wait_for(cluster, EventKind.DOWN)
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
