"""Runs a command in a process group of its own and ends the whole group when standard input closes.

A byte on standard input kills the group at once.

``python guard.py GRACE_S COMMAND ...``. Whoever starts it holds the other end of its standard input, so that
the command ends with its starter even if that is killed. It needs nothing beside the standard library, and is
run as a file so that it starts at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

_POLL_S = 0.05
_STDIN = 0


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    grace_s, command = float(arguments[0]), arguments[1:]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        while process.poll() is None:
            readable, _, _ = select.select([_STDIN], [], [], _POLL_S)
            if readable:
                grace_s = 0.0 if os.read(_STDIN, 1) else grace_s
                break
    except KeyboardInterrupt:
        pass
    _end_group(process, grace_s)
    return process.wait()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _end_group(leader: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask the processes of the group to end, and kill what has not ended after ``grace_s``."""
    deadline_s = time.monotonic() + grace_s
    if grace_s > 0:
        _signal(leader.pid, signal.SIGTERM)
    while leader.poll() is None and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    # Also if the leader has ended: what it started may be left.
    _signal(leader.pid, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
