"""`qlm sweep`: one experiment, resumably, and what came out."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd
from rich.table import Table

from runners import experiment, results
from runners.episode import run_episode
from runners.episodes import EpisodeFunction
from runners.experiment import CASE, POINT
from runners.experiment_config import SweepConfig
from runners.provenance import note_command
from runners.summary import interval_over_seeds
from runners.tables import console, interval_percent


def sweep(config: SweepConfig, episode: EpisodeFunction = run_episode) -> None:
    """Run what is missing of an experiment; write its rows to ``out/<name>.parquet`` and print a summary.

    Args:
        episode: runs one episode; importable by its name, as it is called in other processes.

    Raises:
        ConfigError: a scenario of it cannot run.
        CommandFailed: episodes failed, or rows are not what they should be.
        CommandInterrupted: Ctrl-C; the same command goes on.
    """
    spec, out = config.experiment, config.out
    note_command(out)
    experiment.run_missing(experiment.episodes(spec), out, config.jobs, episode)
    rows = experiment.read_rows(spec, out)
    results.write_rows(out / f"{spec.name}.parquet", rows)
    console().print(sweep_table(rows, f"{spec.name}: {spec.question}"))
    print(f"rows are in {out / f'{spec.name}.parquet'}", file=sys.stderr)


def merge_jobs(out: Path) -> None:
    """Put the rows of a multirun's jobs, in folders below ``out``, together with those in ``out`` itself."""
    for path in sorted(out.glob("*/rows/*.parquet")):
        (out / "rows").mkdir(exist_ok=True)
        shutil.copyfile(path, out / "rows" / path.name)


def sweep_table(rows: pd.DataFrame, title: str) -> Table:
    """SLO attainment of every planner in every scenario."""
    keys = [CASE, *(column for column in rows.columns if column.startswith(POINT))]
    table = Table(title=title, caption="SLO attainment in %: interquartile mean [95 % interval] over n seeds")
    shown = [key for key in keys if rows[key].nunique() > 1]
    for key in shown:
        table.add_column(key.removeprefix(POINT))
    for name in ("planner", "SLO attainment", "n"):
        table.add_column(name, justify="left" if name == "planner" else "right")
    for place, group in rows.groupby([*keys, "planner"], sort=False):
        values = dict(zip([*keys, "planner"], place, strict=True))
        cells = [str(values[key]) for key in shown]
        interval = interval_over_seeds(group["slo_attainment"])
        table.add_row(*cells, values["planner"], interval_percent(interval), str(len(group)))
    return table
