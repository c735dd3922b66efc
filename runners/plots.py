"""Figures of a comparison, drawn from its summary and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlm_env.workload.atomic import atomic_path

LATENCIES = (("ttft", "time to first token"), ("e2e", "end to end"))
DPI = 150


def draw_attainment(path: Path, summary: Sequence[Mapping[str, Any]]) -> None:
    """SLO attainment by class (groups) and planner (bars), with 95 % intervals, as a PNG."""
    classes = list(dict.fromkeys(name for entry in summary for name in entry["slo_attainment_per_class"]))
    groups = ["all", *classes]
    figure = Figure(figsize=(2.0 + 1.6 * len(groups), 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(summary)
    for position, entry in enumerate(summary):
        triples = [
            entry["slo_attainment"],
            *(entry["slo_attainment_per_class"].get(name) for name in classes),
        ]
        iqm, lo, hi = (
            100 * np.array([np.nan if t is None or t[name] is None else t[name] for t in triples])
            for name in ("iqm", "lo", "hi")
        )
        x = np.arange(len(groups)) + (position - (len(summary) - 1) / 2) * width
        # The interquartile mean of few seeds can lie outside its interval by a rounding error.
        error = np.maximum([iqm - lo, hi - iqm], 0.0)
        axes.bar(x, iqm, width, yerr=error, capsize=2, label=entry["planner"])
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 105)
    axes.set_ylabel("SLO attainment (%)")
    axes.set_title(summary[0]["workload"])
    axes.legend(frameon=False, ncols=min(len(summary), 4), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    _save(figure, path)


def draw_latency(path: Path, rows: pd.DataFrame) -> None:
    """Latency percentiles by planner, means over the seeds, on a logarithmic axis, as a PNG."""
    means = rows.groupby("planner", sort=False)[
        [f"{name}_{percentile}_s" for name, _ in LATENCIES for percentile in ("p50", "p99")]
    ].mean()
    figure = Figure(figsize=(2.0 + 0.7 * len(means) * len(LATENCIES), 3.6), layout="constrained")
    panels = figure.subplots(1, len(LATENCIES), sharey=True)
    x = np.arange(len(means))
    for axes, (name, title) in zip(panels, LATENCIES, strict=True):
        p50, p99 = (means[f"{name}_{percentile}_s"].to_numpy() for percentile in ("p50", "p99"))
        axes.vlines(x, p50, p99, color="0.7", linewidth=2)
        axes.plot(x, p50, "o", label="p50")
        axes.plot(x, p99, "^", label="p99")
        axes.set_xlim(-0.5, len(means) - 0.5)
        axes.set_xticks(x, means.index, rotation=30, ha="right")
        axes.set_yscale("log")
        axes.set_title(title)
    panels[0].set_ylabel("latency (s)")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=2, loc="outside lower center")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
