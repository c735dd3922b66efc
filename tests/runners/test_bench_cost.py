"""`qlm bench cost` on sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runners.cli import main


def test_every_method_is_judged_by_the_same_fresh_scenarios(tmp_path: Path) -> None:
    arguments = ["families=[[6,2,2]]", "problems=3", "search_times_s=[0.02]", "scenarios=4", "fresh_scenarios=20"]
    assert main(["bench", "cost", *arguments, f"out={tmp_path}"]) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())
    where = "6 groups, 2 instances, 2 models, 0.02 s: "
    for method in ("stochastic", "deterministic", "4 scenarios", "planner's search, stochastic"):
        assert figures[f"{where}{method}, cost"]["value"] > 0.0
    for method in ("deterministic", "4 scenarios", "planner's search, deterministic"):
        low, middle, high = (
            figures[f"{where}{method}, {label}"]["value"] for label in ("from", "more than stochastic", "to")
        )
        assert low <= middle <= high
    assert f"{where}stochastic, more than stochastic" not in figures


def test_no_time_to_search_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cost", "search_times_s=[0]", f"out={tmp_path}"]) == 2
    assert "search_times_s" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
