"""Comparisons on a real cluster, for which the emulator stands in behind the same contract."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from qlm_env.backends.base import Backend, BackendEvent
from qlm_env.backends.emulator.backend import EmulatorBackend
from qlm_env.backends.emulator.state import Fleet
from qlm_env.env import QLMEnv
from qlm_env.requests import RequestTable
from qlm_env.spec import ConfigError, ScenarioSpec
from runners.compare import compare, evaluate
from runners.config import CompareConfig
from runners.errors import CommandFailed, CommandInterrupted
from runners.live import describe, run_in_turn
from runners.progress import CountedProgress
from runners.side_by_side import PAGE, Span, model_spans
from runners.workers import TaskFailure
from tests.random_episodes import sensible_lsos
from tests.runners import fakes

Configure = Callable[..., CompareConfig]

FEW = "workload.num_requests=12"


class StandIn(EmulatorBackend):
    """Servers that were started, how often they were used, and what goes wrong with them."""

    made: tuple[StandIn, ...] = ()
    interrupted_in: int | None = None
    """Episode in which Ctrl-C is pressed."""
    broken_in: int | None = None
    """Episode in which something is wrong with the code."""
    refuses = ""
    """Why the servers do not start."""

    def __init__(self, new_fleet: Callable[[], Fleet]) -> None:
        super().__init__(new_fleet)
        StandIn.made = (*StandIn.made, self)
        self.episodes = 0
        self.closed = False

    def reset(self, requests: RequestTable) -> None:
        if self.refuses:
            raise ConfigError(self.refuses)
        self.episodes += 1
        super().reset(requests)

    def advance(self, until_s: float) -> list[BackendEvent]:
        if self.now_s > 1.0 and self.episodes == self.interrupted_in:
            raise KeyboardInterrupt
        if self.now_s > 1.0 and self.episodes == self.broken_in:
            raise ArithmeticError("lost a request")
        return super().advance(until_s)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend=vllm`` is :class:`StandIn`."""

    def make_backend(scenario: ScenarioSpec, new_fleet: Callable[[], Fleet]) -> Backend:
        return StandIn(new_fleet)

    build = ModuleType("qlm_env.backends.vllm.build")
    build.make_backend = make_backend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, build.__name__, build)
    monkeypatch.setattr(StandIn, "made", ())


