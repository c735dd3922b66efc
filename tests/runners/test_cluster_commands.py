"""`qlm cluster`: a cluster that outlives the command, of servers that are played by a small script."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlm_env.backends.vllm.cluster_state import ClusterState, is_kept, kept, read_running, read_state
from qlm_env.backends.vllm.configured import make_provider
from qlm_env.cluster import make_cluster
from qlm_env.presets import load_preset, make_scenario
from qlm_env.spec import ConfigError
from runners.cli import main
from runners.cluster_config import parse_up
from runners.composition import Request
from tests.backends.vllm.fake_interpreter import pids, write_interpreter
from tests.backends.vllm.test_server import is_running, until

Up = Callable[..., list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of the cluster; whatever is left of it is stopped."""
    yield tmp_path / "cluster"
    if is_kept(tmp_path / "cluster"):
        assert main(["cluster", "down", f"out={tmp_path / 'cluster'}"]) == 0


@pytest.fixture
def up(folder: Path, tmp_path: Path) -> Up:
    """The command line of `qlm cluster up`, with further overrides."""
    python = write_interpreter(tmp_path)

    def command(*overrides: str) -> list[str]:
        return ["cluster", "up", f"out={folder}", f"cluster.vllm.python={python}", *overrides]

    return command


def server_pids(folder: Path) -> list[int]:
    return [pid for log in (folder / "logs").glob("*.log") for pid in pids(log)]


def state_of(folder: Path) -> ClusterState:
    state = read_state(folder)
    assert state is not None
    return state


