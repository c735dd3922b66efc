"""The picture of `qlm profile validate`: distributions of both runs, and the engine over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from qlm_env.fidelity.errors import LATENCIES
from qlm_env.fidelity.recorded_series import RecordedSeries
from qlm_env.fidelity.replay import EngineCounts
from qlm_env.workload.atomic import atomic_path

Float = NDArray[np.float64]

SHOWN = ("ttft", "tpot", "e2e")
RECORDED, EMULATED = "C0", "C1"
DPI = 150


def draw_validation(
    path: Path,
    title: str,
    recorded: Mapping[str, Float],
    emulated: Mapping[str, Float],
    counts: EngineCounts,
    series: RecordedSeries | None,
) -> None:
    """Cumulative distributions of TTFT, TPOT and end-to-end latency, and requests running and waiting, as a PNG.

    Args:
        recorded: latencies in seconds by name, shape (N,).
        emulated: likewise.
        counts: of the emulated engine.
        series: of the recorded one, where the run has it.
    """
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for axes, name in zip(panels, SHOWN, strict=False):
        _distribution(axes, recorded[name], RECORDED, "recorded")
        _distribution(axes, emulated[name], EMULATED, "emulated")
        axes.set_xlabel(f"{LATENCIES[name]} (s)")
        axes.set_ylabel("share of requests")
        axes.set_ylim(0, 1)
    axes = panels[-1]
    for name, style in (("running", "-"), ("waiting", "--")):
        axes.plot(counts.time_s, getattr(counts, name), style, color=EMULATED, linewidth=1)
        if series is not None:
            axes.plot(series.time_s, getattr(series, name), style, color=RECORDED, linewidth=1)
        axes.plot([], [], style, color="0.3", label=name)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("requests")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _distribution(axes: Axes, values: Float, color: str, label: str) -> None:
    known = np.sort(values[np.isfinite(values)])
    axes.step(known, np.arange(1, len(known) + 1) / max(1, len(known)), where="post", color=color, label=label)
