"""What a configuration may say of real servers."""

from __future__ import annotations

from typing import Any

import pytest

from qlm_env.presets import load_preset, make_scenario, preset_names
from qlm_env.spec import ClusterSpec, ConfigError, parse
from qlm_env.vllm_spec import GivenVllm, LocalVllm, RayVllm

GIVEN = {"kind": "urls", "servers": [{"instance": 0, "model": "chat", "url": "http://127.0.0.1:8000"}]}


def cluster(vllm: dict[str, Any] | None) -> ClusterSpec:
    return parse(ClusterSpec, {"instances": [{"device": "CPU", "count": 2}], "vllm": vllm}, "cluster")


@pytest.mark.parametrize(
    ("vllm", "kind"), [({"kind": "local"}, LocalVllm), ({"kind": "ray"}, RayVllm), (GIVEN, GivenVllm)]
)
def test_three_ways_to_get_servers(vllm: dict[str, Any], kind: type) -> None:
    made = cluster(vllm)
    assert type(made.vllm) is kind
    assert parse(ClusterSpec, made.model_dump()) == made
    assert cluster(None).vllm is None


@pytest.mark.parametrize(
    ("vllm", "expected"),
    [
        ({"kind": "kubernetes"}, "'cluster.vllm': .*'local', 'ray', 'urls'"),
        ({"state": "results/cluster"}, "^missing key 'cluster.vllm.kind'$"),
        ({"kind": "local", "pyton": "x"}, r"unknown key 'cluster.vllm.pyton'; .* \(did you mean 'python'\?\)"),
        ({"kind": "local", "base_port": 80}, "'cluster.vllm.base_port': .* greater than or equal to 1024"),
        ({"kind": "urls", "servers": []}, "'cluster.vllm.servers': .*at least 1"),
        ({"kind": "urls", "servers": [{"instance": 0, "model": "a"}]}, "missing key 'cluster.vllm.servers.0.url'"),
        (
            {"kind": "urls", "servers": [{"instance": 2, "model": "a", "url": "http://h"}]},
            r"vllm.servers names instance 2, but the cluster has instances 0\.\.1",
        ),
        (
            {"kind": "urls", "servers": [{"instance": i, "model": "a", "url": "http://h"} for i in (0, 1)]},
            "url 'http://h' is defined more than once",
        ),
        (
            {"kind": "urls", "servers": [{"instance": 0, "model": "a", "url": f"http://{h}"} for h in "gh"]},
            "server of 'a on instance 0' is defined more than once",
        ),
    ],
)
def test_a_mistake_is_one_line(vllm: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        cluster(vllm)


@pytest.mark.parametrize(
    "vllm",
    [
        {"kind": "local", "arguments": ["--api-key", "hunter2"]},
        {"kind": "ray", "arguments": ["--api_key=hunter2"]},
        {"kind": "local", "environment": {"VLLM_API_KEY": "hunter2"}},
        {"kind": "local", "environment": {"hf_token": "hunter2"}},
        {"kind": "urls", "servers": [{"instance": 0, "model": "a", "url": "http://me:hunter2@host"}]},
    ],
)
def test_no_secret_gets_into_a_configuration(vllm: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster(vllm)
    assert "hunter2" not in str(caught.value)


def test_servers_name_models_of_the_workload() -> None:
    values = load_preset("cluster", "live_cpu") | {"vllm": GIVEN}
    make_scenario(values, "live_multi")
    values["vllm"] = {"kind": "urls", "servers": [{"instance": 0, "model": "chad", "url": "http://h"}]}
    with pytest.raises(ConfigError, match=r"names model 'chad'; allowed: chat, code \(did you mean 'chat'\?\)"):
        make_scenario(values, "live_multi")


def test_every_preset_with_servers_is_valid() -> None:
    kinds = {name: parse(ClusterSpec, load_preset("cluster", name)).vllm for name in preset_names("cluster")}
    assert {name for name, vllm in kinds.items() if vllm is not None} == {"live_cpu", "live_gpu", "live_ray"}


def test_profiles_of_a_folder_come_first(tmp_path: Any) -> None:
    from qlm_env.cluster import make_cluster
    from qlm_env.profiles import load_profile
    from qlm_env.profiles.load import profile_yaml

    shipped = load_profile("CPU", "tiny", 1)
    slower = shipped.model_copy(update={"c0_s": shipped.c0_s.model_copy(update={"value": 0.5})})
    (tmp_path / "cpu_tiny_tp1.yaml").write_text(profile_yaml(slower, "A test."))
    scenario = make_scenario(load_preset("cluster", "live_cpu") | {"profile_folder": str(tmp_path)}, "live_multi")
    fleet = make_cluster(scenario.cluster, scenario.workload.models)
    assert fleet.placement["c0"].min() == 0.5
    with pytest.raises(ConfigError, match="profile directory nope does not exist"):
        make_cluster(scenario.cluster.model_copy(update={"profile_folder": "nope"}), scenario.workload.models)