def test_a_cluster_from_up_to_down(folder: Path, up: Up, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(up()) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert f"cluster.vllm.state={folder}" in err
    state = read_running(folder)
    assert {(server.instance, server.model, server.phase) for server in state.servers} == {
        (i, model, "up") for i in (0, 1) for model in ("chat", "code")
    }
    assert stat.S_IMODE((folder / "cluster.json").stat().st_mode) == 0o600
    keys = {server.api_key for server in state.servers}
    assert all(key and key not in out + err + repr(state) for key in keys)
    processes = server_pids(folder)
    assert len(processes) == 8
    assert all(map(is_running, processes))

    assert main(up()) == 2
    assert f"a cluster is up in '{folder}'" in capsys.readouterr().err
    assert main(["cluster", "status", f"out={folder}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "http" in line]
    assert sorted("asleep" in line for line in lines) == [False, False, True, True]
    assert all(" 3 " in line and " 2 " in line and " 25% " in line for line in lines)

    assert main(["cluster", "down", f"out={folder}"]) == 0
    assert until(lambda: not any(map(is_running, processes)))
    assert read_state(folder) is None
    for command in ("status", "down"):
        capsys.readouterr()
        assert main(["cluster", command, f"out={folder}"]) == 2
        assert f"no cluster is up in '{folder}'; `qlm cluster up out={folder}` starts one" in capsys.readouterr().err


def test_a_run_uses_the_servers_and_leaves_them(folder: Path, up: Up) -> None:
    assert main(up("servers=initial")) == 0
    values = load_preset("cluster", "live_cpu")
    scenario = make_scenario(values | {"vllm": values["vllm"] | {"state": str(folder)}}, "live_multi")
    models = scenario.workload.models
    provider = make_provider(scenario.cluster, models, make_cluster(scenario.cluster, models))
    assert not provider.can_stop
    assert [[provider.serves(i, m) for m in (0, 1)] for i in (0, 1)] == [[True, False], [False, True]]
    asyncio.run(provider.close())
    assert all(map(is_running, server_pids(folder)))


def test_a_server_that_dies_is_started_again(folder: Path, up: Up) -> None:
    assert main(up()) == 0
    victim = next(server for server in state_of(folder).servers if server.instance == 0)
    first, second = (folder / "logs" / f"instance-0-{victim.model}-{start}.log" for start in (1, 2))
    os.kill(pids(first)[0], signal.SIGKILL)
    assert until(lambda: any(server.error for server in state_of(folder).servers), 10.0)
    assert until(lambda: all(server.phase == "up" for server in state_of(folder).servers), 20.0)
    again = next(server for server in state_of(folder).servers if server.instance == 0 and server.model == victim.model)
    assert again.error is not None
    assert "ended with status" in again.error
    assert all(map(is_running, pids(second)))
    assert not any(map(is_running, pids(first)))


def test_servers_end_with_their_keeper(folder: Path, up: Up, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(up("servers=initial")) == 0
    os.kill(state_of(folder).keeper_pid, signal.SIGKILL)
    assert until(lambda: not any(map(is_running, server_pids(folder))), 20.0)
    capsys.readouterr()
    assert main(["cluster", "status", f"out={folder}"]) == 2
    assert "no cluster is up" in capsys.readouterr().err
    assert main(up("servers=initial")) == 0


def test_a_server_that_cannot_start_stops_all(
    folder: Path, up: Up, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["workload.models.1.name=broken", *(f"workload.mix.{i}.model=broken" for i in (3, 4, 5))]
    assert main(up(*models)) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("qlm: error"))
    assert "ended with status 3 before it was ready" in error
    assert error.endswith("loading | RuntimeError: no memory left")
    assert not is_kept(folder)
    assert read_state(folder) is None
    assert not any(map(is_running, server_pids(folder)))


def test_interrupting_up_stops_what_has_started(folder: Path, up: Up) -> None:
    slow = up("servers=initial", "cluster.vllm.max_starting=1")
    command = subprocess.Popen([sys.executable, "-m", "runners", *slow], cwd=Path(__file__).parents[2])
    assert until(lambda: server_pids(folder) != [], 60.0)
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 130
    assert until(lambda: not is_kept(folder))
    assert not any(map(is_running, server_pids(folder)))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("cluster.vllm.python=/nope/python",), "'cluster.vllm.python': no interpreter /nope/python; `make vllm-env`"),
        (("cluster.vllm.model_folders.chat=/nope",), "'cluster.vllm.model_folders.chat': no folder /nope"),
        (("cluster.vllm.api_key_env=QLM_NO_SUCH_KEY",), "the environment variable QLM_NO_SUCH_KEY is not set"),
        (("cluster.vllm.kv_store=host_memory",), "'cluster.vllm.kv_store': host_memory needs GPUs"),
        (("cluster=live_gpu", "workload=w_a"), "'cluster.vllm.model_folders': no folder for model 'vicuna-7b'"),
        (("cluster.instances.0.device=A100",), "model 'chat' (tiny, 0.0e9 bytes of weights) fits no instance"),
        (("cluster.instances.0.host_memory_gb=0.001",), "more than its host memory of 0.0e9; give servers=initial"),
        (("servers=some",), "'servers': input should be 'all' or 'initial'"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(
    overrides: tuple[str, ...], expected: str, folder: Path, up: Up, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(up(*overrides)) == 2
    assert expected in capsys.readouterr().err
    assert read_state(folder) is None


def test_a_cluster_without_servers_to_start_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "up", "cluster=small", "workload=w_a", f"out={folder}"]) == 2
    assert "'cluster.vllm': cluster 'small' does not say where its vLLM servers come from" in capsys.readouterr().err
    values = Request("cluster_up", ()).compose()
    values["cluster"]["vllm"] = {"kind": "urls", "servers": [{"instance": 0, "model": "chat", "url": "http://h"}]}
    with pytest.raises(ConfigError, match="servers given as urls are up already; allowed: local, ray"):
        parse_up(values)


def test_a_folder_has_one_keeper(tmp_path: Path) -> None:
    with kept(tmp_path):
        assert is_kept(tmp_path)
        begin_s = time.monotonic()
        with pytest.raises(ConfigError, match="a cluster is up in"), kept(tmp_path):
            pass
        assert time.monotonic() - begin_s < 5.0
    assert not is_kept(tmp_path)


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"cluster": 1}')
    with pytest.raises(ConfigError, match=r"cluster.json' is not the state of a cluster"):
        read_state(tmp_path)