def test_every_planner_and_seed_runs_on_servers_started_once(
    configure: Configure, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(FEW, "backend=vllm", "planner=[fcfs,edf]", "seeds=2")
    compare(config)
    (cluster,) = StandIn.made
    assert cluster.episodes == 4
    assert cluster.closed
    rows = fakes.read_rows(config.out)
    assert set(rows["backend"]) == {"vllm"}
    assert set(rows["finished"]) == {12}
    assert list(rows["planner"]) == ["fcfs", "fcfs", "edf", "edf"]
    assert not (config.out / PAGE).exists()
    progress = capsys.readouterr().err
    assert "edf on vllm seed 1: SLO attainment" in progress
    assert "fcfs rehearses" in progress

    compare(config)
    assert len(StandIn.made) == 1, "a resumed run needs no servers when nothing is missing"


def test_both_backends_on_one_page(configure: Configure, quick: None) -> None:
    config = configure(FEW, "backend=[emulator,vllm]", "planner=[fcfs,edf]", "seeds=1")
    compare(config)
    rows = fakes.read_rows(config.out)
    assert list(zip(rows["planner"], rows["backend"], strict=True)) == [
        ("fcfs", "emulator"),
        ("fcfs", "vllm"),
        ("edf", "emulator"),
        ("edf", "vllm"),
    ]
    assert rows["workload_hash"].nunique() == 1
    summary = json.loads((config.out / "summary.json").read_text())
    assert [(entry["planner"], entry["backend"]) for entry in summary][:2] == [("fcfs", "emulator"), ("fcfs", "vllm")]
    page = (config.out / PAGE).read_text()
    assert "| 1 seed | emulator | vllm | difference |" in page
    assert "| SLO attainment (%) | 100 | 100 | +0 |" in page
    for label in ("fcfs", "edf"):
        assert f"![timelines of {label}](backends-{label}.png)" in page
        assert (config.out / f"backends-{label}.png").read_bytes().startswith(b"\x89PNG")
    timelines = {path.name.rsplit("-", 1)[0] for path in (config.out / "timelines").iterdir()}
    assert timelines == {"fcfs-seed0", "fcfs-vllm-seed0", "edf-seed0", "edf-vllm-seed0"}


def test_ctrl_c_stops_what_was_started_and_keeps_what_has_finished(
    configure: Configure, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "interrupted_in", 2)
    config = configure(FEW, "backend=vllm", "planner=[fcfs,edf]", "seeds=1")
    with pytest.raises(CommandInterrupted, match="1 of 2 episodes are kept"):
        compare(config)
    assert [cluster.closed for cluster in StandIn.made] == [True]

    monkeypatch.setattr(StandIn, "interrupted_in", None)
    compare(config)
    assert [cluster.episodes for cluster in StandIn.made] == [2, 1]
    assert set(fakes.read_rows(config.out)["planner"]) == {"fcfs", "edf"}


def test_servers_that_do_not_start_end_the_run_with_one_line(
    configure: Configure, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "refuses", "port 8000 is taken")
    with pytest.raises(ConfigError, match="port 8000 is taken"):
        compare(configure(FEW, "backend=vllm", "planner=[fcfs,edf]"))
    assert [cluster.closed for cluster in StandIn.made] == [True]


def test_an_episode_that_fails_does_not_stop_the_others(
    configure: Configure, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "broken_in", 1)
    config = configure(FEW, "backend=vllm", "planner=[fcfs,edf]", "seeds=1")
    with pytest.raises(CommandFailed, match="1 of 2 episodes failed: fcfs on vllm seed 0: ArithmeticError"):
        compare(config)
    assert list(fakes.read_rows(config.out)["planner"]) == ["edf"]
    assert [cluster.closed for cluster in StandIn.made] == [True]


def test_evaluate_runs_there_too(configure: Configure, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(configure(FEW, "backend=vllm", "planner=edf", "seeds=1"))
    assert "slo_attainment" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backend=ray", "'backend.0': input should be 'emulator' or 'vllm' \\(got 'ray'\\)"),
        ("backend=[vllm,vllm]", "'backend': each backend only once"),
        ("backend=[]", "'backend': "),
        ("backend=null", "'backend': "),
    ],
)
def test_a_wrong_backend_is_one_line(configure: Configure, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(override)


# --------------------------------------------------------------------------- parts
def test_live_counts_name_every_instance() -> None:
    env = QLMEnv(
        cluster={"preset": "smoke", "failures": [{"instance": 1, "at_s": 0.0, "duration_s": 900.0}]},
        workload={"preset": "smoke", "num_requests": 30},
    )
    env.reset(seed=0)
    while not env.view.instances[0].num_running:
        env.step_plan(sensible_lsos(env))
    first, *instances = describe(env.view).splitlines()
    assert first.startswith(f"{env.now_s:.0f} s, ")
    assert " of 30 finished, " in first
    assert instances[1] == "  1 A100: down"
    busy = env.view.instances[0]
    model = env.scenario.workload.models[busy.active_model or 0].name
    assert instances[0] == f"  0 A100: {model}, {busy.num_running} running, {busy.waiting} queued"


def test_status_is_printed_now_and_then_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with CountedProgress("episodes", 2) as progress:
        for k in range(50):
            progress.show(f"state {k}\n  instance 0: busy")
    assert capsys.readouterr().err == "state 0; instance 0: busy\n"


def test_tasks_in_turn_stop_at_what_fails_them_all() -> None:
    def half(number: int) -> float:
        if number < 0:
            raise ConfigError("no server")
        return 1 / number

    outcomes = run_in_turn(half, [2, 0, -1, 4])
    assert next(outcomes) == (2, 0.5)
    _, failure = next(outcomes)
    assert isinstance(failure, TaskFailure)
    with pytest.raises(ConfigError, match="no server"):
        next(outcomes)


def test_model_spans_are_read_from_a_trace() -> None:
    env = QLMEnv(workload={"preset": "smoke", "num_requests": 5}, timeline=True)
    _, info = env.reset(seed=0)
    while "metrics" not in info:
        info = env.step_plan(sensible_lsos(env))[-1]
    assert env.timeline is not None
    trace = env.timeline.to_chrome_trace()["traceEvents"]
    spans = model_spans(trace, 0)
    assert spans[0] == Span("vicuna-7b", 0.0, spans[0].stop_s)
    assert spans[-1].stop_s == pytest.approx(env.now_s, abs=1e-5)
