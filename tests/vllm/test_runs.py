"""`qlm compare backend=vllm` on servers of its own: as many requests as asked for, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from runners.cli import main
from tests.vllm.observed import until

PLANNERS = ["fcfs", "edf", "qlm"]
NUM_REQUESTS = 100


def overrides(out: Path, python: Path) -> list[str]:
    return [
        "cluster=live_cpu",
        "workload=live_multi",
        f"workload.num_requests={NUM_REQUESTS}",
        "seeds=1",
        f"out={out}",
        f"cluster.vllm.python={python}",
        f"cluster.vllm.out={out / 'servers'}",
    ]


def servers_of(folder: Path) -> list[int]:
    """Processes that serve a model which was made in the run's folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if process.name.isdigit() and str(folder).encode() in command and b"api_server" in command:
            found.append(int(process.name))
    return found


def test_planners_run_on_real_servers_as_on_emulated_ones(tmp_path: Path, vllm_python: Path) -> None:
    """Two instances, two models: every request finishes with exactly its tokens, and attainment is within 5 points."""
    out = tmp_path / "run"
    arguments = [*overrides(out, vllm_python), "backend=[emulator,vllm]", f"planner=[{','.join(PLANNERS)}]"]
    assert main(["compare", *arguments]) == 0
    rows = pd.read_parquet(out / "results.parquet")
    assert sorted(zip(rows["backend"], rows["planner"], strict=True)) == sorted(
        (backend, planner) for backend in ("emulator", "vllm") for planner in PLANNERS
    )
    assert (rows["finished"] == NUM_REQUESTS).all()
    assert rows["workload_hash"].nunique() == 1
    attained = rows.pivot(index="planner", columns="backend", values="slo_attainment")
    assert ((attained["vllm"] - attained["emulator"]).abs() <= 0.05).all(), attained
    assert (out / "backends.md").is_file()
    assert all((out / f"backends-{planner}.png").is_file() for planner in PLANNERS)
    assert servers_of(tmp_path) == []


def test_ctrl_c_stops_the_servers_of_a_run(tmp_path: Path, vllm_python: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "runners",
        "compare",
        *overrides(out, vllm_python),
        "backend=vllm",
        "planner=[fcfs]",
    ]
    with (tmp_path / "printed").open("wb") as printed:
        run = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=os.environ)
        try:
            assert until(lambda: len(servers_of(tmp_path)) >= 2, seconds=120.0)
            time.sleep(5.0)
            run.send_signal(signal.SIGINT)
            status = run.wait(timeout=120.0)
        finally:
            run.kill()
    assert status != 0
    assert "Traceback" not in (tmp_path / "printed").read_text()
    assert until(lambda: servers_of(tmp_path) == []), "servers are left"
