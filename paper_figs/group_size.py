"""Figure 12: the size of request groups against attainment and planning time."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("group_size",)
DELTA = "point.environment.grouping.delta"


def data(source: Source) -> pd.DataFrame:
    rows = source.rows("group_size")
    # Planning of a whole episode, as a share of the time that it emulates.
    rows = rows.assign(planning_share=rows["planning_s"] / rows["emulated_s"])
    return tidy.means(rows, (DELTA, "case"), ("slo_attainment", "planning_share"))


def plot(data: pd.DataFrame) -> Picture:
    picture, (attainment, overhead) = style.panels(2)
    for axes, metric, what in (
        (attainment, "slo_attainment", "SLO attainment (%)"),
        (overhead, "planning_share", "planning, in % of emulated time"),
    ):
        style.curves(axes, data[data["metric"] == metric], DELTA, "case", 100)
        style.log_axis(axes, data[DELTA], base=2)
        axes.set_xlabel("group size (delta, in average batches)")
        axes.set_ylabel(what)
    style.legend_below(picture, attainment)
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        f"SLO attainment of QLM and its planning time against the largest size of a request group, {tidy.INTERVALS}. "
        f"{tidy.setting(source.rows('group_size'))} Planning is wall-clock time on one core, over emulated time."
    )
