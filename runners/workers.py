"""Tasks in parallel worker processes: one failing or dying does not stop the others.

The standard pools either wait for ever for a worker that was killed (``multiprocessing.Pool``) or give up
all tasks with it (``ProcessPoolExecutor``); a comparison of many hours can afford neither.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

SINGLE_THREADED = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""One worker per core: libraries that start threads of their own (torch, BLAS) would only fight over it."""


@dataclass(frozen=True)
class TaskFailure:
    """A task that ended in an exception, or whose worker died."""

    reason: str
    """One line."""
    details: str = field(default="", repr=False)
    """The traceback, if there is one."""


@dataclass
class _Worker(Generic[T]):
    process: SpawnProcess
    connection: Connection
    task: T


def run_tasks(
    function: Callable[[T], R], tasks: Sequence[T], jobs: int
) -> Generator[tuple[T, R | TaskFailure], None, None]:
    """Yield every task with the result of ``function`` on it, in the order in which they finish.

    Args:
        function: importable by its name; it and the tasks are pickled.
        jobs: worker processes at once. They are started by ``spawn``, numeric libraries in them use one
            thread each, and they ignore Ctrl-C.

    When the iteration ends early (an exception, Ctrl-C, ``close``) the workers are stopped at once. When
    this process is killed, they finish their task and end.
    """
    waiting = list(reversed(tasks))
    workers: dict[Connection, _Worker[T]] = {}
    try:
        while waiting and len(workers) < jobs:
            _start(workers, function, waiting.pop())
        while workers:
            for ready in wait(list(workers)):
                assert isinstance(ready, Connection)
                worker = workers[ready]
                task = worker.task
                outcome: R | TaskFailure
                try:
                    outcome = ready.recv()
                except (EOFError, ConnectionResetError):
                    outcome = _death(worker)
                    _stop(workers.pop(ready))
                    if waiting:
                        _start(workers, function, waiting.pop())
                else:
                    if waiting:
                        _give(worker, waiting.pop())
                    else:
                        _stop(workers.pop(ready))
                yield task, outcome
    finally:
        for worker in workers.values():
            _stop(worker)


def _start(workers: dict[Connection, _Worker[T]], function: Callable[[T], R], task: T) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function), daemon=True)
    with _inherited_by_workers():
        process.start()
    there.close()
    workers[here] = _Worker(process, here, task)
    _give(workers[here], task)


@contextlib.contextmanager
def _inherited_by_workers() -> Iterator[None]:
    """Thread limits, which libraries read when they are loaded, and Ctrl-C ignored from the first line on."""
    before = {name: os.environ.get(name) for name in SINGLE_THREADED}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    os.environ.update(SINGLE_THREADED)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def _give(worker: _Worker[T], task: T) -> None:
    worker.task = task
    # A worker that has died meanwhile is noticed when its answer is awaited.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.connection.send(task)


def _death(worker: _Worker[T]) -> TaskFailure:
    worker.process.join()
    code = worker.process.exitcode
    cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return TaskFailure(f"the worker process died ({cause})")


def _stop(worker: _Worker[T]) -> None:
    worker.connection.close()
    worker.process.terminate()
    worker.process.join()


def _serve(connection: Connection, function: Callable[[T], R]) -> None:
    # The parent is gone when either end of the conversation breaks.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send(outcome_of(function, connection.recv()))


def outcome_of(function: Callable[[T], R], task: T) -> R | TaskFailure:
    """What ``function`` makes of the task, or why it raised."""
    try:
        return function(task)
    except Exception as error:
        text = " ".join(str(error).split())
        name = type(error).__name__
        return TaskFailure(f"{name}: {text}" if text else name, traceback.format_exc())
