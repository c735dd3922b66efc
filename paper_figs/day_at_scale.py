"""Figure 18: a day of a large cluster with a planner in the loop, its wall-clock time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style
from paper_figs.figure import Source
from runners import bench_scale
from runners.config import BenchScaleOptions

EXPERIMENTS: tuple[str, ...] = ()
SIZES, QUICK_SIZES = (1_000_000, 5_000_000), (20_000, 50_000, 100_000)


def measure(sizes: Sequence[int], settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One row per number of requests, which arrive at the same rate."""
    day = BenchScaleOptions(**settings)
    rows: list[Mapping[str, Any]] = []
    for requests in sizes:
        duration_s = day.duration_s * requests / day.num_requests
        options = day.model_copy(update={"num_requests": requests, "duration_s": duration_s})
        run = bench_scale.run_apart(options)
        rows.append(run._asdict() | {"planner": day.planner, "interval_s": day.interval_s, "preset": day.preset})
    return rows


def data(source: Source) -> pd.DataFrame:
    return source.measured(
        measure,
        code=(bench_scale,),
        sizes=list(QUICK_SIZES if source.options.quick else SIZES),
        settings=BenchScaleOptions().model_dump(exclude={"out"}),
    )


def plot(data: pd.DataFrame) -> Picture:
    picture, (time_axes, memory) = style.panels(2)
    requests = data["requests"] / 1e6
    time_axes.plot(requests, data["workload_s"] + data["episode_s"], "o-", color=style.colour("qlm"), label="all")
    time_axes.plot(requests, data["planner_s"], "s--", color=style.colour("edf"), label="in the planner")
    time_axes.set_ylabel("wall-clock time (s)")
    time_axes.legend(frameon=False)
    memory.plot(requests, data["peak_bytes"] / 1e9, "o-", color=style.colour("qlm"))
    memory.set_ylabel("peak memory (GB)")
    for axes in (time_axes, memory):
        axes.set_xlabel("requests (millions)")
        # Room for the outermost points, and both axes from 0.
        axes.margins(0.1)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    last = data.iloc[-1]
    wall_s = last["workload_s"] + last["episode_s"]
    return (
        f"Wall-clock time and peak memory with {last['planner']} deciding every {last['interval_s']:g} s: "
        f"{last['requests']:,} requests of {last['preset']} over {last['emulated_s'] / 3600:.1f} h on "
        f"{last['instances']} instances (two fifths A10, the rest A100) take {wall_s:,.0f} s and "
        f"{last['peak_bytes'] / 1e9:.2f} GB; SLO attainment {100 * last['slo_attainment']:.1f} %; one run each (n = "
        f"1), one process on {last['processor']}."
    )
