"""What `qlm train` and `qlm record` accept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planners.learned.train_spec import TrainSpec
from planners.spec import PlannerSpec
from qlm_env.spec import ConfigError, ScenarioSpec, Spec, parse
from runners.config import NoTracking, OutPath, Seed, SeedsOptions, TrackingSpec, parse_planners, split_scenario


class TrainOptions(Spec):
    """The settings of `qlm train` beside the scenario."""

    train: TrainSpec
    seed: Seed = 0
    out: OutPath
    tensorboard: bool = True
    tracking: TrackingSpec = NoTracking()


@dataclass(frozen=True)
class TrainConfig:
    """A training: on what, how, and where its files go."""

    scenario: ScenarioSpec
    options: TrainOptions

    @property
    def out(self) -> Path:
        return Path(self.options.out)


def parse_train(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration of `qlm train`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    scenario, rest = split_scenario(values)
    return TrainConfig(scenario, parse(TrainOptions, rest))


@dataclass(frozen=True)
class RecordDemonstrationsConfig:
    """A planner to watch over seeds, and where its decisions go."""

    scenario: ScenarioSpec
    label: str
    planner: PlannerSpec
    seeds: tuple[int, ...]
    out: Path


def parse_record(values: Mapping[str, Any]) -> RecordDemonstrationsConfig:
    """The configuration of `qlm record`.

    Raises:
        ConfigError: as :func:`parse_train`, or not exactly one planner is given.
    """
    scenario, rest = split_scenario(values)
    planners = parse_planners(rest.pop("planner", None))
    if len(planners) != 1:
        raise ConfigError(f"'planner': qlm record watches one planner (got {', '.join(planners)})")
    options = parse(SeedsOptions, rest)
    ((label, planner),) = planners.items()
    return RecordDemonstrationsConfig(scenario, label, planner, options.seeds, Path(options.out))
