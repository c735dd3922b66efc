"""What a comparison found, per planner and workload: the content of ``summary.json``."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from runners.results import PER_CLASS
from runners.stats import Interval, bootstrap_interval, paired_difference

TOTALS = ("requests", "finished", "rejected")
"""Summed over the seeds; every other number without an interval is the mean over the seeds."""

MEANS = (
    "request_throughput_per_s",
    "token_throughput_per_s",
    "utilisation",
    "swaps",
    "evictions",
    "decision_p50_ms",
    "decision_p99_ms",
    "emulated_s",
    "wall_s",
)

BOOTSTRAP_SEED = 0
"""Intervals are reproducible: each starts from its own generator with this seed."""


def summarise(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry per workload, planner and backend, in the order in which they appear in ``rows``.

    Args:
        rows: episodes, one per row, as :func:`runners.results.make_row` makes them.
    """
    groups = rows.groupby(["workload", "planner", "backend"], sort=False)
    return [_entry(planner, workload, group) for (workload, planner, _), group in groups]


def _entry(planner: str, workload: str, rows: pd.DataFrame) -> dict[str, Any]:
    rows = rows.sort_values("seed")
    per_class = [column for column in rows.columns if column.startswith(PER_CLASS)]
    return {
        "planner": planner,
        "workload": workload,
        "workload_hash": combined_hash(list(rows["workload_hash"])),
        "backend": rows["backend"].iloc[0],
        "seeds": [int(seed) for seed in rows["seed"]],
        **{name: int(rows[name].sum()) for name in TOTALS},
        "slo_attainment": _triple(rows["slo_attainment"]),
        "slo_attainment_per_class": {column.removeprefix(PER_CLASS): _triple(rows[column]) for column in per_class},
        **{name: _number(float(rows[name].mean())) for name in MEANS},
    }


def combined_hash(hashes: list[str]) -> str:
    """One hash for the workloads of several seeds, in seed order; that of a single seed is its own."""
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]


def differences(rows: pd.DataFrame) -> dict[str, Interval]:
    """SLO attainment of every planner minus that of the first one in ``rows``, paired by seed.

    Planners that share no seed with the first are left out.
    """
    scores = {
        planner: dict(zip(group["seed"], group["slo_attainment"], strict=True))
        for planner, group in rows.groupby("planner", sort=False)
    }
    baseline, *others = scores
    return {
        planner: paired_difference(scores[planner], scores[baseline], bootstrap_rng())
        for planner in others
        if scores[planner].keys() & scores[baseline].keys()
    }


def _triple(scores: pd.Series) -> dict[str, float | None]:
    """A class without a request has no attainment; seeds in which that happened do not count."""
    known = scores.dropna().to_numpy(dtype=np.float64)
    if known.size == 0:
        return dict.fromkeys(Interval._fields)
    return interval_over_seeds(known)._asdict()


def interval_over_seeds(scores: ArrayLike) -> Interval:
    """The interquartile mean of scores of shape (n,) with its 95 % bootstrap interval."""
    return bootstrap_interval([scores], bootstrap_rng())


def bootstrap_rng() -> np.random.Generator:
    """The generator each interval starts from."""
    return np.random.default_rng(np.random.SeedSequence(BOOTSTRAP_SEED))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
