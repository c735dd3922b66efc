"""Figure 4: SLO attainment on one model against the arrival rate."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("w_a_rate",)
LOAD = "point.workload.arrivals.load"


def data(source: Source) -> pd.DataFrame:
    return tidy.means(source.rows("w_a_rate"), (LOAD, "planner"), ("slo_attainment",))


def plot(data: pd.DataFrame) -> Picture:
    picture, (axes,) = style.panels(1, width=5.2)
    style.curves(axes, data, LOAD, scale=100)
    axes.set_xlabel("arrival rate (share of capacity)")
    axes.set_ylabel("SLO attainment (%)")
    style.legend_below(picture, axes, 4)
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        f"SLO attainment on one model against the arrival rate, {tidy.INTERVALS}. "
        f"{tidy.setting(source.rows('w_a_rate'))} The paper publishes no rates; here they are shares of the "
        "cluster's estimated capacity."
    )
