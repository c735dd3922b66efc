"""The emulator and the real cluster side by side: a page of figures and pictures for the same planners and requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlm_env.cluster import instance_names
from qlm_env.timeline import CLUSTER_PID, FIRST_INSTANCE_PID, MODEL_TID
from qlm_env.workload.atomic import atomic_path
from runners import files
from runners.config import CompareConfig
from runners.results import PER_CLASS, EpisodeKey

PAGE = "backends.md"
COLOURS = ("C0", "C1")
DPI = 150
INSTANCES_SHOWN = 12
"""In a picture; the cluster's own curves stand for all."""

COMPARED = {
    "slo_attainment": ("SLO attainment (%)", 100.0),
    "e2e_p50_s": ("end to end, p50 (s)", 1.0),
    "e2e_p99_s": ("end to end, p99 (s)", 1.0),
    "ttft_p50_s": ("time to first token, p50 (s)", 1.0),
    "ttft_p99_s": ("time to first token, p99 (s)", 1.0),
    "request_throughput_per_s": ("requests/s", 1.0),
    "utilisation": ("utilisation", 1.0),
    "swaps": ("swaps", 1.0),
    "evictions": ("evictions", 1.0),
    "emulated_s": ("length of the episode (s)", 1.0),
}
"""Column -> its name on the page, and the factor it is shown with."""


class Span(NamedTuple):
    """What an instance's GPU held for a while."""

    name: str
    start_s: float
    stop_s: float


def write_report(config: CompareConfig, rows: pd.DataFrame) -> Path:
    """Write ``backends.md`` and its pictures into the results folder; returns the page.

    Only episodes that both backends have finished count. A picture shows the first of every planner's, if both left
    timelines.

    Args:
        rows: as :func:`runners.results.make_row` makes them, of exactly two backends.
    """
    first, second = config.options.backend
    lines = [
        f"# {config.scenario.workload.name} on {config.scenario.cluster.name}: {first} and {second}",
        "",
        "The same requests and planners on both. Means over the seeds that both have finished; differences are "
        f"{second} minus {first}.",
    ]
    for label, planner in config.planners.items():
        own = rows[rows["planner"] == label]
        seeds = sorted(set(own["seed"][own["backend"] == first]) & set(own["seed"][own["backend"] == second]))
        if not seeds:
            continue
        own = own[own["seed"].isin(seeds)]
        lines += ["", f"## {label}", "", *_table(own, first, second, seeds)]
        traces = [
            EpisodeKey(config.scenario, label, planner, seeds[0], backend).timeline_path(config.out)
            for backend in (first, second)
        ]
        if all(trace.exists() for trace in traces):
            picture = config.out / f"backends-{label}.png"
            events = [json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] for trace in traces]
            names = [instance.name for instance in instance_names(config.scenario.cluster)][:INSTANCES_SHOWN]
            draw_timelines(picture, f"{label}, seed {seeds[0]}", (first, second), events, names)
            lines += ["", f"![timelines of {label}]({picture.name})"]
    page = config.out / PAGE
    files.write_text(page, "\n".join(lines) + "\n")
    return page


def _table(rows: pd.DataFrame, first: str, second: str, seeds: Sequence[int]) -> list[str]:
    """One metric per line: both backends, and the second minus the first."""
    compared = dict(COMPARED)
    for column in rows.columns:
        if column.startswith(PER_CLASS) and rows[column].notna().any():
            compared[column] = (f"SLO attainment, {column.removeprefix(PER_CLASS)} (%)", 100.0)
    lines = [
        f"| {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} | {first} | {second} | difference |",
        "|---|---|---|---|",
    ]
    for column, (name, factor) in compared.items():
        means = [factor * rows[column][rows["backend"] == backend].mean() for backend in (first, second)]
        lines.append(f"| {name} | {means[0]:.4g} | {means[1]:.4g} | {means[1] - means[0]:+.4g} |")
    return lines


