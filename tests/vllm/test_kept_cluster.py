"""`qlm cluster` with real servers: a backend uses them and leaves them, and nothing is left after `down`."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from qlm_env.backends.base import EventKind
from qlm_env.backends.vllm.build import make_backend
from qlm_env.cluster import make_cluster
from qlm_env.presets import load_preset, make_scenario
from qlm_env.scenario import Episodes
from runners.cli import main
from tests.vllm.conftest import PYTHON_VARIABLE

NUM_REQUESTS = 8


def test_a_cluster_from_up_to_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = os.environ.get(PYTHON_VARIABLE)
    if not python:
        pytest.skip(f"{PYTHON_VARIABLE} names no interpreter with vLLM")
    folder = tmp_path / "cluster"
    assert main(["cluster", "up", f"out={folder}", f"cluster.vllm.python={python}", "servers=initial"]) == 0
    try:
        servers = json.loads((folder / "cluster.json").read_text())["servers"]
        keys = [server["api_key"] for server in servers]
        printed = "".join(path.read_text(errors="replace") for path in (folder / "logs").iterdir())
        assert all(keys)
        assert not any(key in printed for key in keys)

        run_requests(folder)
        capsys.readouterr()
        assert main(["cluster", "status", f"out={folder}"]) == 0
        assert capsys.readouterr().out.count("awake") == len(servers) == 2
    finally:
        assert main(["cluster", "down", f"out={folder}"]) == 0
    for server in servers:
        with socket.socket() as probe:
            assert probe.connect_ex((urlsplit(server["url"]).hostname, urlsplit(server["url"]).port)) != 0


def run_requests(folder: Path) -> None:
    """Every request runs on the instance that has its model, through servers that are given."""
    cluster = load_preset("cluster", "live_cpu")
    cluster["vllm"] |= {"state": str(folder)}
    scenario = make_scenario(cluster, {"preset": "live_multi", "num_requests": NUM_REQUESTS})
    requests = Episodes(scenario).requests(0)
    backend = make_backend(scenario, lambda: make_cluster(scenario.cluster, scenario.workload.models))
    try:
        backend.reset(requests)
        for request, model in enumerate(requests["model"].tolist()):
            instance = int(np.flatnonzero(backend.fleet.engine["active_model"] == model)[0])
            backend.pull(instance, request)
        finished = 0
        while finished < NUM_REQUESTS:
            events = backend.advance(backend.now_s + 60.0)
            assert events, "nothing happened for a minute"
            assert {event.kind for event in events} == {EventKind.FINISHED}
            finished += len(events)
        assert (requests["generated_tokens"] == requests["output_tokens"]).all()
    finally:
        backend.close()
