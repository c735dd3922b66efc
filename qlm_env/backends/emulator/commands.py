"""Engines that take one command at a time: what :class:`~.backend.EmulatorBackend` runs on.

The same engine and residency functions as in :mod:`qlm_env.dynamics`, with the caller in the place of the
virtual queues: it says which request to run or evict, and reads what happened from an array of events. An engine
that told something waits with its next step for the caller's answer, which takes no time: what is pulled then is in
that step, as it is where the queues are at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.backends.base import EventKind
from qlm_env.backends.emulator.engine import (
    catch_up,
    drop_kv,
    finish_leap,
    input_blocks,
    interrupt,
    reap,
    release,
    whole_input_fits,
)
from qlm_env.backends.emulator.engine_queue import dequeue, enqueue
from qlm_env.backends.emulator.host_kv import discard
from qlm_env.backends.emulator.host_kv import evict as evict_slot
from qlm_env.backends.emulator.residency import (
    activate,
    can_ever_run,
    can_swap,
    can_warm_start,
    finish_staging,
    power_off,
    start_staging,
    start_swap,
)
from qlm_env.backends.emulator.serve import schedule_from_queue
from qlm_env.backends.emulator.state import EVICT_DROP, EVICT_KEEP, NEVER, NO_EVICTION, Fleet
from qlm_env.compiled import compiled, kernel
from qlm_env.requests import NOWHERE, PENDING, WAITING, Int, Records, RequestTable

PULL, EVICT, SWAP_MODEL, WARM_START, FAIL, RECOVER, DROP_KV = range(7)
FINISHED, RETURNED, MODEL_READY = int(EventKind.FINISHED), int(EventKind.RETURNED), int(EventKind.MODEL_READY)
WARM_READY, DOWN, UP = int(EventKind.WARM_READY), int(EventKind.DOWN), int(EventKind.UP)

EVENT_DTYPE = np.dtype([("time_s", "f8"), ("kind", "i4"), ("instance", "i4"), ("subject", "i4")], align=True)

CLOCK_DTYPE = np.dtype([("now_s", "f8"), ("events", "i8")], align=True)


class Run(NamedTuple):
    """The emulated cluster under command. N requests, I instances, S batch slots."""

    requests: RequestTable
    fleet: Fleet
    clock: Records
    """(1,) CLOCK_DTYPE; ``events`` counts what `event` holds and the caller has not yet read"""
    event: Records
    """(N + 3I,) EVENT_DTYPE, enough as it is read after every instant at which something happened"""
    leaving: NDArray[np.int8]
    """(N,) EVICT_DROP or EVICT_KEEP for requests that leave their engine at the end of the step"""
    due: NDArray[np.int8]
    """(I,) whether the engine is between two steps and schedules the next when time next passes"""
    finished: Int
    """(S,) scratch"""


def make_run(fleet: Fleet, requests: RequestTable) -> Run:
    """Time 0 of ``requests``, all pending, on ``fleet``."""
    return Run(
        requests=requests,
        fleet=fleet,
        clock=np.zeros(1, CLOCK_DTYPE).view(np.recarray),
        event=np.zeros(len(requests) + 3 * len(fleet.engine), EVENT_DTYPE).view(np.recarray),
        leaving=np.zeros(len(requests), np.int8),
        due=np.zeros(len(fleet.engine), np.int8),
        finished=np.zeros(fleet.max_num_seqs, np.int32),
    )


@kernel
def _tell(run: Run, kind: int, i: int, subject: int) -> None:
    event = run.event[run.clock[0].events]
    event.time_s = run.clock[0].now_s
    event.kind = kind
    event.instance = i
    event.subject = subject
    run.clock[0].events += 1


@kernel
def _return(run: Run, i: int, r: int) -> None:
    """An unfinished request is out of the engine."""
    run.requests[r].instance = NOWHERE
    run.leaving[r] = NO_EVICTION
    _tell(run, RETURNED, i, r)


@kernel
def _evict_leaving(run: Run, i: int) -> float:
    """Let go what is to leave; returns the seconds its copies to host memory take."""
    fleet, requests = run.fleet, run.requests
    engine = fleet.engine[i]
    engine.pending_eviction = NO_EVICTION
    copied_bytes = 0.0
    for slot in range(engine.num_running - 1, -1, -1):
        r = fleet.slot[i, slot].request
        if run.leaving[r] != NO_EVICTION:
            copied_bytes += evict_slot(fleet, requests, i, slot, run.leaving[r] == EVICT_KEEP)
            _return(run, i, r)
    for _ in range(engine.queue_length):
        r = dequeue(fleet, requests, i)
        if run.leaving[r] != NO_EVICTION:
            _return(run, i, r)
        else:
            enqueue(fleet, requests, i, r, False)
    return float(copied_bytes / fleet.placement[i, engine.active_model].kv_swap_bytes_per_s)


@kernel
def _boundary(run: Run, i: int) -> None:
    """Between two steps: evict, swap or schedule."""
    fleet, now_s = run.fleet, run.clock[0].now_s
    engine = fleet.engine[i]
    run.due[i] = 0
    if engine.pending_eviction != NO_EVICTION or engine.pending_swap != NOWHERE:
        reap(fleet, i)
    if engine.pending_eviction != NO_EVICTION:
        told = run.clock[0].events
        copy_s = _evict_leaving(run, i)
        if copy_s > 0:
            engine.next_event_s = now_s + copy_s
            return
        if run.clock[0].events > told:
            run.due[i] = 1
            return
    if engine.pending_swap != NOWHERE:
        start_swap(fleet, i, engine.pending_swap, now_s)
    else:
        # Requests come by command, none by their arrival.
        schedule_from_queue(fleet, run.requests, i, now_s, len(run.requests))


@kernel
def _act(run: Run, i: int) -> None:
    """Let commands take effect at the next step boundary, which is now if the engine is idle."""
    engine = run.fleet.engine[i]
    something = run.due[i] != 0 or engine.pending_eviction != NO_EVICTION or engine.pending_swap != NOWHERE
    if engine.queue_head != NOWHERE and engine.num_running < run.fleet.max_num_seqs:
        something = something or whole_input_fits(run.fleet, run.requests, i, engine.queue_head)
    if something and engine.next_event_s == NEVER:
        _boundary(run, i)
    elif something:
        interrupt(run.fleet, i, run.clock[0].now_s)


# --------------------------------------------------------------------------- commands
@kernel
def _takes(run: Run, i: int, r: int) -> bool:
    """Whether ``pull(i, r)`` is allowed now."""
    engine = run.fleet.engine[i]
    request = run.requests[r]
    return bool(
        engine.up
        and engine.active_model == request.model
        and engine.pending_swap == NOWHERE
        and (request.state == PENDING or request.state == WAITING)
        and request.instance == NOWHERE
        and can_ever_run(run.fleet, run.requests, i, r)
    )


@compiled
def has_room(run: Run, i: int, r: int) -> bool:
    """See :meth:`qlm_env.backends.base.Backend.has_room`."""
    fleet, requests = run.fleet, run.requests
    engine = fleet.engine[i]
    if not _takes(run, i, r) or engine.num_running + engine.queue_length >= fleet.max_num_seqs:
        return False
    blocks = input_blocks(fleet, requests, r)
    queued = engine.queue_head
    while queued != NOWHERE:
        blocks += input_blocks(fleet, requests, queued)
        queued = requests[queued].next
    return bool(blocks <= engine.free_blocks)


@kernel
def _fail(run: Run, i: int) -> None:
    fleet, requests = run.fleet, run.requests
    engine = fleet.engine[i]
    catch_up(fleet, i, run.clock[0].now_s)
    for slot in range(engine.num_running - 1, -1, -1):
        r = release(fleet, requests, i, slot, 0)
        drop_kv(requests, r)
        _return(run, i, r)
    while engine.queue_head != NOWHERE:
        _return(run, i, dequeue(fleet, requests, i))
    for r in range(len(requests)):
        if requests[r].kv_host == i:
            discard(fleet, requests, r)
    power_off(fleet, i, run.clock[0].now_s)
    run.due[i] = 0
    _tell(run, DOWN, i, NOWHERE)


@compiled
def command(run: Run, verb: int, i: int, subject: int, option: int) -> bool:
    """Take one command of the contract if the state allows it; engines act on it when time next passes.

    Args:
        verb, i, subject, option: PULL and a request; EVICT, a request, and EVICT_DROP or EVICT_KEEP;
            SWAP_MODEL or WARM_START and a model; FAIL; RECOVER; DROP_KV and a request.

    Returns:
        whether it was allowed; if not, nothing changed.
    """
    fleet, requests, now_s = run.fleet, run.requests, run.clock[0].now_s
    engine = fleet.engine[i]
    if verb == PULL:
        if not _takes(run, i, subject):
            return False
        if requests[subject].kv_host != i:
            discard(fleet, requests, subject)
        enqueue(fleet, requests, i, subject, False)
    elif verb == EVICT:
        if requests[subject].instance != i:
            return False
        run.leaving[subject] = option
        engine.pending_eviction = EVICT_DROP
    elif verb == SWAP_MODEL:
        if not can_swap(fleet, i, subject) or engine.num_running > 0 or engine.queue_length > 0:
            return False
        engine.pending_swap = subject
    elif verb == WARM_START:
        if not can_warm_start(fleet, i, subject):
            return False
        start_staging(fleet, i, subject, now_s)
    elif verb == FAIL:
        if not engine.up:
            return False
        _fail(run, i)
    elif verb == RECOVER:
        if engine.up:
            return False
        engine.up = 1
        _tell(run, UP, i, NOWHERE)
    else:
        if requests[subject].instance != NOWHERE:
            return False
        discard(fleet, requests, subject)
    return True


# --------------------------------------------------------------------------- time
@kernel
def _engine_event(run: Run, i: int) -> None:
    """A leap, a swap or a copy ended."""
    engine = run.fleet.engine[i]
    told = run.clock[0].events
    if engine.swap_target != NOWHERE:
        _tell(run, MODEL_READY, i, engine.swap_target)
        activate(run.fleet, i, engine.swap_target, run.clock[0].now_s)
    elif engine.steps > 0:
        for k in range(finish_leap(run.fleet, run.requests, i, run.finished)):
            _tell(run, FINISHED, i, run.finished[k])
    else:
        engine.next_event_s = NEVER
    # With async scheduling the next step was decided when the one that ended began.
    if run.clock[0].events > told and not run.fleet.async_scheduling:
        run.due[i] = 1
    else:
        _boundary(run, i)


@compiled
def advance(run: Run, until_s: float) -> None:
    """See :meth:`qlm_env.backends.base.Backend.advance`; what happened is in ``run.event``."""
    fleet = run.fleet
    clock = run.clock[0]
    num_instances = len(fleet.engine)
    for i in range(num_instances):
        _act(run, i)
    while True:
        event_s = NEVER
        next_instance = 0
        for i in range(num_instances):
            instance_s = min(fleet.engine[i].next_event_s, fleet.engine[i].stage_end_s)
            if instance_s < event_s:
                event_s = instance_s
                next_instance = i
        if clock.events > 0 and event_s > clock.now_s:
            break
        if event_s > until_s or event_s == NEVER:
            clock.now_s = max(clock.now_s, until_s)
            break
        clock.now_s = max(clock.now_s, event_s)
        if fleet.engine[next_instance].stage_end_s == event_s:
            _tell(run, WARM_READY, next_instance, fleet.engine[next_instance].stage_target)
            finish_staging(fleet, next_instance, clock.now_s)
        else:
            _engine_event(run, next_instance)
    for i in range(num_instances):
        catch_up(fleet, i, clock.now_s)