def draw_timelines(
    path: Path,
    title: str,
    backends: Sequence[str],
    traces: Sequence[Sequence[Mapping[str, Any]]],
    instances: Sequence[str],
) -> None:
    """Both episodes over time as a PNG: attainment and requests of the cluster, then requests and models per instance.

    Args:
        traces: the ``traceEvents`` of both, as :meth:`qlm_env.timeline.Timeline.to_chrome_trace` gives them.
        instances: their names, by index.
    """
    figure = Figure(figsize=(9.0, 3.6 + 1.5 * len(instances)), layout="constrained")
    panels = figure.subplots(2 + len(instances), 1, sharex=True)
    for trace, backend, colour in zip(traces, backends, COLOURS, strict=True):
        _draw_counter(panels[0], trace, CLUSTER_PID, "SLO attainment", "percent", colour, "-")
        for series, style in (("running", "-"), ("waiting", "--")):
            _draw_counter(panels[1], trace, CLUSTER_PID, "requests", series, colour, style)
        panels[0].plot([], [], color=colour, label=backend)
    panels[0].set_ylabel("attainment (%)")
    panels[0].set_ylim(0, 105)
    panels[0].legend(frameon=False, ncols=2, loc="lower right")
    panels[1].set_ylabel("requests")
    for style, series in (("-", "running"), ("--", "waiting")):
        panels[1].plot([], [], style, color="0.3", label=series)
    panels[1].legend(frameon=False, ncols=2, loc="upper right")
    held = sorted({span.name for trace in traces for i in range(len(instances)) for span in model_spans(trace, i)})
    shades = {name: f"C{2 + k}" for k, name in enumerate(name for name in held if not name.startswith("loading "))}
    for i, (axes, name) in enumerate(zip(panels[2:], instances, strict=True)):
        for trace, colour in zip(traces, COLOURS, strict=True):
            _draw_counter(axes, trace, FIRST_INSTANCE_PID + i, "requests", "running", colour, "-")
        axes.set_ylabel(f"{name}\nrunning")
        _draw_models(axes, [model_spans(trace, i) for trace in traces], shades, backends)
    panels[-1].set_xlabel("time (s)")
    figure.suptitle(f"{title}. Bands: models on the GPU ({', '.join(backends)} from above), pale while loading")
    handles = [Axes.fill_between(panels[0], [], [], color=shade, label=name) for name, shade in shades.items()]
    figure.legend(handles, list(shades), loc="outside lower center", ncols=4, frameon=False)
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def model_spans(trace: Sequence[Mapping[str, Any]], i: int) -> list[Span]:
    """What instance ``i``'s GPU held, in order of time."""
    return [
        Span(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in trace
        if event["ph"] == "X" and event["pid"] == FIRST_INSTANCE_PID + i and event["tid"] == MODEL_TID
    ]


def _draw_counter(
    axes: Axes, trace: Sequence[Mapping[str, Any]], pid: int, name: str, series: str, colour: str, style: str
) -> None:
    values = [
        (event["ts"] / 1e6, event["args"][series])
        for event in trace
        if event["ph"] == "C" and event["pid"] == pid and event["name"] == name
    ]
    if values:
        times, counts = np.array(values, float).T
        axes.step(times, counts, style, where="post", color=colour, linewidth=1)


def _draw_models(
    axes: Axes, spans: Sequence[Sequence[Span]], shades: Mapping[str, str], backends: Sequence[str]
) -> None:
    """A band per backend above the curves; loading is pale, and time without a model blank."""
    top = max(1.0, axes.get_ylim()[1])
    height = 0.16 * top
    for k, held in enumerate(spans):
        bottom = top + (len(backends) - k) * 1.15 * height
        for span in held:
            model = span.name.removeprefix("loading ")
            axes.broken_barh(
                [(span.start_s, span.stop_s - span.start_s)],
                (bottom - height, height),
                facecolor=shades.get(model, "0.5"),
                alpha=0.35 if span.name.startswith("loading ") else 1.0,
            )
    axes.set_ylim(0, top + (len(backends) + 0.2) * 1.15 * height)
