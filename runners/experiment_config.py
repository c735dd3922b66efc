"""What `qlm sweep`, `qlm figures` and `qlm report` accept, and what an experiment is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from qlm_env.spec import ConfigError, PositiveInt, Spec, parse
from runners.composition import group_options, hint, load_option
from runners.config import OutPath, Seeds

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Overrides = tuple[str, ...]
Grid = Mapping[str, Annotated[tuple[int | float | str, ...], Field(min_length=1)]]

GROUP = "experiment"
"""The folder of experiments in ``configs/``."""


class QuickSpec(Spec):
    """How an experiment is cut down where only its shape matters; what is not given stays as it is."""

    overrides: Overrides = ()
    """After those of the experiment."""
    grid: Grid = Field(default_factory=dict)
    """Takes the place of the experiment's."""
    cases: tuple[str, ...] = ()
    """Labels of the cases that are kept; none keeps all."""
    seeds: Seeds = (0, 1, 2)


class ExperimentSpec(Spec):
    """One question as a grid of scenarios: every case with every point of the grid, every planner and every seed."""

    name: Name
    """That of its file."""
    question: str
    overrides: Overrides
    """Of `qlm compare`, for every scenario: ``cluster=small``, ``workload.num_requests=100``."""
    planners: Annotated[tuple[str, ...], Field(min_length=1)]
    """Options of the group ``planner``."""
    grid: Grid = Field(default_factory=dict)
    """Keys of `qlm compare` and their values."""
    cases: Mapping[str, Overrides] = Field(default_factory=dict)
    """By label, further overrides; none is one case without a label."""
    seeds: Seeds
    quick: QuickSpec = QuickSpec()

    @field_validator("cases")
    @classmethod
    def _labels(cls, cases: Mapping[str, Overrides]) -> Mapping[str, Overrides]:
        if "" in cases:
            raise ValueError("a case needs a label")
        return cases

    def quickly(self) -> ExperimentSpec:
        """The experiment cut down as ``quick`` says.

        Raises:
            ConfigError: ``quick`` keeps a case that there is not.
        """
        quick = self.quick
        for label in quick.cases:
            if label not in self.cases:
                raise ConfigError(
                    f"'experiment.quick.cases': no case '{label}' in {self.name}; allowed: {', '.join(self.cases)}"
                )
        kept = quick.cases or tuple(self.cases)
        return self.model_copy(
            update={
                "overrides": (*self.overrides, *quick.overrides),
                "grid": quick.grid or self.grid,
                "cases": {label: self.cases[label] for label in kept},
                "seeds": quick.seeds,
            }
        )


def load_experiment(name: str) -> ExperimentSpec:
    """The experiment ``configs/experiment/<name>.yaml``.

    Raises:
        ConfigError: there is none, or a key of it is wrong.
    """
    allowed = group_options(GROUP)
    if name not in allowed:
        raise ConfigError(f"no experiment named '{name}'; allowed: {', '.join(allowed)}{hint(name, allowed)}")
    return parse(ExperimentSpec, load_option(GROUP, name), prefix=GROUP)


class JobsOptions(Spec):
    """The settings of commands that run episodes of experiments."""

    out: OutPath
    jobs: PositiveInt | None = None
    """Episodes run at once; ``None`` is one per CPU core."""
    quick: bool = False

    @property
    def workers(self) -> int:
        return self.jobs or os.cpu_count() or 1


class SweepOptions(JobsOptions):
    """The settings of `qlm sweep`."""

    experiment: ExperimentSpec


@dataclass(frozen=True)
class SweepConfig:
    """An experiment to run, and the folder that its rows go to."""

    experiment: ExperimentSpec
    out: Path
    jobs: int


def parse_sweep(values: Mapping[str, Any]) -> SweepConfig:
    """The configuration of `qlm sweep`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    if values.get("experiment") is None:
        raise ConfigError(f"'experiment': name one of {', '.join(group_options(GROUP))}")
    options = parse(SweepOptions, values)
    experiment = options.experiment.quickly() if options.quick else options.experiment
    return SweepConfig(experiment, Path(options.out), options.workers)


class FiguresOptions(JobsOptions):
    """The settings of `qlm figures`."""

    names: tuple[str, ...] | None = None
    """``None`` draws all."""
    rows: OutPath
    """Where rows of episodes and measurements are kept, as `qlm sweep` writes them."""
    simulate: bool = True
    """Run what is missing; without, missing rows are an error."""
    learned: str = "results/learned"
    """Folder of a `qlm compare` with learned policies."""
    validations: str = "results/validation"
    """Folder of results of `qlm profile validate`, each in a folder of its own."""

    @field_validator("names", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def parse_figures(values: Mapping[str, Any]) -> FiguresOptions:
    """The configuration of `qlm figures`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(FiguresOptions, values)


class ReportOptions(Spec):
    """The settings of `qlm report`."""

    folder: OutPath
    """Results of `qlm compare` or `qlm evaluate`."""
    out: OutPath | None = None
    """The page; ``None`` is ``report.html`` in the folder."""


def parse_report(values: Mapping[str, Any]) -> ReportOptions:
    """The configuration of `qlm report`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    if values.get("folder") is None:
        raise ConfigError("'folder': name the results of a qlm compare, such as qlm report results/first")
    return parse(ReportOptions, values)
