"""`qlm bench planner` on sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from planners.qlm.brute_force import cheapest_plan, every_column
from planners.qlm.synthetic import random_problem
from runners import bench_planner
from runners.cli import main
from runners.config import BenchPlannerOptions


def test_every_method_plans_the_same_problems_and_the_exact_ones_agree(capsys: pytest.CaptureFixture[str]) -> None:
    options = BenchPlannerOptions(
        families=((5, 2, 2), (9, 2, 2)), problems=2, search_times_s=(0.02,), bound_time_limit_s=30.0, snapshots=False
    )
    figures = {figure["name"]: figure["value"] for figure in bench_planner.measure(options)}
    small, larger = "5 groups, 2 instances, 2 models", "9 groups, 2 instances, 2 models"
    gaps = {name: value for name, value in figures.items() if name.endswith(", gap")}
    assert min(gaps.values()) >= -1e-6
    for method in ("brute force", "SCIP, every queue", "HiGHS, every queue"):
        assert gaps[f"{small}: {method}, gap"] == pytest.approx(gaps[f"{small}: brute force, gap"], abs=1e-4)
        assert figures[f"{small}: {method}, best"] == 100.0
        assert f"{larger}: {method}, gap" not in gaps
    for family in (small, larger):
        assert gaps[f"{family}: column generation, gap"] <= gaps[f"{family}: search, 0.02 s, gap"] + 1e-9
        assert gaps[f"{family}: search, 0.02 s, gap"] <= gaps[f"{family}: EDF, gap"] + 1e-9
        assert figures[f"{family}: swap-aware EDF, better than swap-aware EDF"] == 0.0
        assert figures[f"{family}: search, 0.02 s, better than swap-aware EDF"] > 0.0
    assert "swap-aware EDF" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(5))
def test_highs_finds_the_optimum_of_brute_force(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), 5, 3, 2)
    assert bench_planner.solve_with_highs(every_column(problem), 5) == pytest.approx(cheapest_plan(problem).total)


def test_snapshots_are_problems_of_an_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_planner, "SNAPSHOT_REQUESTS", 400)
    problems = bench_planner.snapshots("w_b", "small_multi", 0, 3)
    assert len(problems) == 3
    for problem in problems:
        assert problem.allowed.shape[0] >= bench_planner.SNAPSHOT_LEAST_GROUPS
        assert problem.allowed.shape[1] == 3
        assert problem.allowed.any()


def test_wrong_families_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "planner", "families=[[5,0,2]]", f"out={tmp_path}"]) == 2
    assert "families" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    arguments = ["families=[[4,1,1]]", "problems=1", "search_times_s=[0.01]", "snapshots=false", f"out={tmp_path}"]
    assert main(["bench", "planner", *arguments]) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["4 groups, 1 instances, 1 models: EDF, time"]["unit"] == "s"
