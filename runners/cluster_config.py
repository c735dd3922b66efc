"""What `qlm cluster` and `qlm vllm make-model` accept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlm_env.spec import ConfigError, PositiveInt, ScenarioSpec, Spec, parse
from qlm_env.vllm_spec import GivenVllm
from runners.config import OutPath, Seed, split_scenario


class FolderOptions(Spec):
    """The settings of `qlm cluster status` and `qlm cluster down`."""

    out: OutPath


class UpOptions(FolderOptions):
    """The settings of `qlm cluster up` beside cluster, workload and SLO classes."""

    servers: Literal["all", "initial"]
    """Of every model that an instance can hold, all but the initial one asleep, or of its initial model alone."""


class MakeModelOptions(Spec):
    """The settings of `qlm vllm make-model`."""

    out: OutPath
    architecture: Literal["tiny"]
    seed: Seed
    context_tokens: PositiveInt


@dataclass(frozen=True)
class UpConfig:
    """A cluster to start, and the folder of its state."""

    scenario: ScenarioSpec
    servers: Literal["all", "initial"]
    out: Path


def parse_up(values: Mapping[str, Any]) -> UpConfig:
    """The configuration of `qlm cluster up`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    scenario, rest = split_scenario(values)
    options = parse(UpOptions, rest)
    spec = scenario.cluster.vllm
    if isinstance(spec, GivenVllm):
        raise ConfigError("'cluster.vllm.kind': servers given as urls are up already; allowed: local, ray")
    if spec is not None:
        # Logs and models go where the state is.
        spec = spec.model_copy(update={"out": options.out, "state": None})
        cluster = scenario.cluster.model_copy(update={"vllm": spec})
        scenario = scenario.model_copy(update={"cluster": cluster})
    return UpConfig(scenario, options.servers, Path(options.out))


def parse_folder(values: Mapping[str, Any]) -> FolderOptions:
    """The configuration of `qlm cluster status` and `qlm cluster down`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(FolderOptions, values)


def parse_make_model(values: Mapping[str, Any]) -> MakeModelOptions:
    """The configuration of `qlm vllm make-model`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(MakeModelOptions, values)
