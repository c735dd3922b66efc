"""Figure 3: EDF on several models swaps again and again; grouped execution does not."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("w_b_rate",)
LOAD = "point.workload.arrivals.load"
SHOWN = ("edf", "swap_aware_edf", "qlm")


def data(source: Source) -> pd.DataFrame:
    rows = source.rows("w_b_rate")
    loads = rows[LOAD].unique()
    at = rows[(rows[LOAD] == loads[len(loads) // 2]) & rows["planner"].isin(SHOWN)]
    return tidy.means(at, (LOAD, "planner"), ("swaps", "request_throughput_per_s"))


def plot(data: pd.DataFrame) -> Picture:
    picture, (swaps, throughput) = style.panels(2)
    for axes, metric, what in (
        (swaps, "swaps", "model swaps an episode"),
        (throughput, "request_throughput_per_s", "requests/s"),
    ):
        shown = data[data["metric"] == metric]
        style.bars(axes, shown, [style.label(p) for p in shown["planner"]], [style.colour(p) for p in shown["planner"]])
        axes.set_xlabel(what)
    throughput.set_yticklabels([])
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    rows = source.rows("w_b_rate")
    at = rows[rows[LOAD] == data[LOAD].iloc[0]]
    return (
        "Model swaps and throughput of EDF over single requests' deadlines, of EDF within batches of one model, and "
        f"of QLM at {100 * data[LOAD].iloc[0]:g} % of capacity, {tidy.INTERVALS}. {tidy.setting(at)}"
    )
