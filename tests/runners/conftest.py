"""Configurations and commands that run on the fake episodes of :mod:`tests.runners.fakes`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from runners.commands import COMMANDS
from runners.compare import compare, evaluate
from runners.composition import Request
from runners.config import CompareConfig, parse_compare
from runners.episodes import EpisodeFunction, EpisodeTask, Row
from runners.workers import TaskFailure
from tests.runners import fakes

SMALL = ("cluster=smoke", "workload=smoke")


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., CompareConfig]:
    """``qlm compare`` on the smoke workload with further overrides, results in ``tmp_path / "out"``."""

    def configured(*overrides: str) -> CompareConfig:
        request = Request("compare", (*SMALL, f"out={tmp_path / 'out'}", "jobs=2", *overrides))
        return parse_compare(request.compose())

    return configured


def run_here(
    function: Callable[[EpisodeTask], Row], tasks: Sequence[EpisodeTask], jobs: int
) -> Generator[tuple[EpisodeTask, Row | TaskFailure], None, None]:
    """``run_tasks`` without processes, for tests in which they play no part."""
    for task in tasks:
        try:
            yield task, function(task)
        except ArithmeticError as error:
            yield task, TaskFailure(f"{type(error).__name__}: {' '.join(str(error).split())}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker processes and no figures, which take longer than all else in a comparison of fakes."""
    monkeypatch.setattr("runners.episodes.run_tasks", run_here)
    for name in ("draw_attainment", "draw_latency"):
        monkeypatch.setattr(f"runners.plots.{name}", lambda *_: None)


@pytest.fixture
def fake_commands(monkeypatch: pytest.MonkeyPatch) -> Callable[[EpisodeFunction], None]:
    """Makes ``qlm compare`` and ``qlm evaluate`` run a fake episode."""

    def fake(episode: EpisodeFunction) -> None:
        for name, run in (("compare", compare), ("evaluate", evaluate)):
            command = dataclasses.replace(
                COMMANDS[name], run=functools.partial(run, episode=episode, check=fakes.check)
            )
            monkeypatch.setitem(COMMANDS, name, command)

    return fake
