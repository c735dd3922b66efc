"""Figure 7: SLO attainment and throughput on five models against the arrival rate."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("w_b_rate",)
LOAD = "point.workload.arrivals.load"


def data(source: Source) -> pd.DataFrame:
    return tidy.means(source.rows("w_b_rate"), (LOAD, "planner"), ("slo_attainment", "request_throughput_per_s"))


def plot(data: pd.DataFrame) -> Picture:
    picture, (attainment, throughput) = style.panels(2)
    for axes, metric, scale, what in (
        (attainment, "slo_attainment", 100.0, "SLO attainment (%)"),
        (throughput, "request_throughput_per_s", 1.0, "requests/s"),
    ):
        style.curves(axes, data[data["metric"] == metric], LOAD, scale=scale)
        axes.set_xlabel("arrival rate (share of capacity)")
        axes.set_ylabel(what)
        axes.set_ylim(bottom=0)
    style.legend_below(picture, attainment)
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        "SLO attainment and throughput on five models in three instances against the arrival rate, "
        f"{tidy.INTERVALS}. {tidy.setting(source.rows('w_b_rate'))} The capacity is that without swaps."
    )
