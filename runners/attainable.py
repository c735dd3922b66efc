"""`qlm attainable`: an upper bound on SLO attainment, and what planners reached of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from planners.attainable import attainable
from qlm_env.requests import workload_hash
from qlm_env.scenario import Episodes
from runners import files, results
from runners.config import AttainableConfig
from runners.progress import CountedProgress
from runners.summary import interval_over_seeds
from runners.tables import console, interval_percent

Bound = Mapping[str, Any]
"""One seed: ``seed``, ``workload_hash``, ``slo_attainment``, ``slo_attainment_weighted``."""

FILE = "attainable.json"


def report_attainable(config: AttainableConfig) -> None:
    """Write the bound of every seed to ``out/attainable.json``, and print it beside the planners compared there.

    Raises:
        ConfigError: the cluster cannot serve the workload, or ``out`` belongs to another scenario.
    """
    episodes = Episodes(config.scenario)
    results.claim(config.out, config.scenario)
    bounds: list[Bound] = []
    with CountedProgress("seeds", len(config.seeds)) as progress:
        for seed in config.seeds:
            requests = episodes.requests(seed)
            bound = attainable(episodes.scenario, requests)
            bounds.append({"seed": seed, "workload_hash": workload_hash(requests), **asdict(bound)})
            progress.advance(f"seed {seed}: at most {100 * bound.slo_attainment:.1f} %")
    files.write_text(config.out / FILE, json.dumps(bounds, indent=2, allow_nan=False) + "\n")
    title = f"{config.scenario.workload.name} on {config.scenario.cluster.name}"
    console().print(_table(bounds, _compared(config.out, bounds), title))


def _compared(out: Path, bounds: Sequence[Bound]) -> pd.DataFrame:
    """The episodes of `qlm compare` in ``out`` on the same requests, with each seed's bound in the column ``bound``."""
    path = out / "results.parquet"
    if not path.exists():
        return pd.DataFrame(columns=["planner", "slo_attainment", "bound"])
    of_seed = pd.DataFrame(bounds).rename(columns={"slo_attainment": "bound"})
    rows = pd.read_parquet(path, columns=["planner", "seed", "workload_hash", "slo_attainment"])
    return rows.merge(of_seed[["seed", "workload_hash", "bound"]], on=["seed", "workload_hash"])


def _table(bounds: Sequence[Bound], compared: pd.DataFrame, title: str) -> Table:
    table = Table("", title=title, caption="in %: interquartile mean [95 % interval] over seeds")
    table.add_column("SLO attainment", justify="right")
    table.add_column("of the attainable", justify="right")
    table.add_column("seeds", justify="right")
    best = np.array([bound["slo_attainment"] for bound in bounds])
    table.add_row("attainable, at most", interval_percent(interval_over_seeds(best)), "", str(len(best)))
    for planner, rows in compared.groupby("planner", sort=False):
        attained = rows["slo_attainment"].to_numpy(np.float64)
        limit = rows["bound"].to_numpy(np.float64)
        possible = limit > 0.0
        share = interval_percent(interval_over_seeds(attained[possible] / limit[possible])) if possible.any() else "-"
        table.add_row(str(planner), interval_percent(interval_over_seeds(attained)), share, str(len(rows)))
    return table
