"""What figures of left-out operations share: attainment and swaps of QLM without each of them."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy

METRICS = ("slo_attainment", "request_throughput_per_s")


def without_each(rows: pd.DataFrame) -> pd.DataFrame:
    """Means of every variant, in the order of the experiment."""
    return tidy.means(rows, ("planner",), METRICS)


def plot_without_each(data: pd.DataFrame) -> Picture:
    """Bars of attainment and throughput, QLM on top."""
    picture, (attainment, throughput) = style.panels(2)
    for axes, metric, scale, what in (
        (attainment, METRICS[0], 100.0, "SLO attainment (%)"),
        (throughput, METRICS[1], 1.0, "requests/s"),
    ):
        shown = data[data["metric"] == metric]
        style.bars(
            axes, shown, [style.label(p) for p in shown["planner"]], [style.colour(p) for p in shown["planner"]], scale
        )
        axes.set_xlabel(what)
    throughput.set_yticklabels([])
    return picture
