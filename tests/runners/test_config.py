"""From overrides to a validated configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from planners.spec import PLANNER_NAMES
from qlm_env.profiles import list_profiles
from qlm_env.spec import ConfigError, EnvironmentSpec, GammaArrivals, SloSpec, SyntheticWorkload, parse
from runners.composition import Request, group_options, read_schema
from runners.config import CompareConfig, RunOptions, parse_compare
from runners.episode import check_scenario

CONFIGS = Path(__file__).parents[2] / "configs"

PLACES = {
    "live_multi": "live_cpu",
    "w_a": "small",
    "w_a_13b": "small",
    "w_a_70b": "small_multi",
    "w_b": "small_multi",
    "w_c": "small",
    "azure_like": "small",
    "live": "small",
    "smoke": "smoke",
}
TRACES = ("azure_conv", "mooncake", "burstgpt")

Configure = Callable[..., CompareConfig]


@pytest.mark.parametrize(("value", "seeds"), [(3, (0, 1, 2)), (1, (0,)), ([4, 7], (4, 7)), ([5], (5,)), ([0], (0,))])
def test_seeds_are_a_count_or_a_list(value: object, seeds: tuple[int, ...]) -> None:
    assert parse(RunOptions, {"seeds": value, "out": "x"}).seeds == seeds


@pytest.mark.parametrize("value", [0, -1, [], [1, 1], [-1], 1.5, [1.5], [True], True, "all", ["0..9"], None])
def test_other_seeds_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"'seeds': expected a count of at least 1 or a list"):
        parse(RunOptions, {"seeds": value, "out": "x"})


def test_keys_the_files_do_not_mention_can_be_set(configure: Configure) -> None:
    config = configure(
        "workload.arrivals.kind=gamma",
        "workload.arrivals.cv=3",
        "cluster.engine.num_gpu_blocks=100",
        "cluster.instances.0.host_memory_gb=64",
        "slo.classes.1.target_s=90",
        "environment.costs.swap=0.01",
    )
    workload, cluster = config.scenario.workload, config.scenario.cluster
    assert isinstance(workload, SyntheticWorkload)
    assert workload.arrivals == GammaArrivals(kind="gamma", load=0.8, cv=3)
    assert cluster.engine.num_gpu_blocks == 100
    assert cluster.instances[0].host_memory_gb == 64
    assert config.scenario.slo.classes[1].target_s == 90
    assert config.scenario.environment.costs.swap == 0.01


def test_a_trace_is_chosen_with_its_path(configure: Configure) -> None:
    workload = configure("workload=azure_conv", "workload.path=/data/my trace.csv").scenario.workload
    assert workload.kind == "trace"
    assert workload.path == "/data/my trace.csv"


def test_another_kind_of_lengths_needs_only_its_own_keys(configure: Configure) -> None:
    workload = configure("workload.lengths.kind=lognormal", "workload.lengths.prompt_cv=2").scenario.workload
    assert isinstance(workload, SyntheticWorkload)
    assert workload.lengths.kind == "lognormal"


def test_planners_come_in_the_order_given(configure: Configure) -> None:
    assert list(configure("planner=[qlm,fcfs]").planners) == ["qlm", "fcfs"]
    assert list(configure("planner=edf").planners) == ["edf"]


def test_a_variant_of_a_planner_has_a_label_of_its_own(configure: Configure) -> None:
    planners = configure("planner=[fcfs]", "planner.fcfs_again.name=fcfs").planners
    assert list(planners) == ["fcfs", "fcfs_again"]
    assert planners["fcfs"] == planners["fcfs_again"]


def test_own_options_come_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "workload").mkdir()
    shipped = yaml.safe_load((CONFIGS / "workload" / "smoke.yaml").read_text())
    (tmp_path / "workload" / "mine.yaml").write_text(yaml.safe_dump({**shipped, "name": "mine"}))
    assert "mine" in group_options("workload", tmp_path)
    values = Request("compare", ("workload=mine",), tmp_path).compose()
    assert parse_compare(values).scenario.workload.name == "mine"


@pytest.mark.parametrize("group", ["cluster", "workload"])
def test_cluster_and_workload_files_are_plain_and_carry_their_name(group: str) -> None:
    for name in group_options(group):
        text = (CONFIGS / group / f"{name}.yaml").read_text()
        values = yaml.safe_load(text)
        assert values["name"] == name
        assert "defaults" not in values
        assert "${" not in text


@pytest.mark.parametrize("name", sorted(set(PLACES)))
def test_shipped_workloads_run_where_their_files_say(configure: Configure, name: str) -> None:
    config = configure(f"workload={name}", f"cluster={PLACES[name]}")
    check_scenario(config.scenario, 0)


def test_every_shipped_workload_is_tested() -> None:
    assert set(group_options("workload")) == {*PLACES, *TRACES}


def test_shipped_clusters_have_profiles_and_the_sizes_they_claim(configure: Configure) -> None:
    profiled = {(key.device, key.tp) for key in list_profiles()}
    gpus = {}
    for name in group_options("cluster"):
        groups = configure(f"cluster={name}").scenario.cluster.instances
        assert {(group.device, group.tp) for group in groups} <= profiled
        gpus[name] = {device: sum(g.count * g.tp for g in groups if g.device == device) for device in ("A10", "A100")}
    assert gpus == {
        "smoke": {"A10": 0, "A100": 2},
        "small": {"A10": 4, "A100": 4},
        "small_multi": {"A10": 4, "A100": 4},
        "paper": {"A10": 30, "A100": 50},
        "paper_multi": {"A10": 30, "A100": 50},
        "large": {"A10": 400, "A100": 600},
        "live_cpu": {"A10": 0, "A100": 0},
        "live_gpu": {"A10": 0, "A100": 4},
        "live_ray": {"A10": 0, "A100": 4},
    }


def test_every_planner_has_a_file_named_after_it() -> None:
    assert set(group_options("planner")) >= set(PLANNER_NAMES)
    for name in group_options("planner"):
        values = yaml.safe_load((CONFIGS / "planner" / f"{name}.yaml").read_text())
        assert list(values) == [name]
        # The others are QLM with something left out or costed otherwise.
        assert values[name]["name"] == (name if name in PLANNER_NAMES else "qlm")


def test_files_that_spell_out_defaults_agree_with_the_code(configure: Configure) -> None:
    scenario = configure().scenario
    assert scenario.slo == SloSpec()
    assert scenario.environment == EnvironmentSpec()
    spelt_out = yaml.safe_load((CONFIGS / "environment" / "default.yaml").read_text())
    assert list(spelt_out) == list(EnvironmentSpec.model_fields)


def test_schema_of_a_command() -> None:
    schema = read_schema("compare")
    assert schema.groups == ("cluster", "workload", "slo", "environment", "planner", "tracking")
    assert list(schema.settings) == ["seeds", "out", "jobs", "backend", "timeline"]
