"""Comparisons from end to end on fake episodes: results, resuming, failing, being stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qlm_env.spec import ConfigError
from runners.compare import compare, evaluate
from runners.config import CompareConfig
from runners.episodes import EpisodeFunction
from runners.errors import CommandFailed, CommandInterrupted
from tests.runners import fakes
from tests.runners.conftest import SMALL, run_here

ROOT = Path(__file__).parents[2]

Configure = Callable[..., CompareConfig]

SUMMARY_KEYS = [
    "planner",
    "workload",
    "workload_hash",
    "backend",
    "seeds",
    "requests",
    "finished",
    "rejected",
    "slo_attainment",
    "slo_attainment_per_class",
    "request_throughput_per_s",
    "token_throughput_per_s",
    "utilisation",
    "swaps",
    "evictions",
    "decision_p50_ms",
    "decision_p99_ms",
    "emulated_s",
    "wall_s",
]


def run(config: CompareConfig, episode: EpisodeFunction = fakes.episode) -> None:
    compare(config, episode, fakes.check)


def read_summary(out: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((out / "summary.json").read_text())
    return entries


@pytest.fixture
def episode_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where :func:`fakes.logged_episode` leaves a line per episode that was really run."""
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("EPISODE_LOG", str(log))
    return log


def test_a_comparison_leaves_rows_summary_figures_and_timelines(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("planner=[qlm,fcfs]", "seeds=[3,0]")
    run(config)

    rows = fakes.read_rows(config.out)
    assert list(zip(rows["planner"], rows["seed"], strict=True)) == [
        ("qlm", 0),
        ("qlm", 3),
        ("fcfs", 0),
        ("fcfs", 3),
    ]
    assert list(rows["slo_attainment"]) == pytest.approx([0.7, 0.73, 0.5, 0.53])
    assert list(rows["slo_attainment_per_class.interactive"]) == pytest.approx([0.6, 0.63, 0.4, 0.43])
    assert set(rows["decision_p50_ms"]) == {2.5}
    assert json.loads(rows["scenario"][0]) == config.scenario.model_dump(mode="json")
    assert json.loads(rows["planner_options"][0])["name"] == "qlm"
    assert {"config_hash", "qlm_version", "code_version", "wall_s", "ttft_p99_s"} <= set(rows.columns)

    qlm, fcfs = read_summary(config.out)
    assert list(qlm) == list(fcfs) == SUMMARY_KEYS
    assert (qlm["planner"], qlm["workload"], qlm["backend"], qlm["seeds"]) == (
        "qlm",
        "smoke",
        "emulator",
        [0, 3],
    )
    assert (qlm["requests"], qlm["finished"], qlm["rejected"]) == (200, 196, 2)
    assert qlm["slo_attainment"] == pytest.approx({"iqm": 0.715, "lo": 0.7, "hi": 0.73})
    assert qlm["slo_attainment_per_class"]["interactive"] == pytest.approx({"iqm": 0.615, "lo": 0.6, "hi": 0.63})
    assert qlm["slo_attainment_per_class"]["empty"] == {"iqm": None, "lo": None, "hi": None}
    assert (qlm["swaps"], qlm["evictions"], qlm["utilisation"]) == (2, 2, pytest.approx(0.7))
    assert (qlm["decision_p50_ms"], qlm["emulated_s"], qlm["wall_s"]) == (2.5, 60, 0.25)
    assert qlm["workload_hash"] == fcfs["workload_hash"]

    for figure in ("attainment.png", "latency.png"):
        assert (config.out / figure).read_bytes().startswith(b"\x89PNG")
    timelines = sorted(path.name for path in (config.out / "timelines").iterdir())
    assert [name.rsplit("-", 1)[0] for name in timelines] == [
        "fcfs-seed0",
        "fcfs-seed3",
        "qlm-seed0",
        "qlm-seed3",
    ]
    assert "traceEvents" in json.loads((config.out / "timelines" / timelines[0]).read_text())

    captured = capsys.readouterr()
    assert "smoke on smoke" in captured.out
    assert "-20.0" in captured.out  # fcfs minus qlm, paired
    assert "[4/4]" in captured.err


@pytest.mark.usefixtures("quick")
def test_the_hash_of_one_seed_is_the_workloads_own(configure: Configure) -> None:
    config = configure("planner=fcfs", "seeds=1", "timeline=false")
    run(config)
    assert read_summary(config.out)[0]["workload_hash"] == "smoke-0"
    assert not (config.out / "timelines").exists()


@pytest.mark.usefixtures("quick")
def test_evaluate_prints_every_metric(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(configure("planner=edf", "seeds=1"), fakes.episode, fakes.check)
    printed = capsys.readouterr().out
    for name in (
        "slo_attainment ",
        "slo_attainment batch-2",
        "kv_occupancy",
        "queueing_p99_s",
        "hol_blocking_s",
    ):
        assert name in printed


@pytest.mark.usefixtures("quick")
def test_a_second_run_only_runs_what_is_new(configure: Configure, episode_log: Path) -> None:
    run(configure("planner=fcfs", "seeds=1"), fakes.logged_episode)
    run(configure("planner=[fcfs,edf]", "seeds=1"), fakes.logged_episode)
    run(configure("planner=[fcfs,edf]", "seeds=1"), fakes.logged_episode)
    assert episode_log.read_text() == "fcfs 0\nedf 0\n"
    assert len(fakes.read_rows(configure().out)) == 2


@pytest.mark.usefixtures("quick")
def test_a_row_that_cannot_be_read_or_lacks_its_timeline_is_run_again(configure: Configure, episode_log: Path) -> None:
    config = configure("planner=[fcfs,edf]", "seeds=1")
    run(config, fakes.logged_episode)
    (damaged,) = (path for path in (config.out / "rows").iterdir() if pd.read_parquet(path)["planner"][0] == "edf")
    damaged.write_bytes(damaged.read_bytes()[:100])
    (timeline,) = (config.out / "timelines").glob("fcfs-*")
    timeline.unlink()
    run(config, fakes.logged_episode)
    assert sorted(episode_log.read_text().split("\n")) == ["", "edf 0", "edf 0", "fcfs 0", "fcfs 0"]


@pytest.mark.usefixtures("quick")
def test_a_folder_belongs_to_one_scenario(configure: Configure) -> None:
    run(configure("planner=fcfs", "seeds=1"))
    before = (configure().out / "summary.json").read_bytes()
    with pytest.raises(ConfigError, match=r"another scenario \(workload.num_requests: 200 there, 100 here\)"):
        run(configure("planner=fcfs", "seeds=1", "workload.num_requests=100"))
    assert (configure().out / "summary.json").read_bytes() == before


def test_results_go_to_a_folder(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match=r"is a file; name a folder"):
        run(configure())


def test_what_stops_every_episode_is_found_before_the_first(configure: Configure, tmp_path: Path) -> None:
    config = configure("workload=azure_conv", f"workload.path={tmp_path / 'nope.csv'}")
    with pytest.raises(ConfigError, match=r"nope\.csv"):
        compare(config)
    assert not config.out.exists()


@pytest.mark.usefixtures("quick")
def test_planners_must_see_the_same_requests(configure: Configure) -> None:
    config = configure("planner=[fcfs,edf]", "seeds=1")
    with pytest.raises(CommandFailed, match=r"different workloads under seed 0 \(fcfs: fcfs-0, edf: edf-0\)"):
        run(config, fakes.episode_of_planner_dependent_workload)
    assert not (config.out / "summary.json").exists()


def test_a_failing_episode_is_named_and_the_others_go_on(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("planner=[fcfs,edf,qlm]", "seeds=2")
    with pytest.raises(CommandFailed, match="2 of 6 episodes failed") as caught:
        run(config, fakes.failing_episode)
    assert "edf seed 1: ArithmeticError: lost a request" in str(caught.value)
    assert "qlm seed 0: the worker process died (signal 9)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "edf seed 1 failed: ArithmeticError: lost a request" in capsys.readouterr().err
    assert [(e["planner"], e["seeds"]) for e in read_summary(config.out)] == [
        ("fcfs", [0, 1]),
        ("edf", [0]),
        ("qlm", [1]),
    ]
    (trace,) = (config.out / "failures").glob("edf-seed1-*")
    assert "in failing_episode" in trace.read_text()

    monkeypatch.setattr("runners.episodes.run_tasks", run_here)
    run(config)
    assert len(fakes.read_rows(config.out)) == 6
    assert list((config.out / "failures").iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_what_has_finished(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    config = configure("planner=[fcfs,edf]", "seeds=2")
    monkeypatch.setattr("runners.episodes.CountedProgress.advance", interrupt)
    with pytest.raises(CommandInterrupted, match=r"interrupted; 1 of 4 episodes are kept in .*same command again"):
        run(config)
    monkeypatch.undo()
    run(config)
    assert len(fakes.read_rows(config.out)) == 4


COMMAND = """
import dataclasses, functools, sys
from runners import cli, commands, compare
from tests.runners import fakes

if __name__ == "__main__":
    run = functools.partial(compare.compare, episode=fakes.logged_episode, check=fakes.check)
    commands.COMMANDS["compare"] = dataclasses.replace(commands.COMMANDS["compare"], run=run)
    sys.exit(cli.main())
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_is_resumed(
    sent: signal.Signals,
    configure: Configure,
    tmp_path: Path,
    episode_log: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole command as a process, stopped from outside while its second episode runs."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    config = configure("planner=[fcfs,edf,qlm]", "seeds=1")
    arguments = [*SMALL, "planner=[fcfs,edf,qlm]", "seeds=1", "jobs=1", f"out={config.out}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EPISODE_SECONDS": "0.3"}
    with subprocess.Popen(
        [sys.executable, str(script), "compare", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline_s = time.monotonic() + 30
        while len(episode_log.read_text().splitlines()) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        process.send_signal(sent)
        message = process.communicate(timeout=10)[1]
    if sent == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert f"qlm: interrupted; 1 of 3 episodes are kept in {config.out}" in message
        assert "Traceback" not in message
    time.sleep(0.5)  # a worker that outlives its parent may still finish the episode it has begun
    assert episode_log.read_text().splitlines() == ["fcfs 0", "edf 0"]
    kept = {pd.read_parquet(path)["planner"][0] for path in (config.out / "rows").glob("*.parquet")}
    assert kept == ({"fcfs", "edf"} if sent == signal.SIGKILL else {"fcfs"})

    monkeypatch.setattr("runners.episodes.run_tasks", run_here)
    run(config, fakes.logged_episode)
    again = episode_log.read_text().splitlines()[2:]
    assert sorted(again) == sorted(f"{name} 0" for name in ("fcfs", "edf", "qlm") if name not in kept)
    assert list(fakes.read_rows(config.out)["planner"]) == ["fcfs", "edf", "qlm"]
