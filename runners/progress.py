"""Progress of a long run on standard error: a bar with the time left, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

STATUS_EVERY_S = 15.0
"""How often the state of a long part is printed where there is no terminal to show it on."""


class _BarWithStatus(Progress):
    """A bar with lines below it that say what is being done."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.status:
            yield Text(self.status)


class CountedProgress:
    """Counts finished parts of a run, ``what`` in the plural; a context manager."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._total = total
        self._done = self._resumed = done
        self._start_s = time.monotonic()
        self._bar: _BarWithStatus | None = None
        self._status_printed_s = -STATUS_EVERY_S
        if sys.stderr.isatty():
            self._bar = _BarWithStatus(
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

    def show(self, status: str) -> None:
        """What the part under way is doing, on one or more lines."""
        if self._bar is not None:
            self._bar.status = status
        elif time.monotonic() - self._status_printed_s >= STATUS_EVERY_S:
            self._status_printed_s = time.monotonic()
            print("; ".join(line.strip() for line in status.splitlines()), file=sys.stderr, flush=True)

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
