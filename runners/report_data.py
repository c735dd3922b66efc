"""What a report shows, read from the folder of a comparison and made ready for the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qlm_env.spec import ConfigError
from runners import results
from runners.errors import CommandFailed
from runners.provenance import read_command
from runners.summary import differences, summarise

Json = dict[str, Any]

LATENCIES = ("queueing_s", "ttft_s", "e2e_s")
QUANTILES = np.linspace(0.0, 1.0, 201)
MAX_MARKS = 20_000
"""Marks of one kind in a timeline; of more, every k-th is shown and the page says so."""
MAX_SAMPLES = 4_000
"""Points of a counter over time."""

CLUSTER = "cluster"
LOADING = "loading "
"""How a timeline's slice begins while weights move."""


def read_results(folder: Path) -> pd.DataFrame:
    """The rows of a comparison, all of one scenario and one version of the code.

    Raises:
        ConfigError: the folder does not exist or holds no results of a comparison.
        CommandFailed: rows of several scenarios or versions are mixed, or planners saw different requests.
    """
    path = folder / "results.parquet"
    if not folder.is_dir():
        raise ConfigError(f"'folder': there is no folder '{folder}'")
    if not path.exists():
        raise ConfigError(f"'folder': there is no results.parquet in '{folder}'; qlm compare out={folder} writes it")
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"'folder': '{path}' cannot be read: {' '.join(str(error).split())}") from None
    if "job" in rows.columns:
        jobs = ", ".join(str(folder / str(job)) for job in rows["job"].unique())
        raise ConfigError(f"'folder': '{folder}' holds several jobs; name one of {jobs}")
    for column, what in (("config_hash", "scenarios"), ("code_version", "versions of the code")):
        if rows[column].nunique() > 1:
            found = ", ".join(sorted(rows[column].unique()))
            raise CommandFailed(f"'{path}' mixes rows of several {what} ({found}); run the comparison again")
    results.check_identical_workloads(rows)
    return rows


def report_data(folder: Path) -> Json:
    """Everything the page shows, as plain JSON values.

    Raises:
        ConfigError, CommandFailed: as :func:`read_results`.
    """
    rows = results.tell_backends_apart(read_results(folder))
    scenario = json.loads(rows["scenario"].iloc[0])
    planners = list(rows["planner"].unique())
    return {
        "title": f"{rows['workload'].iloc[0]} on {rows['cluster'].iloc[0]}",
        "provenance": read_command(folder),
        "code_version": rows["code_version"].iloc[0],
        "backend": ", ".join(rows["backend"].unique()),
        "metric": scenario["slo"]["metric"],
        "classes": scenario["slo"]["classes"],
        "scenario": scenario,
        "planners": planners,
        "planner_options": {name: json.loads(of["planner_options"].iloc[0]) for name, of in rows.groupby("planner")},
        "summary": summarise(rows),
        "differences": {name: interval._asdict() for name, interval in differences(rows).items()},
        "seeds": {
            name: {str(seed): value for seed, value in zip(of["seed"], of["slo_attainment"], strict=True)}
            for name, of in rows.groupby("planner", sort=False)
        },
        "latencies": {name: _latencies(folder, of) for name, of in rows.groupby("planner", sort=False)},
        "timelines": {name: _timeline(folder, of) for name, of in rows.groupby("planner", sort=False)},
    }


def _latencies(folder: Path, rows: pd.DataFrame) -> Json | None:
    """By SLO class and latency, quantiles of the requests of all seeds together; None if an episode has none."""
    paths = [results.requests_path(folder, name) for name in rows["episode"]]
    if not all(path.exists() for path in paths):
        return None
    requests = pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)
    return {
        str(name): {"requests": len(of), **{latency: _quantiles(of[latency]) for latency in LATENCIES}}
        for name, of in requests.groupby("slo_class", sort=False)
    }


def _quantiles(seconds: pd.Series) -> Json:
    """Of those that have the latency, and their share."""
    known = seconds.dropna().to_numpy(np.float64)
    if known.size == 0:
        return {"share": 0.0, "s": []}
    return {"share": known.size / len(seconds), "s": [float(f"{s:.4g}") for s in np.quantile(known, QUANTILES)]}


def _timeline(folder: Path, rows: pd.DataFrame) -> Json | None:
    """The first seed's timeline; None if there is none."""
    row = rows.sort_values("seed").iloc[0]
    path = results.timeline_path(folder, row["episode"])
    if not path.exists():
        return None
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except (ValueError, KeyError) as error:
        raise CommandFailed(f"'{path}' is not a timeline ({type(error).__name__})") from None
    return {"seed": int(row["seed"]), **read_trace(events)}


def read_trace(events: list[Mapping[str, Any]]) -> Json:
    """Instances, what was on their GPUs, operations and counters of a Chrome trace, times in seconds.

    Returns:
        ``instances`` (names), ``slices`` (instance, start, length, name, whether weights are moving or it is a warm
        start), ``marks`` (times, instances and request counts by kind of operation), ``queue`` and ``attainment``
        over time.
    """
    processes = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    instances = [pid for pid, name in processes.items() if name != CLUSTER]
    place = {pid: k for k, pid in enumerate(instances)}
    slices = [
        [place[e["pid"]], _seconds(e["ts"]), _seconds(e["dur"]), e["name"], tracks.get((e["pid"], e["tid"]), "")]
        for e in events
        if e["ph"] == "X" and e["pid"] in place
    ]
    marks: dict[str, Json] = {}
    for event in (e for e in events if e["ph"] == "i" and e["pid"] in place):
        kind = marks.setdefault(event["name"], {"t": [], "i": [], "n": []})
        kind["t"].append(_seconds(event["ts"]))
        kind["i"].append(place[event["pid"]])
        kind["n"].append(int(event.get("args", {}).get("requests", 0)))
    for kind in marks.values():
        kind["total"] = len(kind["t"])
        step = 1 + (kind["total"] - 1) // MAX_MARKS
        for name in ("t", "i", "n"):
            kind[name] = kind[name][::step]
    return {
        "instances": [processes[pid].removeprefix("instance ") for pid in instances],
        "slices": slices,
        "marks": marks,
        "queue": _counter(events, processes, "requests"),
        "attainment": _counter(events, processes, "SLO attainment"),
    }


def _counter(events: list[Mapping[str, Any]], processes: Mapping[int, str], name: str) -> Json:
    """A counter of the whole cluster: times, and values by series."""
    found = [e for e in events if e["ph"] == "C" and e["name"] == name and processes.get(e["pid"]) == CLUSTER]
    found = found[:: 1 + len(found) // MAX_SAMPLES]
    series = list(found[0]["args"]) if found else []
    return {"t": [_seconds(e["ts"]) for e in found], **{key: [e["args"][key] for e in found] for key in series}}


def _seconds(microseconds: float) -> float:
    return round(microseconds / 1e6, 3)
