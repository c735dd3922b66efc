"""Figure 5: throughput on one model against the arrival rate."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("w_a_rate",)
LOAD = "point.workload.arrivals.load"


def data(source: Source) -> pd.DataFrame:
    return tidy.means(source.rows("w_a_rate"), (LOAD, "planner"), ("request_throughput_per_s", "goodput_per_s"))


def plot(data: pd.DataFrame) -> Picture:
    picture, (all_axes, met_axes) = style.panels(2)
    for axes, metric, what in (
        (all_axes, "request_throughput_per_s", "requests/s"),
        (met_axes, "goodput_per_s", "requests/s within their SLO"),
    ):
        style.curves(axes, data[data["metric"] == metric], LOAD)
        axes.set_xlabel("arrival rate (share of capacity)")
        axes.set_ylabel(what)
        axes.set_ylim(bottom=0)
    style.legend_below(picture, all_axes, 4)
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        f"Throughput on one model against the arrival rate, {tidy.INTERVALS}: finished requests over the whole "
        "episode, its tail included (left), and those within their SLO (right). "
        f"{tidy.setting(source.rows('w_a_rate'))}"
    )
