"""`qlm attainable`: bounds by seed, and planners' results as a share of them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from qlm_env.requests import workload_hash
from qlm_env.spec import ScenarioSpec
from runners.cli import main
from runners.composition import Request
from runners.config import parse_attainable
from runners.episode import build_workload
from runners.results import claim
from tests.runners.conftest import SMALL

TIGHT = (*SMALL, "workload.arrivals.load=8.0", "slo.classes.0.target_s=2", "slo.classes.1.target_s=4")


def configured_scenario(*overrides: str) -> ScenarioSpec:
    return parse_attainable(Request("attainable", overrides).compose()).scenario


def test_bounds_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attainable", *TIGHT, "seeds=[0,3]", f"out={tmp_path}"]) == 0
    bounds = json.loads((tmp_path / "attainable.json").read_text())
    assert [bound["seed"] for bound in bounds] == [0, 3]
    assert all(0.0 < bound["slo_attainment"] < 1.0 for bound in bounds)
    assert "attainable, at most" in capsys.readouterr().out


def test_results_in_the_folder_are_read_as_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = configured_scenario(*TIGHT)
    claim(tmp_path, scenario)
    hashes = [workload_hash(build_workload(scenario, seed)) for seed in (0, 1)]
    rows = [
        {"planner": "edf", "seed": 0, "workload_hash": hashes[0], "slo_attainment": 0.25},
        {"planner": "edf", "seed": 1, "workload_hash": "other requests", "slo_attainment": 0.9},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "results.parquet")
    assert main(["attainable", *TIGHT, "seeds=2", f"out={tmp_path}"]) == 0
    bound = json.loads((tmp_path / "attainable.json").read_text())[0]["slo_attainment"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "edf" in line]
    assert "25.0" in line
    assert f"{100 * 0.25 / bound:.1f}" in line


def test_a_folder_of_another_scenario_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim(tmp_path, configured_scenario(*SMALL))
    assert main(["attainable", *TIGHT, "seeds=1", f"out={tmp_path}"]) == 2
    assert "holds results of another scenario" in capsys.readouterr().err
    assert not (tmp_path / "attainable.json").exists()
