"""The episodes of an experiment and their rows, which figures and tables are functions of.

All experiments keep their rows in one folder, each under the identity of its episode, so that an episode that two of
them ask for is run once. Rows are only ever read by that identity: what another version of the code, another
configuration or another workload left in the folder is not taken for a result.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qlm_env.spec import ConfigError
from runners import results
from runners.composition import Request
from runners.config import CompareConfig, parse_compare
from runners.episode import run_episode
from runners.episodes import EpisodeFunction, EpisodeTask, run_episodes
from runners.errors import CommandFailed
from runners.experiment_config import ExperimentSpec
from runners.results import EpisodeKey

CASE = "case"
POINT = "point."
"""Prefix of the columns that say where in the grid a row lies."""

IDENTITY = ("planner", "planner_options", "seed", "scenario", "code_version")


@dataclass(frozen=True)
class Cell:
    """One scenario of an experiment."""

    case: str
    point: Mapping[str, int | float | str]
    config: CompareConfig

    @property
    def name(self) -> str:
        parts = [*([self.case] if self.case else []), *(f"{key}={value}" for key, value in self.point.items())]
        return ", ".join(parts)


@dataclass(frozen=True)
class Episode:
    """One episode of an experiment."""

    cell: Cell
    key: EpisodeKey

    @property
    def name(self) -> str:
        where = f" ({self.cell.name})" if self.cell.name else ""
        return f"{self.key.label} seed {self.key.seed}{where}"


def cells(experiment: ExperimentSpec) -> list[Cell]:
    """The scenarios of an experiment: its cases, and within each the points of its grid.

    Raises:
        ConfigError: an override, a planner or a scenario is wrong.
    """
    cases = experiment.cases or {"": ()}
    points = [
        dict(zip(experiment.grid, values, strict=True)) for values in itertools.product(*experiment.grid.values())
    ]
    planners = f"planner=[{','.join(experiment.planners)}]"
    found = []
    for (case, overrides), point in itertools.product(cases.items(), points):
        settings = [f"{key}={value}" for key, value in point.items()]
        request = Request("compare", (planners, *experiment.overrides, *overrides, *settings))
        try:
            config = parse_compare(request.compose())
        except ConfigError as error:
            raise ConfigError(f"experiment {experiment.name}: {error}") from None
        found.append(Cell(case, point, config))
    return found


def episodes(experiment: ExperimentSpec) -> list[Episode]:
    """Every episode, seed by seed, so that a sweep that is stopped early still compares everything on some seeds.

    Raises:
        ConfigError: as :func:`cells`.
    """
    scenarios = cells(experiment)
    return [
        Episode(cell, EpisodeKey(cell.config.scenario, label, planner, seed))
        for seed in experiment.seeds
        for cell in scenarios
        for label, planner in cell.config.planners.items()
    ]


def run_missing(wanted: Sequence[Episode], out: Path, jobs: int, episode: EpisodeFunction = run_episode) -> None:
    """Run the episodes that have no row in ``out`` yet.

    Raises:
        CommandFailed: some failed, which the message names; the others are kept.
        CommandInterrupted: Ctrl-C.
    """
    unique = {entry.key.digest: entry for entry in wanted}
    tasks = [EpisodeTask(entry.key, out, False, episode) for entry in unique.values()]
    failures = run_episodes(tasks, out, jobs)[1]
    if failures:
        raise CommandFailed(
            f"{len(failures)} of {len(tasks)} episodes failed: {'; '.join(failures[:3])} (tracebacks in "
            f"{out / 'failures'})"
        )


def read_rows(experiment: ExperimentSpec, out: Path) -> pd.DataFrame:
    """The rows of all episodes of an experiment, with the columns ``case`` and ``point.KEY`` for each key of the grid.

    Raises:
        CommandFailed: rows are missing, are not those of their episode, or planners saw different requests.
        ConfigError: as :func:`cells`.
    """
    wanted = episodes(experiment)
    rows, missing = [], []
    for entry in wanted:
        path = entry.key.row_path(out)
        row = results.read_row(path)
        if row is None:
            missing.append(entry)
            continue
        _check_identity(entry.key, row, path)
        point = {POINT + key: value for key, value in entry.cell.point.items()}
        rows.append(row | {CASE: entry.cell.case} | point)
    if missing:
        raise CommandFailed(
            f"{experiment.name}: {len(missing)} of {len(wanted)} episodes have no row in {out}, such as "
            f"{missing[0].name}"
            f"{_other_versions(missing, out)}; qlm sweep experiment={experiment.name} out={out} runs them"
        )
    frame = pd.DataFrame(rows)
    for _, group in frame.groupby("config_hash"):
        results.check_identical_workloads(group)
    return frame


def _check_identity(key: EpisodeKey, row: Mapping[str, Any], path: Path) -> None:
    expected = dict(
        zip(
            IDENTITY,
            (
                key.label,
                key.planner.model_dump_json(),
                key.seed,
                key.scenario.model_dump_json(),
                results.code_version(),
            ),
            strict=True,
        )
    )
    for name, value in expected.items():
        if row.get(name) != value:
            found = _short(row.get(name))
            raise CommandFailed(
                f"'{path}' holds another episode than its name says ({name} is {found}, not {_short(value)}); remove it"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _other_versions(missing: Sequence[Episode], out: Path) -> str:
    """What to say if rows of the missing episodes are there from other versions of the code."""
    identities = {
        (e.key.label, e.key.planner.model_dump_json(), e.key.seed, e.key.scenario.model_dump_json()) for e in missing
    }
    versions: dict[str, int] = {}
    for path in sorted((out / "rows").glob("*.parquet")):
        try:
            (row,) = pq.read_table(path, columns=list(IDENTITY)).to_pylist()
        except (OSError, pa.ArrowInvalid, ValueError):
            continue
        if tuple(row[name] for name in IDENTITY[:-1]) in identities:
            versions[row["code_version"]] = versions.get(row["code_version"], 0) + 1
    if not versions:
        return ""
    told = ", ".join(f"{count} of version {version}" for version, count in versions.items())
    return f" ({told} of the code are there; this is {results.code_version()})"


def scenario_value(row: Mapping[str, Any], key: str) -> Any:
    """A value of a row's scenario by its dotted key, such as ``workload.num_requests``."""
    value = json.loads(row["scenario"])
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value
