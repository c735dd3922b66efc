"""Experiments: their grids, their rows, and rows that are not what they should be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

from qlm_env.spec import ConfigError
from runners import results
from runners.cli import main
from runners.commands import COMMANDS
from runners.composition import Request, group_options
from runners.errors import CommandFailed, CommandInterrupted
from runners.experiment import cells, episodes, read_rows, run_missing
from runners.experiment_config import ExperimentSpec, SweepConfig, load_experiment, parse_sweep
from runners.sweep import merge_jobs, sweep
from tests.runners import fakes

SMALL = ("cluster=smoke", "workload=smoke")


def make(**changes: object) -> ExperimentSpec:
    values: dict[str, object] = {
        "name": "small",
        "question": "?",
        "overrides": SMALL,
        "planners": ("fcfs", "edf"),
        "grid": {"workload.num_requests": (10, 20)},
        "seeds": 2,
        **changes,
    }
    return ExperimentSpec.model_validate(values)


@pytest.mark.parametrize("name", group_options("experiment"))
def test_shipped_experiments_can_be_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert len(experiment.seeds) >= 10 or name == "traces"
    scenarios = cells(experiment.quickly())
    assert len({cell.config.scenario.model_dump_json() for cell in scenarios}) == len(scenarios)


def test_a_grid_is_a_product_of_cases_and_points() -> None:
    experiment = make(
        cases={"few": [], "many": ["workload.arrivals.load=0.5"]}, grid={"workload.num_requests": [10, 20]}
    )
    assert [(cell.case, cell.point["workload.num_requests"]) for cell in cells(experiment)] == [
        ("few", 10),
        ("few", 20),
        ("many", 10),
        ("many", 20),
    ]
    assert [cell.config.scenario.workload.num_requests for cell in cells(experiment)] == [10, 20, 10, 20]  # type: ignore[union-attr]
    names = [(e.key.seed, e.key.label) for e in episodes(experiment)]
    assert len(names) == 4 * 2 * 2
    assert [seed for seed, _ in names] == sorted(seed for seed, _ in names)  # seed by seed


def test_the_quick_form_changes_what_it_says() -> None:
    quick = make(
        cases={"a": [], "b": []}, quick={"seeds": [7], "cases": ["b"], "overrides": ["slo.metric=ttft"]}
    ).quickly()
    assert quick.seeds == (7,)
    assert list(quick.cases) == ["b"]
    assert quick.grid == make().grid
    assert {cell.config.scenario.slo.metric for cell in cells(quick)} == {"ttft"}
    with pytest.raises(ConfigError, match="no case 'c' in small; allowed: a"):
        make(cases={"a": []}, quick={"cases": ["c"]}).quickly()


def test_mistakes_name_the_experiment() -> None:
    with pytest.raises(ConfigError, match=r"no experiment named 'w_a_rat'; allowed: .*did you mean 'w_a_rate'"):
        load_experiment("w_a_rat")
    with pytest.raises(ConfigError, match=r"experiment small: .*'nonsense' is not an option of planner"):
        cells(make(planners=["nonsense"]))
    with pytest.raises(ConfigError, match=r"experiment small: .*num_requests"):
        cells(make(grid={"workload.num_requests": [0]}))


@pytest.mark.usefixtures("quick")
def test_rows_are_found_again(tmp_path: Path) -> None:
    experiment = make()
    run_missing(episodes(experiment), tmp_path, 1, fakes.episode)
    rows = read_rows(experiment, tmp_path)
    assert len(rows) == 8
    assert list(rows["point.workload.num_requests"].unique()) == [10, 20]
    # Another experiment that asks for the same episodes has them already, and only those.
    assert len(read_rows(make(name="other", seeds=[1], planners=["edf"]), tmp_path)) == 2


@pytest.mark.usefixtures("quick")
def test_missing_rows_are_told(tmp_path: Path) -> None:
    experiment = make()
    some = episodes(experiment)[:3]
    run_missing(some, tmp_path, 1, fakes.episode)
    with pytest.raises(
        CommandFailed, match=r"small: 5 of 8 episodes have no row .*such as edf seed 0.*num_requests=20"
    ):
        read_rows(experiment, tmp_path)


@pytest.mark.usefixtures("quick")
def test_rows_of_another_version_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make()
    with monkeypatch.context() as other:
        other.setattr(results, "code_version", lambda: "0123456789ab")
        run_missing(episodes(experiment), tmp_path, 1, fakes.episode)
    with pytest.raises(
        CommandFailed, match=r"8 of 8 episodes have no row.*8 of version 0123456789ab of the code are there"
    ):
        read_rows(experiment, tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_row_under_another_name_is_refused(tmp_path: Path) -> None:
    experiment = make()
    wanted = episodes(experiment)
    run_missing(wanted, tmp_path, 1, fakes.episode)
    results.read_row(wanted[0].key.row_path(tmp_path))
    wanted[0].key.row_path(tmp_path).write_bytes(wanted[-1].key.row_path(tmp_path).read_bytes())
    with pytest.raises(CommandFailed, match=r"holds another episode than its name says \(planner is edf, not fcfs\)"):
        read_rows(experiment, tmp_path)


@pytest.mark.usefixtures("quick")
def test_rows_of_different_requests_are_refused(tmp_path: Path) -> None:
    experiment = make(grid={})
    run_missing(episodes(experiment), tmp_path, 1, fakes.episode_of_planner_dependent_workload)
    with pytest.raises(CommandFailed, match="planners saw different workloads under seed 0"):
        read_rows(experiment, tmp_path)


@pytest.mark.usefixtures("quick")
def test_an_interrupted_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_sweep({"experiment": make().model_dump(), "out": str(tmp_path), "jobs": 1})
    monkeypatch.setattr("runners.episodes.run_tasks", _interrupted_after(3))
    with pytest.raises(CommandInterrupted, match="3 of 8 episodes are kept"):
        sweep(config, fakes.episode)
    monkeypatch.setattr("runners.episodes.run_tasks", _interrupted_after(99))
    sweep(config, fakes.episode)
    told = capsys.readouterr()
    assert "resuming: 3 of 8 episodes" in told.err
    assert len(pd.read_parquet(tmp_path / "small.parquet")) == 8
    assert "SLO attainment" in told.out
    assert json.loads((tmp_path / "command.json").read_text())["code_version"] == results.code_version()


def _interrupted_after(count: int):  # type: ignore[no-untyped-def]
    def run(function, tasks, jobs):  # type: ignore[no-untyped-def]
        for number, task in enumerate(tasks):
            if number == count:
                raise KeyboardInterrupt
            yield task, function(task)

    return run


@pytest.mark.usefixtures("quick")
def test_jobs_of_a_multirun_come_together(tmp_path: Path) -> None:
    experiment = make()
    wanted = episodes(experiment)
    for job, part in (("0", wanted[:4]), ("1", wanted[4:])):
        run_missing(part, tmp_path / job, 1, fakes.episode)
    merge_jobs(tmp_path)
    assert len(read_rows(experiment, tmp_path)) == 8


def test_the_command_line_changes_an_experiment() -> None:
    request = Request("sweep", ("experiment=headline", "experiment.seeds=2", "quick=true", "jobs=3"))
    config = parse_sweep(request.compose())
    assert config.experiment.name == "headline"
    assert config.jobs == 3
    assert config.experiment.seeds == (0, 1, 2)  # the quick form's own
    assert len(parse_sweep(Request("sweep", ("experiment.seeds=2",)).compose()).experiment.seeds) == 2


@pytest.mark.usefixtures("quick")
def test_a_multirun_spreads_seeds_over_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep_fakes(config: SweepConfig) -> None:
        sweep(config, fakes.episode)

    monkeypatch.setitem(COMMANDS, "sweep", dataclasses.replace(COMMANDS["sweep"], run=sweep_fakes))
    overrides = ",".join(f'"{text}"' for text in SMALL)
    arguments = ["experiment=w_a_ablation", "experiment.planners=[fcfs,edf]", f"experiment.overrides=[{overrides}]"]
    assert main(["sweep", "-m", *arguments, "experiment.seeds=[0],[1]", f"out={tmp_path}"]) == 0
    whole = load_experiment("w_a_ablation").model_copy(
        update={"planners": ("fcfs", "edf"), "overrides": SMALL, "seeds": (0, 1)}
    )
    assert list(read_rows(whole, tmp_path)["seed"]) == [0, 0, 1, 1]
