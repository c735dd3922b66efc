"""The rows of a comparison: one Parquet file per finished episode, found again when a run is resumed.

A row is identified by everything that decides its numbers: the scenario, the planner and its options, the
seed, and the code. Its file is named after that identity, so a second run of the same command skips it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

import planners
import qlm_env
from planners.spec import PlannerSpec
from qlm_env.env import EMULATOR
from qlm_env.spec import ConfigError, ScenarioSpec
from qlm_env.workload.atomic import atomic_path
from runners import episode, files
from runners.episode import EpisodeResult
from runners.errors import CommandFailed

PER_CLASS = "slo_attainment_per_class."
"""Prefix of the columns that hold one SLO class's attainment each."""

CODE_SUFFIXES = (".py", ".yaml", ".csv", ".npz")


@cache
def code_version() -> str:
    """Twelve hex digits that identify the code and data that decide an episode.

    A hash of the files rather than a commit, so that it also holds for an installed package and for
    changes that are not committed.
    """
    digest = hashlib.sha256(Path(episode.__file__).read_bytes())
    for package in (qlm_env, planners):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*")):
            if path.suffix in CODE_SUFFIXES and path.is_file():
                digest.update(str(path.relative_to(root.parent)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _profiles_version(folder: Path) -> str:
    """Identifies the profiles in a user's folder, which may be measured anew between two runs."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.yaml")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class EpisodeKey:
    """What an episode is identified by."""

    scenario: ScenarioSpec
    label: str
    """The planner's name in the results; not part of the identity of the numbers, but of the row."""
    planner: PlannerSpec
    seed: int
    backend: str = EMULATOR
    """What serves the requests."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits."""
        parts = [
            self.scenario.model_dump_json(),
            self.label,
            self.planner.model_dump_json(),
            str(self.seed),
            self.backend,
            code_version(),
        ]
        if (folder := self.scenario.cluster.profile_path) is not None:
            parts.append(_profiles_version(folder))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def row_path(self, out: Path) -> Path:
        return out / "rows" / f"{self.digest}.parquet"

    def failure_path(self, out: Path) -> Path:
        """Where the traceback of this episode goes if it fails."""
        return out / "failures" / f"{self.file_name}.txt"

    def timeline_path(self, out: Path) -> Path:
        return timeline_path(out, self.file_name)

    def requests_path(self, out: Path) -> Path:
        """Where the latencies of every request go, beside a timeline."""
        return requests_path(out, self.file_name)

    @property
    def name(self) -> str:
        """What people call the episode."""
        return f"{self.label}{'' if self.backend == EMULATOR else f' on {self.backend}'} seed {self.seed}"

    @property
    def file_name(self) -> str:
        """What the episode's files are called."""
        backend = "" if self.backend == EMULATOR else f"-{self.backend}"
        return f"{self.label}{backend}-seed{self.seed}-{self.digest[:8]}"


def timeline_path(out: Path, file_name: str) -> Path:
    """Where the timeline of an episode is in a results folder."""
    return out / "timelines" / f"{file_name}.json"


def requests_path(out: Path, file_name: str) -> Path:
    """Where the latencies of an episode's requests are in a results folder."""
    return out / "requests" / f"{file_name}.parquet"


def tell_backends_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with the backend as part of the planner's name, where there are several."""
    if rows["backend"].nunique() < 2:
        return rows
    return rows.assign(planner=rows["planner"] + " on " + rows["backend"])


def make_row(key: EpisodeKey, result: EpisodeResult) -> dict[str, Any]:
    """One flat row: the episode's identity, its metrics (nested ones dotted), and what it took to compute."""
    decisions = result.decision_ms
    scenario = key.scenario.model_dump_json()
    return {
        "planner": key.label,
        "planner_options": key.planner.model_dump_json(),
        "cluster": key.scenario.cluster.name,
        "workload": key.scenario.workload.name,
        "seed": key.seed,
        "workload_hash": result.workload_hash,
        "backend": key.backend,
        "episode": key.file_name,
        **_flatten(result.metrics),
        **_flatten({"planner_statistics": result.planner_statistics}),
        "decision_p50_ms": float(np.percentile(decisions, 50)) if decisions.size else np.nan,
        "decision_p99_ms": float(np.percentile(decisions, 99)) if decisions.size else np.nan,
        "planning_s": float(decisions.sum()) / 1000.0,
        "wall_s": result.wall_s,
        "config_hash": hashlib.sha256(scenario.encode()).hexdigest()[:16],
        "scenario": scenario,
        "qlm_version": qlm_env.__version__,
        "code_version": code_version(),
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            # None stands for nothing to measure; as a number the column keeps its type without it.
            flat[f"{prefix}{name}"] = np.nan if value is None else value
    return flat


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Write one row as a Parquet file, atomically."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist([dict(row)]), temporary)


def write_rows(path: Path, rows: pd.DataFrame) -> None:
    """Write rows as one Parquet file, atomically."""
    with atomic_path(path) as temporary:
        rows.to_parquet(temporary, index=False)


def read_row(path: Path) -> dict[str, Any] | None:
    """The row in ``path``, or None if there is none that can be read."""
    try:
        rows: list[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
    except (OSError, pa.ArrowInvalid):
        return None
    return rows[0] if len(rows) == 1 else None


def claim(out: Path, scenario: ScenarioSpec) -> None:
    """Make ``out`` the results folder of ``scenario``, or accept that it already is.

    Raises:
        ConfigError: ``out`` is not a folder, or holds results of another scenario.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'out': '{out}' is a file; name a folder")
    path = out / "scenario.json"
    values = scenario.model_dump(mode="json")
    if not path.exists():
        files.write_text(path, json.dumps(values, indent=2) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"'out': '{path}' is not valid JSON; choose another out=DIR") from None
    difference = first_difference(before, values)
    if difference is not None:
        raise ConfigError(f"'out': '{out}' holds results of another scenario ({difference}); choose another out=DIR")


def first_difference(before: Any, now: Any) -> str | None:
    """The first key that differs between two configurations, with both values, or None."""
    return next(_differences(before, now), None)


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*now, *(name for name in before if name not in now)]:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key}: {json.dumps(before)} there, {json.dumps(now)} here"


def check_identical_workloads(rows: pd.DataFrame) -> None:
    """Make sure that all planners saw the same requests under each seed.

    Raises:
        CommandFailed: they did not, naming the seed and the planners. A trace file that changed after the
            first rows were written can cause this.
    """
    for seed, group in rows.groupby("seed"):
        hashes = dict(zip(group["planner"], group["workload_hash"], strict=True))
        if len(set(hashes.values())) > 1:
            seen = ", ".join(f"{planner}: {value}" for planner, value in hashes.items())
            raise CommandFailed(
                f"planners saw different workloads under seed {seed} ({seen}); if a trace file has changed, "
                "start again in another out=DIR"
            )
