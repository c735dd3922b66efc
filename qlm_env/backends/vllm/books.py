"""Residency, host memory and the engine's queue in the arrays, by the emulator's own functions, called from Python.

They book a command when it is given, with the times that a profile expects; :mod:`.mirror` puts the real times in
their place as they become known.
"""

from __future__ import annotations

from qlm_env.backends.emulator import host_kv, residency
from qlm_env.backends.emulator.engine import drop_kv
from qlm_env.backends.emulator.engine_queue import dequeue, enqueue
from qlm_env.backends.emulator.state import Fleet
from qlm_env.compiled import compiled
from qlm_env.requests import NOWHERE, RequestTable


@compiled
def begin_swap(fleet: Fleet, i: int, model: int, now_s: float) -> None:
    """See :func:`.residency.start_swap`."""
    residency.start_swap(fleet, i, model, now_s)


@compiled
def end_swap(fleet: Fleet, i: int, model: int, now_s: float) -> None:
    """See :func:`.residency.activate`."""
    residency.activate(fleet, i, model, now_s)


@compiled
def end_staging(fleet: Fleet, i: int, now_s: float) -> None:
    """See :func:`.residency.finish_staging`."""
    residency.finish_staging(fleet, i, now_s)


@compiled
def can_swap(fleet: Fleet, i: int, model: int) -> bool:
    """See :func:`.residency.can_swap`."""
    return bool(residency.can_swap(fleet, i, model))


@compiled
def power_off(fleet: Fleet, i: int, now_s: float) -> None:
    """See :func:`.residency.power_off`."""
    residency.power_off(fleet, i, now_s)


@compiled
def discard_kv(fleet: Fleet, requests: RequestTable, r: int) -> None:
    """See :func:`.host_kv.discard`."""
    host_kv.discard(fleet, requests, r)


@compiled
def lose_kv(requests: RequestTable, r: int) -> None:
    """See :func:`.engine.drop_kv`."""
    drop_kv(requests, r)


@compiled
def leave_queue(fleet: Fleet, requests: RequestTable, i: int, r: int) -> None:
    """Take a request out of the engine's own queue, wherever it stands there."""
    for _ in range(fleet.engine[i].queue_length):
        other = dequeue(fleet, requests, i)
        if other != r:
            enqueue(fleet, requests, i, other, False)
    requests[r].next = NOWHERE
