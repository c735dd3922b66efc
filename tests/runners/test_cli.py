"""The command line: help, and one line for every mistake."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from runners.cli import main
from runners.commands import COMMANDS
from runners.composition import read_schema
from runners.episodes import EpisodeFunction
from runners.help_texts import GROUPS, SETTINGS
from tests.runners import fakes
from tests.runners.conftest import SMALL

ROOT = Path(__file__).parents[2]

MISTAKES = [
    # commands and flags
    (
        ["nope"],
        "unknown command 'nope'; allowed: attainable, bench, cluster, compare, evaluate, figures, profile, record, ",
    ),
    (["comapre", "seeds=1"], "(did you mean 'compare'?)"),
    (["workload"], "qlm workload needs one of: describe, export"),
    (["workload", "nope"], "unknown command 'qlm workload nope'; allowed: describe, export"),
    (["bench", "emulater"], "(did you mean 'emulator'?)"),
    (["seeds=1"], "no command; allowed:"),
    (["compare", "--nope"], "unknown option '--nope'; allowed:"),
    (["workload", "describe", "--nope", "1"], "nope"),
    (["workload", "describe", "--seed=x"], "'seed'"),
    (["workload", "describe", "--seed", "-1"], "unknown option '--seed'"),
    (["compare", "--config-dir"], "--config-dir: name a folder"),
    (["compare", "--config-dir", "/no/such"], "--config-dir: no folder '/no/such'"),
    (["workload", "describe", "-m"], "takes no -m"),
    (["report"], "'folder': name the results of a qlm compare"),
    (["report", "no/such"], "there is no folder 'no/such'"),
    (["figures", "nope"], "no figure named 'nope'; allowed: headline,"),
    (["compare", "--quick"], "unknown key 'quick'"),
    (["sweep", "experiment=nope"], "'nope' is not an option of experiment; allowed: device_mix,"),
    (["sweep", "experiment.seeds=0"], "'experiment.seeds': expected a count"),
    # overrides
    (["compare", "foo"], "malformed override 'foo': expected key=value"),
    (["compare", "seeds=[1,2"], "malformed override 'seeds=[1,2': expected key=value"),
    (["compare", "=3"], "unknown key ''; allowed:"),
    (["compare", "seed=3"], "unknown key 'seed'; allowed: cluster, workload, slo, environment, planner, "),
    (["compare", "seed=3"], "(did you mean 'seeds'?)"),
    (["compare", "+foo=1"], "unknown key 'foo'; allowed:"),
    (["compare", "seeds.x=3"], "unknown key 'seeds.x'; allowed:"),
    (["compare", "seeds=1,2"], "'seeds=1,2' gives several values; add -m"),
    (["compare", "planner=fcfs,edf"], "write planner=[...] for several in one run"),
    (["compare", "out=${nope}"], "Interpolation key 'nope' not found"),
    (["compare", "out="], "'out': "),
    (["compare", "hydra.nope=1"], "hydra.nope"),
    (["compare", "~workload"], "missing key 'workload'"),
    # options of groups
    (
        ["compare", "cluster=smal"],
        "'smal' is not an option of cluster; allowed: large, live_cpu, live_gpu, live_ray, paper,",
    ),
    (["compare", "cluster=smal"], "(did you mean 'small'?)"),
    (["compare", "planner=[fcfs,nope]"], "'nope' is not an option of planner; allowed: "),
    (["compare", "workload=null"], "'None' is not an option of workload; allowed:"),
    (["compare", "planner=[]"], "'planner': name at least one of "),
    (["compare", "planner=[fcfs]", "planner.edf.x=1"], "'planner.edf' is set, but edf is not selected"),
    (["evaluate", "planner=[fcfs,edf]"], "qlm evaluate takes one planner (got fcfs, edf)"),
    # keys and values of specifications
    (["compare", "workload.arrivals.laod=1"], "unknown key 'workload.arrivals.laod'; allowed: kind, load,"),
    (["compare", "workload.arrivals.laod=1"], "(did you mean 'load'?)"),
    (["compare", "workload.num_requests=many"], "'workload.num_requests': input should be a valid integer"),
    (["compare", "workload.arrivals.load=-1"], "'workload.arrivals.load': input should be greater than 0"),
    (["compare", "workload.arrivals.rate_per_s=5"], "arrivals needs exactly one of rate_per_s and load"),
    (["compare", "workload.arrivals.kind=weibull"], "'workload.arrivals': "),
    (["compare", "cluster.instances.7.count=2"], "cluster.instances.7.count=2"),
    (["compare", "cluster.instances.x.count=2"], "'x'"),
    (["compare", "cluster.instances.0.device=A1000"], "no profile for A1000 tp=1; allowed: A10 tp=1,"),
    (["compare", "planner.fcfs.nope=1"], "unknown key 'planner.fcfs.nope'; allowed:"),
    (["compare", "seeds=none"], "'seeds': expected a count of at least 1 or a list"),
    (["compare", "jobs=0"], "'jobs': input should be greater than 0"),
    (["compare", "timeline=maybe"], "'timeline': input should be a valid boolean"),
    (["compare", "tracking.mode=online"], "unknown key 'tracking.mode'; allowed: kind"),
    (["bench", "emulator", "loads=[]"], "'loads': tuple should have at least 1 item"),
    (["bench", "emulator", "loads=[0.9,0]"], "'loads.1': input should be greater than 0"),
    (["bench", "env", "duration_s=-1"], "'duration_s': input should be greater than 0"),
    (["bench", "env", "loads=[1]"], "loads"),
    (["workload", "describe", "seed=-1"], "'seed': input should be greater than or equal to 0"),
    # what only shows when the scenario is put together
    (["compare", "workload=azure_conv"], "missing key 'workload.path'"),
    (["compare", "workload=azure_conv", "workload.path=nope.csv"], "nope.csv"),
    (["compare", "cluster=small", "workload=w_a_70b"], "fits no instance of cluster 'small'"),
    (["compare", "out=/dev/null/nope"], "cannot use '/dev/null/nope"),
    (["workload", "export", "out=/dev/null/nope/x.parquet"], "cannot use '/dev/null/nope"),
    # sweeps: found before the first job starts, whichever value is wrong
    (
        ["compare", "-m", "workload.arrivals.load=0.5,oops"],
        "'workload.arrivals.load': input should be a valid",
    ),
    (["compare", "-m", "cluster=smoke,smal"], "'smal' is not an option of cluster"),
    (["compare", "-m", "seeds=1,2", "jobs=0"], "'jobs': input should be greater than 0"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES)
def test_a_mistake_is_one_line(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qlm: error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["QLM_DEBUG", "HYDRA_FULL_ERROR"])
def test_debug_variables_show_the_traceback(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ValueError, match="unknown key 'foo'"):
        main(["compare", "foo=1"])


def test_without_arguments_an_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in COMMANDS)
    assert len(overview.splitlines()) < 40
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_names_every_group_option_and_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    schema = read_schema(COMMANDS[name].config_name)
    for key in schema.keys:
        assert f"  {key} " in text
    if "workload" in schema.groups:
        assert "w_a_70b" in text
    assert ("--multirun" in text) == (COMMANDS[name].merge is not None)
    for example in COMMANDS[name].examples:
        assert example in text


def test_every_group_and_setting_has_a_text() -> None:
    schemas = [read_schema(command.config_name) for command in COMMANDS.values()]
    assert {group for schema in schemas for group in schema.groups} == set(GROUPS)
    assert {key for schema in schemas for key in schema.settings} == set(SETTINGS)


def test_examples_in_the_help_are_valid() -> None:
    for command in COMMANDS.values():
        for example in command.examples:
            overrides = [word for word in example.split() if "=" in word]
            assert {word.partition("=")[0].partition(".")[0] for word in overrides} <= set(
                read_schema(command.config_name).keys
            )


def test_cfg_prints_the_configuration_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--cfg", "workload.arrivals.load=0.5", "seeds=2"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["workload"]["arrivals"]["load"] == 0.5
    assert values["seeds"] == 2
    assert list(tmp_path.iterdir()) == []


def test_version_and_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runners", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("qlm ")


@pytest.mark.usefixtures("quick")
def test_multirun_gives_every_job_a_folder_and_puts_them_together(
    fake_commands: Callable[[EpisodeFunction], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_commands(fakes.episode)
    out = tmp_path / "sweep"
    code = main(["compare", *SMALL, "-m", "workload.arrivals.load=0.5,0.8", "planner=[fcfs]", "seeds=1", f"out={out}"])
    assert code == 0
    rows = fakes.read_rows(out)
    assert list(rows["job"]) == ["0", "1"]
    loads = [yaml.safe_load(text)["workload"]["arrivals"]["load"] for text in rows["scenario"]]
    assert loads == [0.5, 0.8]
    assert len(yaml.safe_load((out / "summary.json").read_text())) == 2
    assert "together" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_multirun_tells_when_a_job_fails_and_runs_the_others(
    fake_commands: Callable[[EpisodeFunction], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_commands(fakes.failing_episode)
    out = tmp_path / "sweep"
    assert main(["compare", *SMALL, "-m", "planner=[edf],[fcfs]", "seeds=[1]", f"out={out}"]) == 1
    assert "qlm: error: 1 of 1 episodes failed: edf seed 1" in capsys.readouterr().err
    assert list(fakes.read_rows(out)["planner"]) == ["fcfs"]
