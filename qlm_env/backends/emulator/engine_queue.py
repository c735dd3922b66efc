"""An engine's own queue: requests submitted but not yet admitted, and preempted ones.

First come, first served, with preempted requests back at the head; or, under vLLM's ``priority`` policy, by class
and arrival.
"""

from __future__ import annotations

from qlm_env.backends.emulator.state import PRIORITY, Fleet
from qlm_env.compiled import kernel
from qlm_env.requests import NOWHERE, WAITING, RequestTable


@kernel
def precedes(requests: RequestTable, a: int, b: int) -> bool:
    """Order of the ``priority`` policy: class, then arrival."""
    if requests[a].slo_class != requests[b].slo_class:
        return requests[a].slo_class < requests[b].slo_class
    if requests[a].arrival_s != requests[b].arrival_s:
        return requests[a].arrival_s < requests[b].arrival_s
    return a < b


@kernel
def enqueue(fleet: Fleet, requests: RequestTable, i: int, r: int, front: bool) -> None:
    """Put a waiting request into the engine's queue: at an end under FCFS, in order under ``priority``."""
    engine = fleet.engine[i]
    requests[r].instance = i
    requests[r].state = WAITING
    previous = NOWHERE
    if fleet.scheduling_policy == PRIORITY:
        cursor = engine.queue_head
        while cursor != NOWHERE and precedes(requests, cursor, r):
            previous = cursor
            cursor = requests[cursor].next
    elif not front:
        previous = engine.queue_tail
    if previous == NOWHERE:
        requests[r].next = engine.queue_head
        engine.queue_head = r
    else:
        requests[r].next = requests[previous].next
        requests[previous].next = r
    if requests[r].next == NOWHERE:
        engine.queue_tail = r
    engine.queue_length += 1


@kernel
def dequeue(fleet: Fleet, requests: RequestTable, i: int) -> int:
    """Take the head of the engine's queue, or NOWHERE."""
    engine = fleet.engine[i]
    r = engine.queue_head
    if r != NOWHERE:
        engine.queue_head = requests[r].next
        if engine.queue_head == NOWHERE:
            engine.queue_tail = NOWHERE
        requests[r].next = NOWHERE
        engine.queue_length -= 1
    return r
