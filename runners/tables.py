"""Results as tables on the terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from runners.results import PER_CLASS
from runners.stats import Interval

PLAIN_WIDTH = 160
"""Columns of output that does not go to a terminal, where nothing should be cut off."""


def console() -> Console:
    """A console on standard output that never cuts a table when the output goes to a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def comparison_table(summary: Sequence[Mapping[str, Any]], differences: Mapping[str, Interval], title: str) -> Table:
    """One line per planner: attainment with 95 % intervals, the difference to the first, and costs."""
    classes = list(dict.fromkeys(name for entry in summary for name in entry["slo_attainment_per_class"]))
    table = Table(title=title, caption="SLO attainment in %: interquartile mean [95 % interval] over seeds")
    table.add_column("planner", no_wrap=True)
    for name in ("all", *classes):
        table.add_column(name, justify="right")
    if differences:
        table.add_column(f"all, minus\n{summary[0]['planner']}", justify="right")
    for name in ("requests/s", "utilisation", "swaps", "evictions", "decision ms\np50 / p99"):
        table.add_column(name, justify="right")
    for entry in summary:
        cells = [entry["planner"], _percent(entry["slo_attainment"])]
        cells += [_percent(entry["slo_attainment_per_class"].get(name)) for name in classes]
        if differences:
            difference = differences.get(entry["planner"])
            cells.append(_percent(difference._asdict(), sign="+") if difference else "")
        cells += [number(entry[name]) for name in ("request_throughput_per_s", "utilisation")]
        cells += [number(entry[name]) for name in ("swaps", "evictions")]
        cells.append(f"{number(entry['decision_p50_ms'])} / {number(entry['decision_p99_ms'])}")
        table.add_row(*cells)
    return table


def episode_table(rows: pd.DataFrame, title: str) -> Table:
    """Every metric of one planner's episodes, one per line: the mean over the seeds."""
    seeds = f"seed {rows['seed'].iloc[0]}" if len(rows) == 1 else f"means over {len(rows)} seeds"
    table = Table("metric", title=f"{title}, {seeds}")
    table.add_column("value", justify="right")
    for name, value in rows.drop(columns="seed").mean(numeric_only=True).items():
        label = f"slo_attainment {name.removeprefix(PER_CLASS)}" if name.startswith(PER_CLASS) else name
        table.add_row(label, number(value))
    return table


def mapping_table(values: Mapping[str, Any], title: str) -> Table:
    """Names and values, one pair per line."""
    table = Table("", title=title, show_header=False)
    for name, value in values.items():
        table.add_row(name, number(value) if isinstance(value, (int, float)) else str(value))
    return table


def interval_percent(interval: Interval, sign: str = "") -> str:
    """An interval of shares in percent, on one line; the interval of a single value is left out."""
    value, low, high = (100.0 * number for number in interval)
    return f"{value:{sign}.1f}" + (f" [{low:{sign}.1f}, {high:{sign}.1f}]" if low < high else "")


def _percent(triple: Mapping[str, float | None] | None, sign: str = "") -> str:
    if triple is None or triple["iqm"] is None:
        return "-"
    value, lo, hi = (100.0 * (triple[name] or 0.0) for name in Interval._fields)
    return f"{value:{sign}.1f}" + (f"\n[{lo:{sign}.1f}, {hi:{sign}.1f}]" if lo < hi else "")


def number(value: float | None) -> str:
    """A number as people read it; a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) or (value == round(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
