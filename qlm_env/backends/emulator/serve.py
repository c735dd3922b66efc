"""One engine fed straight from the request table: vLLM alone behind its own queue, no groups, no LSOs.

This is the engine as benchmarks and the step-by-step oracle see it; the environment drives the same
functions from :mod:`qlm_env.dynamics`.
"""

from __future__ import annotations

import numpy as np

from qlm_env.backends.emulator.engine import (
    begin_step,
    dequeue,
    end_step,
    enqueue,
    finish_leap,
    interrupt,
    must_reschedule,
    try_admit,
    whole_input_fits,
)
from qlm_env.backends.emulator.state import Fleet
from qlm_env.compiled import compiled, kernel
from qlm_env.requests import NOWHERE, Int, RequestTable


@kernel
def schedule_from_queue(fleet: Fleet, requests: RequestTable, i: int, now_s: float) -> None:
    """Schedule a step of instance ``i`` with admissions from the engine's own queue."""
    engine = fleet.engine[i]
    while True:
        begin_step(fleet, requests, i)
        while engine.queue_head != NOWHERE and try_admit(fleet, requests, i, engine.queue_head, now_s):
            dequeue(fleet, requests, i)
        if not must_reschedule(fleet, i):
            break
    end_step(fleet, requests, i, now_s)


def serve(fleet: Fleet, requests: RequestTable, i: int, until_s: float) -> int:
    """Serve every request of the table on instance ``i`` in order of arrival, up to ``until_s``.

    The instance must hold the requests' model. Returns the number of leaps taken.
    """
    return _serve(fleet, requests, i, until_s, np.zeros(fleet.max_num_seqs, np.int32))


@compiled
def _serve(fleet: Fleet, requests: RequestTable, i: int, until_s: float, finished: Int) -> int:
    """As :func:`serve`, with scratch for the requests that finish in a step, shape (S,)."""
    engine = fleet.engine[i]
    num_requests = len(requests)
    arriving = 0
    leaps = 0
    while True:
        arrival_s = requests[arriving].arrival_s if arriving < num_requests else np.inf
        event_s = engine.next_event_s
        if min(arrival_s, event_s) > until_s or (arriving == num_requests and event_s == np.inf):
            break
        if arrival_s <= event_s:
            blocked = engine.queue_head != NOWHERE
            first = arriving
            while arriving < num_requests and requests[arriving].arrival_s == arrival_s:
                enqueue(fleet, requests, i, arriving, False)
                arriving += 1
            head = engine.queue_head
            if event_s == np.inf:
                schedule_from_queue(fleet, requests, i, arrival_s)
            elif (
                # Behind a head that did not fit when the leap began nothing is admitted before its end.
                (not blocked or head >= first)
                and engine.num_running < fleet.max_num_seqs
                and whole_input_fits(fleet, requests, i, head)
            ):
                interrupt(fleet, i, arrival_s)
        else:
            finish_leap(fleet, requests, i, finished)
            leaps += 1
            schedule_from_queue(fleet, requests, i, event_s)
    return leaps
