"""The headline: what QLM gains over the state of the art, beside what the paper states."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source
from paper_figs.published import published
from runners.stats import paired_improvement, performance_profile
from runners.summary import bootstrap_rng

EXPERIMENTS = ("headline",)
LOAD = "point.workload.arrivals.load"
BASELINES = ("fcfs", "edf", "shepherd")
PLANNERS = ("fcfs", "edf", "shepherd", "qlm", "oracle")
PROFILE = "profile"
"""In the column ``metric``: ``value`` is the share of runs of the planner ``baseline`` that attain more than "
"``threshold``."""
THRESHOLDS = np.linspace(0.0, 1.0, 101)
METRICS = {"slo_attainment": "SLO attainment", "request_throughput_per_s": "throughput"}


def data(source: Source) -> pd.DataFrame:
    rows = source.rows("headline")
    parts = [tidy.gains(rows, (LOAD, "case"), metric, "qlm", BASELINES, relative=True) for metric in METRICS]
    for planner in PLANNERS:
        of_planner = rows[rows["planner"] == planner]
        runs = [group["slo_attainment"].to_numpy() for _, group in of_planner.groupby(["case", LOAD])]
        value, lo, hi = performance_profile(runs, THRESHOLDS, bootstrap_rng())
        profile = {"threshold": THRESHOLDS, "value": value, "lo": lo, "hi": hi}
        parts.append(pd.DataFrame(profile).assign(metric=PROFILE, baseline=planner, n=len(of_planner)))
    return pd.concat(parts, ignore_index=True)


def plot(data: pd.DataFrame) -> Picture:
    paper = published()
    picture, (*axes, profile) = style.panels(3, height=3.8)
    highest = data[data[LOAD] == data[LOAD].max()]
    for each, metric, band in zip(axes, METRICS, (paper.attainment_gain, paper.throughput_gain), strict=True):
        shown = highest[highest["metric"] == metric]
        names = [f"{case}, over {style.label(b)}" for case, b in zip(shown["case"], shown["baseline"], strict=True)]
        each.axvspan(100 * band.lowest, 100 * band.highest, color=style.BAND, label="the paper's range")
        style.bars(each, shown, names, [style.colour(b) for b in shown["baseline"]], 100)
        each.axvline(0, color="0.4", linewidth=0.8)
        each.set_xlabel(f"QLM's relative gain in {METRICS[metric]} (%)")
    axes[1].set_yticklabels([])
    profiles = data[data["metric"] == PROFILE].assign(percent=100 * data["threshold"])
    style.curves(profile, profiles, "percent", "baseline", 100, markers=False)
    profile.set_xlabel("SLO attainment above (%)")
    profile.set_ylabel("runs (%)")
    profile.set_xlim(40, 100)
    profile.legend(frameon=False, fontsize="x-small", loc="lower left")
    style.legend_below(picture, axes[0])
    return picture


def table(data: pd.DataFrame, source: Source) -> str:
    """The gains as a Markdown table, with the probability that QLM attains more on the same requests."""
    paper = published()
    rows = source.rows("headline")
    lines = [
        "| workload | load | over | SLO attainment | throughput | attains more | normalised score | n |",
        "|---|---|---|---|---|---|---|---|",
        f"| the paper | not stated | state of the art | +{100 * paper.attainment_gain.lowest:.0f} to "
        f"+{100 * paper.attainment_gain.highest:.0f} % | +{100 * paper.throughput_gain.lowest:.0f} to "
        f"+{100 * paper.throughput_gain.highest:.0f} % | | | |",
    ]
    for (load, case, baseline), group in data.groupby([LOAD, "case", "baseline"], sort=False):
        told = {row["metric"]: _gain(row) for _, row in group.iterrows()}
        at = rows[(rows[LOAD] == load) & (rows["case"] == case)]
        normalised = tidy.normalised(at, "slo_attainment")
        ours, theirs = (
            dict(zip(of["seed"], of["slo_attainment"], strict=True))
            for of in (at[at["planner"] == p] for p in ("qlm", baseline))
        )
        better = paired_improvement({case: (ours, theirs)}, bootstrap_rng())
        lines.append(
            f"| {case} | {100 * load:g} % | {style.label(baseline)} | {told['slo_attainment']} | "
            f"{told['request_throughput_per_s']} | {100 * better.iqm:.0f} % | {normalised} | {group['n'].iloc[0]} |"
        )
    return "\n".join(lines) + "\n"


def _gain(row: pd.Series) -> str:
    value, lo, hi = (100 * row[name] for name in ("value", "lo", "hi"))
    return f"{value:+.1f} % [{lo:+.1f}, {hi:+.1f}]"


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        f"Relative gain of QLM over baselines at {100 * data[LOAD].max():g} % of capacity: ratios of interquartile "
        "means, less 1, with 95 % bootstrap intervals, paired by seed. Right: the share of all runs above each SLO "
        "attainment. Grey: the range in the abstract of arXiv 2407.00047, whose rates are not published. In the "
        "table, FCFS has the normalised score 0 and the planner that knows output lengths 1, seed by seed. "
        f"{tidy.setting(source.rows('headline'))}"
    )
