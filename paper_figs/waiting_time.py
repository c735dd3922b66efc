"""Figure 1: waiting times as predicted and as they came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style
from paper_figs.figure import Source
from runners import bench_rwt
from runners.config import BenchRwtOptions

EXPERIMENTS: tuple[str, ...] = ()
QUEUES = (25, 50, 100, 200, 400, 800, 1600)
QUICK_QUEUES = (25, 100, 400)
HISTORY = 200
SEEDS, QUICK_SEEDS = 10, 3
SHOWN = 1500
"""Points of the left panel at most."""


def measure(queues: Sequence[int], history: int, seeds: int) -> list[Mapping[str, Any]]:
    """One row per waiting request, with its queue's R^2 and relative error beside it."""
    options = BenchRwtOptions(profile_factors=())
    rows: list[Mapping[str, Any]] = []
    for queue in queues:
        looks = [bench_rwt.look_at_queue(options, queue, history, seed) for seed in range(seeds)]
        exact = bench_rwt.accuracy(looks, 1.0)
        for seed, look in enumerate(looks):
            rows += [
                {
                    "queue": queue,
                    "seed": seed,
                    "predicted_s": float(predicted),
                    "actual_s": float(actual),
                    "r2": exact.r2,
                    "relative_error": exact.relative_error,
                    "within_90": exact.coverage[bench_rwt.INTERVALS.index(0.9)],
                }
                for predicted, actual in zip(look.predicted[1.0].mean_s, look.actual_s, strict=True)
            ]
    return rows


def data(source: Source) -> pd.DataFrame:
    quick = source.options.quick
    return source.measured(
        measure,
        code=(bench_rwt,),
        queues=list(QUICK_QUEUES if quick else QUEUES),
        history=HISTORY,
        seeds=QUICK_SEEDS if quick else SEEDS,
    )


def plot(data: pd.DataFrame) -> Picture:
    picture, (scatter, accuracy) = style.panels(2)
    longest = data[data["queue"] == data["queue"].max()]
    shown = longest.iloc[:: max(1, len(longest) // SHOWN)]
    scatter.plot(shown["predicted_s"], shown["actual_s"], ".", markersize=2, color=style.colour("qlm"))
    limit = float(np.nanmax(shown[["predicted_s", "actual_s"]].to_numpy()))
    scatter.plot([0, limit], [0, limit], color="0.4", linewidth=0.8)
    scatter.set_xlabel("predicted waiting time (s)")
    scatter.set_ylabel("actual waiting time (s)")
    scatter.set_title(f"{data['queue'].max():,} waiting", fontsize="medium")
    of_queue = data.groupby("queue")[["r2", "relative_error", "within_90"]].first()
    for name, what, marker in (
        ("r2", "R²", "o"),
        ("relative_error", "mean error / mean waiting time", "s"),
        ("within_90", "share within 90 % intervals", "^"),
    ):
        accuracy.plot(of_queue.index, of_queue[name], marker=marker, markersize=4, label=what)
    style.log_axis(accuracy, of_queue.index)
    accuracy.set_ylim(0, 1.05)
    accuracy.set_xlabel("requests waiting")
    accuracy.legend(frameon=False, fontsize="small")
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    last = data[data["queue"] == data["queue"].max()].iloc[0]
    return (
        "Waiting times predicted for every request of a queue, against those in the emulator: one A100 serving "
        f"llama-2-7b with ShareGPT lengths (W_A) works off a backlog, {HISTORY} requests having been served before; "
        f"n = {data['seed'].nunique()} backlogs per length, their requests taken together. At {last['queue']:,} "
        f"waiting R² is {last['r2']:.3f}."
    )
