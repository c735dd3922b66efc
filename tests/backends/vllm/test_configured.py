"""What a configuration makes of servers, before any is started."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from qlm_env.backends.vllm.build import make_backend
from qlm_env.backends.vllm.cluster_state import ClusterState, ServerState, kept, write_state
from qlm_env.backends.vllm.configured import launch_settings, make_provider
from qlm_env.backends.vllm.errors import ServerStartFailed
from qlm_env.backends.vllm.launch import LaunchSettings, arguments, environment
from qlm_env.backends.vllm.local_servers import LocalServers
from qlm_env.backends.vllm.model_folders import made_shape, model_folders
from qlm_env.backends.vllm.models import write_random_llama
from qlm_env.backends.vllm.provider import ServerProvider
from qlm_env.cluster import make_cluster
from qlm_env.presets import load_preset, make_scenario
from qlm_env.spec import ConfigError, ModelSpec, ScenarioSpec
from qlm_env.vllm_spec import GivenVllm, LocalVllm, RayVllm

A100 = {"device": "A100", "count": 2, "host_kv_gb": 4.294967296}
TINY = {"preset": "live_multi"}
LLAMA = {"preset": "w_a", "models": [{"name": "vicuna-7b", "architecture": "llama-2-7b", "context_tokens": 4096}]}


def scenario_of(vllm: dict[str, Any] | None, workload: dict[str, Any] = TINY, **cluster: Any) -> ScenarioSpec:
    return make_scenario(load_preset("cluster", "live_cpu") | cluster | {"vllm": vllm}, workload)


def provider_of(scenario: ScenarioSpec) -> ServerProvider:
    models = scenario.workload.models
    return make_provider(scenario.cluster, models, make_cluster(scenario.cluster, models))


def settings_of(scenario: ScenarioSpec, instance: int) -> LaunchSettings:
    spec = scenario.cluster.vllm
    assert spec is not None
    assert not isinstance(spec, GivenVllm)
    return launch_settings(scenario.cluster, spec, scenario.workload.models)(instance, 0)


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Any]:
    """Servers started here, by an interpreter that exists."""
    python = tmp_path / "python"
    python.touch()
    return {"kind": "local", "python": str(python), "out": str(tmp_path / "out")}


# --------------------------------------------------------------------------- settings
def test_a_server_on_cpus_has_the_engine_of_the_cluster(local: dict[str, Any]) -> None:
    settings = settings_of(scenario_of(local | {"cpus_per_instance": 2, "arguments": ["--seed", "1"]}), 1)
    words = arguments(settings)
    given = dict(itertools.pairwise(words))
    assert given["--max-num-seqs"] == "8"
    assert given["--max-num-batched-tokens"] == "512"
    assert given["--block-size"] == "128"
    assert given["--num-gpu-blocks-override"] == "65"
    assert given["--max-model-len"] == "1024"
    assert words[-2:] == ("--seed", "1")
    assert {"--no-async-scheduling", "--enable-chunked-prefill", "--enable-prefix-caching"} <= set(words)
    assert not {"--tensor-parallel-size", "--enable-sleep-mode", "--kv-offloading-size"} & set(words)
    variables = dict(environment(settings))
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert given["--middleware"] == "qlm_require_key.RequireKey"
    assert (Path(variables["PYTHONPATH"].split(os.pathsep)[0]) / "qlm_require_key.py").is_file()


def test_a_server_on_gpus_has_devices_sleep_mode_and_offloading(local: dict[str, Any]) -> None:
    instances = [A100 | {"tp": 4, "count": 1}, A100]
    spec = local | {"gpus": [7, 6, 5, 4, 3, 2], "environment": {"NCCL_DEBUG": "WARN"}}
    scenario = scenario_of(spec, LLAMA, instances=instances, engine={"async_scheduling": True})
    devices = []
    for instance in range(3):
        settings = settings_of(scenario, instance)
        words = arguments(settings)
        given = dict(itertools.pairwise(words))
        assert given["--kv-offloading-size"] == "4.0"
        assert {"--enable-sleep-mode", "--async-scheduling"} <= set(words)
        assert not {"--enforce-eager", "--num-gpu-blocks-override"} & set(words)
        variables = dict(environment(settings))
        assert variables["NCCL_DEBUG"] == "WARN"
        assert "VLLM_CPU_KVCACHE_SPACE" not in variables
        devices.append((variables["CUDA_VISIBLE_DEVICES"], given["--tensor-parallel-size"]))
    assert devices == [("7,6,5,4", "4"), ("3", "1"), ("2", "1")]
    with pytest.raises(ConfigError, match=r"'cluster.vllm.gpus': the instances need 6 GPUs \(got 2\)"):
        settings_of(scenario_of(local | {"gpus": [0, 1]}, LLAMA, instances=instances), 0)


def test_ray_knows_which_cores_are_free() -> None:
    settings = settings_of(scenario_of({"kind": "ray", "cpus_per_instance": 2}), 1)
    assert dict(environment(settings))["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


# --------------------------------------------------------------------------- models
def test_small_models_are_made_once_and_differ(tmp_path: Path) -> None:
    spec = LocalVllm(out=str(tmp_path))
    models = [ModelSpec(name=name, architecture="tiny", context_tokens=8192) for name in ("chat", "code")]
    folders = model_folders(spec, models)
    weights = [(folder / "model.safetensors") for folder in folders]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    written_ns = [path.stat().st_mtime_ns for path in weights]
    assert model_folders(spec, models) == folders
    assert [path.stat().st_mtime_ns for path in weights] == written_ns
    other = [ModelSpec(name="chat", architecture="tiny", context_tokens=16384)]
    with pytest.raises(ConfigError, match="chat' holds another model; remove it, or choose another folder"):
        model_folders(spec, other)


def test_a_folder_of_ones_own_is_checked(tmp_path: Path) -> None:
    write_random_llama(tmp_path, made_shape("tiny", 4096))
    spec = RayVllm(kind="ray", model_folders={"mine": str(tmp_path)})
    assert model_folders(spec, [ModelSpec(name="mine", architecture="any", context_tokens=4096)]) == [tmp_path]
    with pytest.raises(ConfigError, match=r"'context_tokens' of model 'mine' is 4097, but the model in .* takes 4096$"):
        model_folders(spec, [ModelSpec(name="mine", architecture="any", context_tokens=4097)])
    with pytest.raises(ConfigError, match="no folder for model 'other'; only models of architecture tiny are made"):
        model_folders(spec, [ModelSpec(name="other", architecture="any")])


# --------------------------------------------------------------------------- providers
def test_local_servers_keep_kv_in_a_folder_only_on_cpus(local: dict[str, Any]) -> None:
    provider = provider_of(scenario_of(local))
    assert isinstance(provider, LocalServers)
    assert provider._kv_store_folder is not None
    assert not provider._kv_store_folder.exists()
    provider = provider_of(scenario_of(local | {"kv_store": "prefix_cache"}))
    assert isinstance(provider, LocalServers)
    assert provider._kv_store_folder is None
    mixed = [{"device": "CPU"}, A100]
    with pytest.raises(ConfigError, match="auto is different on CPUs and GPUs; name one"):
        provider_of(scenario_of(local, instances=mixed))


def state(folder: Path, *servers: ServerState) -> None:
    write_state(folder, ClusterState(cluster="c", keeper_pid=1, started_s=0.0, phase="up", servers=servers))


def test_servers_of_a_kept_cluster(tmp_path: Path) -> None:
    scenario = scenario_of({"kind": "local", "state": str(tmp_path)})
    up = ServerState(instance=0, instance_name="0", model="code", phase="up", url="http://h", api_key="k")
    with pytest.raises(ConfigError, match=f"no cluster is up in '{tmp_path}'"):
        provider_of(scenario)
    with kept(tmp_path):
        state(tmp_path, up, up.model_copy(update={"instance": 1, "phase": "restarting"}))
        provider = provider_of(scenario)
        assert [provider.serves(i, m) for i in (0, 1) for m in (0, 1)] == [False, True, False, True]
        with pytest.raises(ServerStartFailed, match="the server of model 1 for instance 1 is not up"):
            asyncio.run(provider.start(1, 1))
    # It is not a mistake of the configuration when the cluster goes away meanwhile.
    with pytest.raises(ServerStartFailed, match="no cluster is up"):
        asyncio.run(provider.start(0, 1))


def test_a_backend_needs_servers_and_the_initial_models() -> None:
    without = scenario_of(None)
    with pytest.raises(ConfigError, match=r"^'cluster.vllm': cluster 'live_cpu' does not say where .*=live_cpu is an"):
        make_backend(without, lambda: make_cluster(without.cluster, without.workload.models))
    urls = [{"instance": i, "model": "chat", "url": f"http://h{i}"} for i in (0, 1)]
    given = scenario_of({"kind": "urls", "servers": urls})
    with pytest.raises(ConfigError, match="instance 1 begins with model 'code', of which it has no server"):
        make_backend(given, lambda: make_cluster(given.cluster, given.workload.models))
    instances = [{"device": "CPU", "count": 2, "initial_model": "chat"}]
    given = scenario_of({"kind": "urls", "servers": urls}, instances=instances)
    make_backend(given, lambda: make_cluster(given.cluster, given.workload.models)).close()


def test_a_named_key_has_to_be_set(monkeypatch: pytest.MonkeyPatch, local: dict[str, Any]) -> None:
    monkeypatch.delenv("QLM_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="api_key_env': the environment variable QLM_TEST_KEY is not set"):
        provider_of(scenario_of(local | {"api_key_env": "QLM_TEST_KEY"}))
