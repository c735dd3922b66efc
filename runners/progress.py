"""Progress of a long run on standard error: a bar with the time left, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class CountedProgress:
    """Counts finished parts of a run, ``what`` in the plural; a context manager."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._total = total
        self._done = self._resumed = done
        self._start_s = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> CountedProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, message: str) -> None:
        """One more part is over; ``message`` says which, and how it went."""
        self._done += 1
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
            self._bar.advance(self._task)
            return
        elapsed_s = time.monotonic() - self._start_s
        left_s = elapsed_s / (self._done - self._resumed) * (self._total - self._done)
        print(f"[{self._done}/{self._total}] {message}; about {left_s:.0f} s left", file=sys.stderr, flush=True)
