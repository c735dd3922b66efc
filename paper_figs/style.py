"""How figures look: planners' names and colours, axes with intervals, files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture

from qlm_env.workload.atomic import atomic_path

LABELS = {
    "fcfs": "FCFS (vLLM)",
    "edf": "EDF",
    "swap_aware_edf": "EDF, models in batches",
    "shepherd": "SHEPHERD-style",
    "round_robin": "round robin",
    "least_loaded": "least loaded",
    "qlm": "QLM",
    "qlm_no_evict": "no eviction",
    "qlm_no_keep_kv": "KV dropped",
    "qlm_no_balance": "no balancing",
    "qlm_no_swap": "no swaps",
    "qlm_no_warm_start": "no warm start",
    "oracle": "QLM knowing lengths",
}
# Paul Tol's bright scheme, which colour-blind readers can tell apart; markers tell them apart in print.
COLOURS = {
    "qlm": "#4477AA",
    "fcfs": "#EE6677",
    "edf": "#228833",
    "swap_aware_edf": "#CCBB44",
    "shepherd": "#AA3377",
    "round_robin": "#EE6677",
    "least_loaded": "#228833",
    "oracle": "#777777",
}
OTHER = "#66CCEE"
MARKERS = {
    "qlm": "o",
    "fcfs": "s",
    "edf": "^",
    "swap_aware_edf": "v",
    "shepherd": "D",
    "round_robin": "s",
    "least_loaded": "^",
}
BAND = "0.92"
"""Behind a range that the paper states."""

DPI = 110


def label(planner: str) -> str:
    """A planner's name in a legend."""
    return LABELS.get(planner, planner)


def colour(planner: str) -> str:
    """A planner's colour, the same in every figure."""
    return COLOURS.get(planner, OTHER)


def panels(count: int, width: float = 4.2, height: float = 3.1) -> tuple[Picture, list[Axes]]:
    """A picture with ``count`` axes side by side."""
    picture = Picture(figsize=(width * count, height), layout="constrained")
    axes = [picture.add_subplot(1, count, k + 1) for k in range(count)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", linewidth=0.4, color="0.88")
        each.set_axisbelow(True)
    return picture, axes


def curves(
    axes: Axes,
    data: pd.DataFrame,
    x: str,
    by: str = "planner",
    scale: float = 1.0,
    names: Mapping[str, str] = LABELS,
    markers: bool = True,
) -> None:
    """``value`` over ``x`` for each value of ``by``, with its interval as a band; ``markers`` for few points."""
    for name, group in data.groupby(by, sort=False):
        place = group[x].to_numpy(float)
        value, lo, hi = (scale * group[column].to_numpy(float) for column in ("value", "lo", "hi"))
        key = str(name)
        line = axes.plot(
            place,
            value,
            marker=MARKERS.get(key, "o") if markers else None,
            markersize=4,
            color=COLOURS.get(key),
            label=names.get(key, key),
        )
        axes.fill_between(place, lo, hi, color=line[0].get_color(), alpha=0.15, linewidth=0)


def bars(axes: Axes, data: pd.DataFrame, names: Sequence[str], colours: Sequence[str], scale: float = 1.0) -> None:
    """``value`` of each row as a horizontal bar with its interval, the first on top."""
    value, lo, hi = (scale * data[column].to_numpy(float) for column in ("value", "lo", "hi"))
    place = np.arange(len(data))[::-1]
    # The interquartile mean of few seeds can lie outside its interval by a rounding error.
    errors = np.maximum([value - lo, hi - value], 0.0)
    axes.barh(place, value, xerr=errors, color=list(colours), capsize=2, height=0.7)
    axes.set_yticks(place, list(names))
    axes.grid(axis="x", linewidth=0.4, color="0.88")
    axes.grid(axis="y", visible=False)


def log_axis(axes: Axes, places: Iterable[float], base: float = 10.0) -> None:
    """A logarithmic x axis with a tick at each of ``places`` and no others."""
    ticks = sorted(set(places))
    axes.set_xscale("log", base=base)
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()


def legend_below(picture: Picture, axes: Axes, columns: int = 5) -> None:
    """One legend for all panels."""
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles, labels, frameon=False, ncols=min(columns, len(labels)), loc="outside lower center")


def save(picture: Picture, path: Path) -> list[Path]:
    """Write the picture as PNG and as PDF (``path`` without a suffix); the same numbers give the same bytes."""
    FigureCanvasAgg(picture)
    written = []
    for kind in ("png", "pdf"):
        target = path.with_name(f"{path.name}.{kind}")
        metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
        with atomic_path(target) as temporary:
            picture.savefig(temporary, format=kind, dpi=DPI, metadata=metadata)
        written.append(target)
    return written
