"""Figure 15: learned policies, attainment against decision time, and on clusters that they were not trained on."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS: tuple[str, ...] = ()


def data(source: Source) -> pd.DataFrame:
    rows = source.comparison(
        source.options.learned,
        "qlm compare with planner=learned beside others, on one cluster or (with -m cluster=...) several",
    )
    return tidy.means(rows, ("cluster", "planner"), ("slo_attainment", "decision_p50_ms"))


def plot(data: pd.DataFrame) -> Picture:
    picture, (against_time, transfer) = style.panels(2)
    wide = data.pivot(index=["cluster", "planner"], columns="metric", values="value").reset_index()
    first = data["cluster"].iloc[0]
    for _, row in wide[wide["cluster"] == first].iterrows():
        against_time.plot(row["decision_p50_ms"], 100 * row["slo_attainment"], "o", color=style.colour(row["planner"]))
        against_time.annotate(
            style.label(row["planner"]), (row["decision_p50_ms"], 100 * row["slo_attainment"]), fontsize="x-small"
        )
    against_time.set_xscale("log")
    against_time.set_xlabel(f"decision time, p50 (ms), on {first}")
    against_time.set_ylabel("SLO attainment (%)")
    for planner, of_planner in wide.groupby("planner", sort=False):
        transfer.plot(of_planner["cluster"], 100 * of_planner["slo_attainment"], "o-", label=style.label(str(planner)))
    transfer.set_xlabel("cluster")
    transfer.legend(frameon=False, fontsize="x-small")
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    rows = source.comparison(source.options.learned, "")
    return (
        "SLO attainment of learned policies beside planners, against the time of a decision and across clusters, "
        f"{tidy.INTERVALS}. {tidy.setting(rows)}"
    )
