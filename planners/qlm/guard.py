"""A solver kept to its time, whatever it does: it runs in a thread of its own, which is left behind if it is late."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

R = TypeVar("R")


class SolverBusyError(Exception):
    """A solve that was left behind is still running."""


class SolverThread(Generic[R]):
    """Runs one solve at a time. What the solve works on must be its own: after a time-out it may still be running."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def run(self, solve: Callable[[], R], timeout_s: float) -> R:
        """What ``solve`` returns; whatever it raises is raised here.

        Raises:
            TimeoutError: it is not done after ``timeout_s`` of wall-clock time.
            SolverBusyError: the solve before, which was late, is still not done.
        """
        if self._thread is not None and self._thread.is_alive():
            raise SolverBusyError("the solver is still busy with an earlier plan")
        results: list[R] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(solve())
            except BaseException as error:  # It belongs to the caller, in whose thread it is raised again.
                errors.append(error)

        # A daemon does not keep the process alive when the episode is over.
        self._thread = threading.Thread(target=work, name="qlm-solver", daemon=True)
        self._thread.start()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the solver was not done after {timeout_s:.3g} s")
        if errors:
            raise errors[0]
        return results[0]
