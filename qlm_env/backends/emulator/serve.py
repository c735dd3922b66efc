"""One engine fed straight from the request table: vLLM alone behind its own queue, no groups, no LSOs.

This is the engine as benchmarks, recorded runs and the step-by-step oracle see it; the environment drives the same
functions from :mod:`qlm_env.dynamics`.
"""

from __future__ import annotations

import numpy as np

from qlm_env.backends.emulator.engine import (
    begin_step,
    end_step,
    finish_leap,
    interrupt,
    must_reschedule,
    try_admit,
    whole_input_fits,
)
from qlm_env.backends.emulator.engine_queue import dequeue, enqueue, precedes
from qlm_env.backends.emulator.state import NO_FINISH, PRIORITY, Fleet
from qlm_env.compiled import compiled, kernel
from qlm_env.requests import NOWHERE, Int, Records, RequestTable

SCHEDULE_DTYPE = np.dtype(
    [
        ("step", "i8"),  # the first of ...
        ("steps", "i8"),  # ... so many steps in a row
        ("request", "i4"),
        ("tokens", "i4"),  # in each of them; PREEMPTED when the request was preempted while `step` was scheduled
    ],
    align=True,
)

PREEMPTED = -1

NO_SCHEDULE = np.zeros(0, SCHEDULE_DTYPE).view(np.recarray)


def serve(fleet: Fleet, requests: RequestTable, i: int, until_s: float) -> int:
    """Serve every request of the table on instance ``i`` in order of arrival, up to ``until_s``.

    The instance must hold the requests' model. Returns the number of leaps taken.
    """
    leaps, _ = _serve(fleet, requests, i, until_s, *_scratch(fleet, requests), NO_SCHEDULE)
    return int(leaps)


def serve_logged(fleet: Fleet, requests: RequestTable, i: int, until_s: float, log: Records) -> int:
    """As :func:`serve`, writing down what each step ran.

    Args:
        log: (L,) SCHEDULE_DTYPE, filled in order of steps, and within a step of scheduling.

    Returns:
        the number of entries; ``L`` if the log may be cut short.
    """
    _, entries = _serve(fleet, requests, i, until_s, *_scratch(fleet, requests), log)
    return int(entries)


def _scratch(fleet: Fleet, requests: RequestTable) -> tuple[Int, Int]:
    return np.zeros(fleet.max_num_seqs, np.int32), np.zeros(len(requests), np.int32)


@kernel
def schedule_from_queue(fleet: Fleet, requests: RequestTable, i: int, now_s: float, arriving: int) -> int:
    """Schedule a step of instance ``i`` with admissions from the engine's own queue.

    The requests from row ``arriving`` on join the queue as far as the decision knows of them.

    Returns:
        the first row that has not joined it.
    """
    engine = fleet.engine[i]
    while True:
        begin_step(fleet, requests, i, now_s)
        while arriving < len(requests) and requests[arriving].arrival_s <= engine.known_s:
            enqueue(fleet, requests, i, arriving, False)
            arriving += 1
        while engine.queue_head != NOWHERE and try_admit(fleet, requests, i, engine.queue_head):
            dequeue(fleet, requests, i)
        if not must_reschedule(fleet, i):
            break
    if arriving < len(requests) and requests[arriving].arrival_s <= now_s:
        engine.turned_away = 1
    end_step(fleet, requests, i, now_s)
    return arriving


@kernel
def _might_be_next(fleet: Fleet, requests: RequestTable, i: int, r: int, arriving: int) -> bool:
    """Whether a request that arrives during a leap, after those from ``arriving`` on, could be admitted at its end."""
    engine = fleet.engine[i]
    if engine.num_running >= fleet.max_num_seqs or not whole_input_fits(fleet, requests, i, r):
        return False
    if fleet.scheduling_policy == PRIORITY:
        return engine.queue_head == NOWHERE or precedes(requests, r, engine.queue_head)
    # Behind a head that did not fit when the leap began nothing is admitted before its end.
    return bool(engine.queue_head == NOWHERE and r == arriving)


@kernel
def _note_preemptions(requests: RequestTable, tick: int, noted: Int, log: Records, entries: int) -> int:
    """Log every request that has been preempted more often than ``noted``, shape (N,)."""
    for r in range(len(requests)):
        if requests[r].preemptions > noted[r] and entries < len(log):
            noted[r] = requests[r].preemptions
            entry = log[entries]
            entry.step, entry.steps, entry.request, entry.tokens = tick, 1, r, PREEMPTED
            entries += 1
    return entries


@kernel
def _note_leap(fleet: Fleet, i: int, log: Records, entries: int) -> int:
    """Log the tokens of every request in the leap that ends now."""
    engine = fleet.engine[i]
    for slot in range(engine.num_running):
        place = fleet.slot[i, slot]
        decodes = place.finish_tick != NO_FINISH and not engine.preempted
        tokens = 1 if decodes else place.chunk
        if tokens > 0 and entries < len(log):
            entry = log[entries]
            entry.step, entry.steps, entry.request, entry.tokens = engine.tick, engine.steps, place.request, tokens
            entries += 1
    return entries


@compiled
def _serve(
    fleet: Fleet, requests: RequestTable, i: int, until_s: float, finished: Int, noted: Int, log: Records
) -> tuple[int, int]:
    """As :func:`serve_logged`, returning leaps and entries, with scratch: ``finished`` (S,), ``noted`` (N,) zeros."""
    engine = fleet.engine[i]
    num_requests = len(requests)
    seen = arriving = leaps = entries = 0
    while True:
        arrival_s = requests[seen].arrival_s if seen < num_requests else np.inf
        event_s = engine.next_event_s
        if min(arrival_s, event_s) > until_s or (seen == num_requests and event_s == np.inf):
            break
        if arrival_s > event_s:
            if len(log) > 0:
                entries = _note_leap(fleet, i, log, entries)
            finish_leap(fleet, requests, i, finished)
            leaps += 1
            arriving = schedule_from_queue(fleet, requests, i, event_s, arriving)
        else:
            wanted = False
            while seen < num_requests and requests[seen].arrival_s == arrival_s:
                wanted = wanted or event_s == np.inf or _might_be_next(fleet, requests, i, seen, arriving)
                seen += 1
            if not wanted:
                continue
            if event_s < np.inf:
                interrupt(fleet, i, arrival_s)
                continue
            arriving = schedule_from_queue(fleet, requests, i, arrival_s, arriving)
        if len(log) > 0:
            entries = _note_preemptions(requests, engine.tick, noted, log, entries)
    return leaps, entries
