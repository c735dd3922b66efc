"""`qlm bench`: speed measurements of this machine, by name."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from rich.table import Table

from runners import files
from runners.config import BenchOptions
from runners.tables import console


class Figure(TypedDict):
    """One measured number."""

    name: str
    value: float
    unit: str


def bench(name: str, module: str, options: BenchOptions) -> None:
    """Run a benchmark, print its figures and write them to ``out/bench.json``, keyed by name.

    Args:
        module: has a function ``measure(options) -> list[Figure]``.
        options: the benchmark's own; ``out`` is a folder, None is ``results/bench-<name>``.
    """
    measure: Callable[[BenchOptions], list[Figure]] = importlib.import_module(module).measure
    figures = measure(options)
    path = Path(options.out or f"results/bench-{name}") / "bench.json"
    by_name = {figure["name"]: {"value": figure["value"], "unit": figure["unit"]} for figure in figures}
    files.write_text(path, json.dumps(by_name, indent=2, allow_nan=False) + "\n")
    table = Table("figure", title=f"qlm bench {name}")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for figure in figures:
        table.add_row(figure["name"], f"{figure['value']:,.4g}", figure["unit"])
    console().print(table)
    print(f"figures are in {path}", file=sys.stderr)
