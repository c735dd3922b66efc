"""What the commands accept: composed values validated into typed configurations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from planners.spec import PLANNER_NAMES, PlannerSpec, parse_planner
from qlm_env.spec import ConfigError, NonNegativeFloat, PositiveFloat, PositiveInt, ScenarioSpec, Spec, parse

Seed = Annotated[int, Field(ge=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0)]
QueueLength = Annotated[int, Field(ge=10)]
OutPath = Annotated[str, Field(min_length=1)]


class NoTracking(Spec):
    """Results are only written to files."""

    kind: Literal["none"] = "none"


class WandbTracking(Spec):
    """Results are mirrored to Weights & Biases, one run per planner."""

    kind: Literal["wandb"]
    mode: Literal["offline", "online"] = "offline"
    project: str = "qlm-env"
    entity: str | None = None


TrackingSpec = Annotated[NoTracking | WandbTracking, Field(discriminator="kind")]


def _count_or_list(value: Any) -> Any:
    problem = f"expected a count of at least 1 or a list of different non-negative integers (got {value!r})"
    seeds = range(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(seeds, (range, list, tuple)) or not seeds:
        raise ValueError(problem)
    if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(problem)
    return tuple(seeds)


Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_count_or_list)]
"""``3`` is the seeds 0, 1, 2; a list is those seeds."""


class SeedsOptions(Spec):
    """The settings of `qlm attainable` beside the scenario, and of every command that runs over seeds."""

    seeds: Seeds
    out: OutPath


class RunOptions(SeedsOptions):
    """The settings of `qlm compare` and `qlm evaluate` beside scenario and planners."""

    backend: Annotated[tuple[Literal["emulator", "vllm"], ...], Field(min_length=1)] = ("emulator",)
    """What serves the requests: one, or both for a comparison of the two."""
    jobs: PositiveInt | None = None
    """Episodes run at once; ``None`` is one per CPU core."""
    timeline: bool = True
    tracking: TrackingSpec = NoTracking()

    @field_validator("backend", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        backends = (value,) if isinstance(value, str) else value
        if isinstance(backends, (list, tuple)) and len(set(map(str, backends))) < len(backends):
            raise ValueError(f"each backend only once (got {list(backends)!r})")
        return backends


class WorkloadOptions(Spec):
    """The settings of `qlm workload describe`."""

    seed: Seed = 0


class ExportOptions(WorkloadOptions):
    """The settings of `qlm workload export`."""

    out: OutPath


class BenchOptions(Spec):
    """The settings every `qlm bench` has."""

    seed: Seed = 0
    out: OutPath | None = None


class BenchEmulatorOptions(BenchOptions):
    """The settings of `qlm bench emulator`."""

    num_requests: PositiveInt = 300_000
    loads: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.6, 0.9, 1.1)
    """Arrival rates, as shares of the instance's capacity."""
    memory: bool = False
    """Also serve 10 million requests in a process of its own and tell its peak memory."""


class BenchEnvOptions(BenchOptions):
    """The settings of `qlm bench env`."""

    duration_s: PositiveFloat = 5.0
    """Wall-clock seconds of each measurement."""


class BenchRwtOptions(BenchOptions):
    """The settings of `qlm bench rwt`."""

    device: str = "A100"
    tp: PositiveInt = 1
    preset: Literal["w_a", "w_a_13b", "w_a_70b", "w_c"] = "w_a"
    max_num_seqs: PositiveInt = 48
    queues: Annotated[tuple[QueueLength, ...], Field(min_length=1)] = (25, 50, 100, 200, 400, 800, 1600)
    """Requests left waiting when their waiting times are predicted."""
    histories: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 200)
    """Requests served before that, beside the first batch."""
    episodes: PositiveInt = 20
    """Seeds from ``seed`` on, for every queue and history."""
    profile_factors: tuple[PositiveFloat, ...] = (0.8, 1.2)
    """The estimator's step times are also taken as wrong by each of these factors."""


class BenchScaleOptions(BenchOptions):
    """The settings of `qlm bench scale`."""

    num_requests: PositiveInt = 5_000_000
    instances: PositiveInt = 500
    duration_s: PositiveFloat = 86_400.0
    """Emulated time over which the requests arrive."""
    planner: str = "qlm"
    preset: Literal["w_a", "w_a_13b", "w_c"] = "w_a"
    delta: PositiveFloat = 1.0
    """Size of request groups, as ``environment.grouping.delta``."""
    interval_s: PositiveFloat = 5.0
    """Emulated time between two decisions."""


class BenchPlacementOptions(BenchOptions):
    """The settings of `qlm bench placement`."""

    sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (16, 64, 1000)
    """Instances of the clusters."""
    models: PositiveInt = 10
    scenarios: PositiveInt = 64
    problems: PositiveInt = 10
    """Random problems of every size."""
    time_limit_s: PositiveFloat = 3.0
    node_limit: PositiveInt = 1000
    relative_gap: NonNegativeFloat = 0.005
    """A placement within this of the bound is good enough."""


class BenchCostOptions(BenchOptions):
    """The settings of `qlm bench cost`."""

    families: Annotated[tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...], Field(min_length=1)] = (
        (40, 8, 5),
        (100, 16, 5),
    )
    """Groups, instances and models of random problems."""
    problems: PositiveInt = 40
    """Of every family."""
    backlog: PositiveFloat = 1.0
    """Work that waits, in minutes of all instances together."""
    search_times_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.2, 1.0)
    scenarios: PositiveInt = 32
    """That the sampled cost is averaged over."""
    fresh_scenarios: PositiveInt = 500
    """That plans are judged by."""


