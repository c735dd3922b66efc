"""Figure 11: what QLM gains as queues get longer and arrivals burstier."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("robustness_queue", "robustness_burst")
QUEUE = "point.workload.num_requests"
BURST = "point.workload.arrivals.cv"
BASELINES = ("fcfs", "edf", "swap_aware_edf")


def data(source: Source) -> pd.DataFrame:
    parts = []
    for experiment, x in zip(EXPERIMENTS, (QUEUE, BURST), strict=True):
        gained = tidy.gains(source.rows(experiment), (x,), "slo_attainment", "qlm", BASELINES, relative=False)
        parts.append(gained.rename(columns={x: "x"}).assign(experiment=experiment))
    return pd.concat(parts, ignore_index=True)


def plot(data: pd.DataFrame) -> Picture:
    picture, (queue, burst) = style.panels(2)
    for axes, experiment, what in (
        (queue, EXPERIMENTS[0], "requests waiting at the start"),
        (burst, EXPERIMENTS[1], "coefficient of variation of arrival gaps"),
    ):
        shown = data[data["experiment"] == experiment]
        style.curves(axes, shown, "x", "baseline", 100)
        axes.axhline(0, color="0.4", linewidth=0.8)
        style.log_axis(axes, shown["x"])
        axes.set_xlabel(what)
    queue.set_ylabel("QLM's gain in SLO attainment\n(percentage points)")
    style.legend_below(picture, queue)
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    queue, burst = (source.rows(name) for name in EXPERIMENTS)
    return (
        "What QLM attains more than each baseline, paired by seed: interquartile means of the differences with 95 % "
        f"bootstrap intervals. Left, everything is there at time 0: {tidy.setting(queue)} Right, Gamma arrivals at "
        f"80 % of capacity: {tidy.setting(burst)}"
    )
