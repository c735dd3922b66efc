"""Figure 2: how long interactive requests wait behind running batch work, with and without eviction."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("hol_blocking",)
P50, P99 = (f"latency_per_class.interactive.queueing_{p}_s" for p in ("p50", "p99"))
ATTAINED = "slo_attainment_per_class.interactive"
NAMES = {
    "edf": "EDF, no eviction",
    "edf_evict": "EDF, eviction, KV kept",
    "qlm": "QLM, eviction, KV kept",
    "qlm_no_keep_kv": "QLM, eviction, KV recomputed",
    "qlm_no_evict": "QLM, no eviction",
}


def data(source: Source) -> pd.DataFrame:
    rows = source.rows("hol_blocking")
    return tidy.means(rows, ("planner",), (P50, P99, ATTAINED, "evictions"))


def plot(data: pd.DataFrame) -> Picture:
    picture, axes = style.panels(3, width=3.6)
    for each, metric, what in zip(
        axes,
        (P50, ATTAINED, "evictions"),
        ("interactive waiting time, p50 (s)", "interactive SLO attainment (share)", "requests evicted"),
        strict=True,
    ):
        shown = data[data["metric"] == metric]
        style.bars(each, shown, [NAMES[p] for p in shown["planner"]], [style.colour(p) for p in shown["planner"]])
        each.set_xlabel(what)
    for each in axes[1:]:
        each.set_yticklabels([])
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        "One instance works through long batch answers of one model while requests for a chat model arrive: the "
        f"time until these first run, how many of them meet their SLO, and evictions an episode; {tidy.INTERVALS}. "
        f"{tidy.setting(source.rows('hol_blocking'))}"
    )