class BenchPlannerOptions(BenchOptions):
    """The settings of `qlm bench planner`."""

    families: tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...] = (
        (6, 1, 1),
        (7, 3, 3),
        (20, 4, 3),
        (40, 8, 5),
        (100, 16, 5),
        (200, 64, 8),
        (400, 64, 10),
    )
    """Groups, instances and models of random problems."""
    problems: PositiveInt = 5
    """Of every family."""
    backlog: PositiveFloat = 1.0
    """Work that waits in random problems, in minutes of all instances together."""
    search_times_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.05, 0.2, 1.0, 2.0)
    bound_time_limit_s: PositiveFloat = 20.0
    snapshots: bool = True
    """Also plan problems met in episodes."""
    large: bool = False
    """Also plan 2,000 groups on 1,000 instances in a process of its own and tell its peak memory."""


@dataclass(frozen=True)
class CompareConfig:
    """Planners to run over seeds on one scenario, and where the results go."""

    scenario: ScenarioSpec
    planners: Mapping[str, PlannerSpec]
    """By the label they carry in the results."""
    options: RunOptions

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    @property
    def jobs(self) -> int:
        return self.options.jobs or os.cpu_count() or 1


def parse_compare(values: Mapping[str, Any]) -> CompareConfig:
    """The configuration of `qlm compare`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    scenario, rest = split_scenario(values)
    planners = parse_planners(rest.pop("planner", None))
    return CompareConfig(scenario, planners, parse(RunOptions, rest))


def parse_evaluate(values: Mapping[str, Any]) -> CompareConfig:
    """The configuration of `qlm evaluate`: that of `qlm compare` with exactly one planner.

    Raises:
        ConfigError: as :func:`parse_compare`, or more than one planner is given.
    """
    config = parse_compare(values)
    if len(config.planners) > 1:
        raise ConfigError(
            f"'planner': qlm evaluate takes one planner (got {', '.join(config.planners)}); qlm compare takes several"
        )
    return config


def split_scenario(values: Mapping[str, Any]) -> tuple[ScenarioSpec, dict[str, Any]]:
    """The scenario in ``values`` and the keys beside it."""
    keys = ScenarioSpec.model_fields
    scenario = parse(ScenarioSpec, {key: value for key, value in values.items() if key in keys})
    return scenario, {key: value for key, value in values.items() if key not in keys}


def parse_planners(entries: Any) -> dict[str, PlannerSpec]:
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(f"'planner': name at least one of {', '.join(PLANNER_NAMES)}")
    planners: dict[str, PlannerSpec] = {}
    for label, entry in entries.items():
        options = dict(entry) if isinstance(entry, Mapping) else {}
        name = options.pop("name", None)
        if name is None:
            # Only an override of an unselected planner's option leaves an entry without a name.
            raise ConfigError(
                f"'planner.{label}' is set, but {label} is not selected; add it to planner=[...], "
                f"or give planner.{label}.name for a variant of that planner"
            )
        planners[str(label)] = parse_planner(str(name), options)
    return planners


@dataclass(frozen=True)
class AttainableConfig:
    """Workloads to bound, and the folder of their results."""

    scenario: ScenarioSpec
    seeds: tuple[int, ...]
    out: Path


def parse_attainable(values: Mapping[str, Any]) -> AttainableConfig:
    """The configuration of `qlm attainable`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    scenario, rest = split_scenario(values)
    options = parse(SeedsOptions, rest)
    return AttainableConfig(scenario, options.seeds, Path(options.out))


@dataclass(frozen=True)
class WorkloadConfig:
    """One workload as one seed and one cluster make it."""

    scenario: ScenarioSpec
    seed: int
    out: Path | None = None


def parse_workload_describe(values: Mapping[str, Any]) -> WorkloadConfig:
    """The configuration of `qlm workload describe`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    scenario, rest = split_scenario(values)
    return WorkloadConfig(scenario, parse(WorkloadOptions, rest).seed)


def parse_workload_export(values: Mapping[str, Any]) -> WorkloadConfig:
    """The configuration of `qlm workload export`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    scenario, rest = split_scenario(values)
    options = parse(ExportOptions, rest)
    return WorkloadConfig(scenario, options.seed, Path(options.out))


def parse_bench_emulator(values: Mapping[str, Any]) -> BenchEmulatorOptions:
    """The configuration of `qlm bench emulator`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(BenchEmulatorOptions, values)


def parse_bench_env(values: Mapping[str, Any]) -> BenchEnvOptions:
    """The configuration of `qlm bench env`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(BenchEnvOptions, values)


def parse_bench_rwt(values: Mapping[str, Any]) -> BenchRwtOptions:
    """The configuration of `qlm bench rwt`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(BenchRwtOptions, values)


def parse_bench_placement(values: Mapping[str, Any]) -> BenchPlacementOptions:
    """The configuration of `qlm bench placement`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(BenchPlacementOptions, values)


def parse_bench_cost(values: Mapping[str, Any]) -> BenchCostOptions:
    """The configuration of `qlm bench cost`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(BenchCostOptions, values)


def parse_bench_planner(values: Mapping[str, Any]) -> BenchPlannerOptions:
    """The configuration of `qlm bench planner`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(BenchPlannerOptions, values)


def parse_bench_scale(values: Mapping[str, Any]) -> BenchScaleOptions:
    """The configuration of `qlm bench scale`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(BenchScaleOptions, values)
