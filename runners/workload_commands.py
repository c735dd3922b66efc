"""`qlm workload describe` and `qlm workload export`: look at the requests an episode would serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlm_env.requests import workload_hash
from qlm_env.workload import LengthSummary, describe, to_parquet
from runners.config import WorkloadConfig
from runners.episode import build_workload
from runners.tables import console, mapping_table


def describe_workload(config: WorkloadConfig) -> None:
    """Print what the requests of one seed look like.

    Raises:
        ConfigError: the workload cannot be built as configured.
    """
    scenario = config.scenario
    description = describe(build_workload(scenario, config.seed), scenario.workload, scenario.slo)
    title = f"{scenario.workload.name}, seed {config.seed}, for {scenario.cluster.name}"
    console().print(mapping_table(_flatten(dataclasses.asdict(description)), title))


def export_workload(config: WorkloadConfig) -> None:
    """Write the requests of one seed as a Parquet file.

    Raises:
        ConfigError: the workload cannot be built as configured.
    """
    assert config.out is not None
    scenario = config.scenario
    requests = build_workload(scenario, config.seed)
    to_parquet(requests, config.out, scenario.workload, scenario.slo, config.seed)
    print(f"{len(requests):,} requests, workload hash {workload_hash(requests)}: {config.out}")


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, LengthSummary):
            flat |= {f"{name} {statistic}": number for statistic, number in value._asdict().items()}
        elif isinstance(value, Mapping):
            flat |= {f"{name.removeprefix('num_by_')} {key}": count for key, count in value.items()}
        else:
            flat[name] = value
    return flat
