"""Worker processes: what fails or dies takes nothing else with it, and nothing is left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

from runners.workers import SINGLE_THREADED, TaskFailure, run_tasks


def act(task: str) -> str:
    """What the tasks of these tests do, by name."""
    if task == "raise":
        raise ValueError("a reason\nover two lines")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "leave":
        os._exit(3)
    if task == "environment":
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return f"{ignored} {[os.environ[name] for name in SINGLE_THREADED]}"
    if task.startswith("/"):
        Path(task).write_text("started")
        time.sleep(60)
    return task.upper()


def test_every_task_gets_its_outcome() -> None:
    tasks = ["a", "raise", "b", "die", "leave", "environment", "c"]
    outcomes = dict(run_tasks(act, tasks, jobs=2))
    assert {task: outcomes[task] for task in "abc"} == {"a": "A", "b": "B", "c": "C"}
    raised = outcomes["raise"]
    assert isinstance(raised, TaskFailure)
    assert raised.reason == "ValueError: a reason over two lines"
    assert "in act" in raised.details
    assert outcomes["die"] == TaskFailure("the worker process died (signal 9)")
    assert outcomes["leave"] == TaskFailure("the worker process died (exit code 3)")
    assert outcomes["environment"] == f"True {['1'] * len(SINGLE_THREADED)}"
    assert multiprocessing.active_children() == []


def test_this_process_keeps_its_own_environment() -> None:
    before = dict(os.environ), signal.getsignal(signal.SIGINT)
    assert dict(run_tasks(act, ["a"], jobs=4)) == {"a": "A"}
    assert (dict(os.environ), signal.getsignal(signal.SIGINT)) == before


def test_no_tasks_need_no_worker() -> None:
    assert list(run_tasks(act, [], jobs=2)) == []


def test_stopping_early_stops_the_workers_at_once(tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    with contextlib.closing(run_tasks(act, ["a", str(endless)], jobs=2)) as outcomes:
        assert next(outcomes) == ("a", "A")
        while not endless.exists():
            time.sleep(0.01)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 5
    assert multiprocessing.active_children() == []
