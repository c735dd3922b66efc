"""The emulated cluster in time: arrivals, engines, virtual queues, failures, one event after another.

This is where queueing and engines meet, and the only place that knows both. Every event is processed in
order of time, failures and arrivals before engine events of the same instant; between events each engine
is inside a leap whose end is known. :func:`advance` runs to the next decision epoch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qlm_env.backends.emulator.engine import (
    begin_step,
    catch_up,
    drop_kv,
    end_step,
    finish_leap,
    interrupt,
    must_reschedule,
    reap,
    release,
    try_admit,
)
from qlm_env.backends.emulator.engine_queue import dequeue
from qlm_env.backends.emulator.host_kv import discard, evict
from qlm_env.backends.emulator.residency import (
    activate,
    can_ever_run,
    finish_staging,
    fits,
    power_off,
    start_staging,
    start_swap,
)
from qlm_env.backends.emulator.state import EVICT_KEEP, NEVER, NO_EVICTION, Fleet
from qlm_env.compiled import compiled, inlined, kernel
from qlm_env.queueing.groups import Queues, give_back, join, note_finished, take_first
from qlm_env.queueing.virtual_queues import link_after, place, unlink
from qlm_env.requests import (
    MET,
    MISSED,
    NO_INSTANCE,
    NOT_REJECTED,
    NOWHERE,
    REJECTED,
    TOO_LONG,
    UNSETTLED,
    Int,
    Records,
    RequestTable,
)

# Why `advance` returned, as bits.
GROUP_FORMED, HEAD_EMPTIED, MODEL_READY, INSTANCE_CHANGED, LOG_FULL = 1, 2, 4, 8, 16

E2E, TTFT = 0, 1

# What the event log records.
PULL, EVICT, PREEMPT, SWAP_BEGIN, SWAP_END, WARM_BEGIN, WARM_END, FAIL, RECOVER, BALANCE = range(10)
EVENT_NAMES = (
    "pull",
    "evict",
    "preempt",
    "swap_begin",
    "swap_end",
    "warm_begin",
    "warm_end",
    "fail",
    "recover",
    "balance",
)

EVENT_DTYPE = np.dtype(
    [
        ("time_s", "f8"),
        ("kind", "i4"),
        ("instance", "i4"),
        ("subject", "i4"),  # group for pull and balance, model for swaps and warm starts, else NOWHERE
        ("count", "i4"),  # requests
    ],
    align=True,
)

CLOCK_DTYPE = np.dtype(
    [
        ("now_s", "f8"),
        ("reward", "f8"),  # of the requests settled since it was last read
        ("next_arrival", "i8"),
        ("next_failure", "i8"),
        ("finished", "i8"),
        ("rejected", "i8"),
        ("settled", "i8"),
        ("met", "i8"),
        ("events", "i8"),  # entries in the log
        ("hol_blocking_s", "f8"),
    ],
    align=True,
)

SLO_DTYPE = np.dtype(
    [
        ("target_s", "f8"),
        ("reward_weight", "f8"),  # reward of one met request; over the whole workload they sum to 1
        ("next_row", "i8"),  # first entry of `class_rows` whose deadline has not passed
        ("end_row", "i8"),  # end of the class in `class_rows`
    ],
    align=True,
)

FAILURE_DTYPE = np.dtype([("time_s", "f8"), ("instance", "i4"), ("up", "i1")], align=True)


class World(NamedTuple):
    """Everything an episode consists of. N requests, I instances, M models, C SLO classes."""

    requests: RequestTable
    fleet: Fleet
    queues: Queues
    clock: Records
    """(1,) CLOCK_DTYPE"""
    failures: Records
    """FAILURE_DTYPE, in order of time"""
    log: Records
    """(L,) EVENT_DTYPE"""
    slo: Records
    """(C,) SLO_DTYPE"""
    class_rows: Int
    """(N,) request rows ordered by class, then arrival, which within a class is the order of deadlines"""
    finished: Int
    """(S,) scratch"""
    slo_metric: int
    auto_pull: bool
    logging: bool


@kernel
def record(world: World, kind: int, instance: int, subject: int, count: int) -> None:
    """Append to the event log; a pull of the same group at the same instance and time adds to the last entry."""
    if not world.logging:
        return
    clock = world.clock[0]
    if kind == PULL and clock.events > 0:
        last = world.log[clock.events - 1]
        if last.kind == kind and last.instance == instance and last.subject == subject and last.time_s == clock.now_s:
            last.count += count
            return
    if clock.events < len(world.log):
        entry = world.log[clock.events]
        entry.time_s = clock.now_s
        entry.kind = kind
        entry.instance = instance
        entry.subject = subject
        entry.count = count
        clock.events += 1


# --------------------------------------------------------------------------- outcomes
@kernel
def settle(world: World, r: int, outcome: int) -> None:
    """A request's outcome is certain: it counts once, for the reward and for good."""
    request = world.requests[r]
    if request.settled == UNSETTLED:
        request.settled = outcome
        clock = world.clock[0]
        clock.reward += outcome * world.slo[request.slo_class].reward_weight
        clock.settled += 1
        clock.met += outcome == MET


@kernel
def _deadline_s(world: World, r: int) -> float:
    return world.requests[r].arrival_s + world.slo[world.requests[r].slo_class].target_s


@kernel
def _in_time(world: World, r: int) -> bool:
    """Whether the event its SLO is measured on has happened, and not after the deadline."""
    request = world.requests[r]
    reached_s = request.first_token_s if world.slo_metric == TTFT else request.finish_s
    # NaN, where it has not happened, compares false.
    return bool(reached_s <= _deadline_s(world, r))


@kernel
def settle_up_to_now(world: World) -> None:
    """Settle what was served by now, and as missed what should have been."""
    now_s = world.clock[0].now_s
    if world.slo_metric == TTFT:
        for i in range(len(world.fleet.engine)):
            for slot in range(world.fleet.engine[i].num_running):
                r = world.fleet.slot[i, slot].request
                if _in_time(world, r):
                    settle(world, r, MET)
    for c in range(len(world.slo)):
        cursor = world.slo[c].next_row
        while cursor < world.slo[c].end_row:
            r = world.class_rows[cursor]
            if _deadline_s(world, r) >= now_s:
                break
            settle(world, r, MET if _in_time(world, r) else MISSED)
            cursor += 1
        world.slo[c].next_row = cursor


@kernel
def finish(world: World, r: int) -> None:
    """A request has all its tokens: settle and count it."""
    world.clock[0].finished += 1
    settle(world, r, MET if _in_time(world, r) else MISSED)
    note_finished(world.queues, world.requests, r)


@compiled
def settle_rest_as_missed(world: World) -> None:
    """The episode is cut off: what has not reached its target's event by now has missed."""
    for r in range(len(world.requests)):
        settle(world, r, MET if _in_time(world, r) else MISSED)


# --------------------------------------------------------------------------- engine boundaries
@kernel
def return_to_group(world: World, r: int) -> None:
    """A request leaves the engine for its group, which goes behind the head of the queue it last was in."""
    give_back(world.queues, world.requests, r)
    g = world.requests[r].group
    group = world.queues.group[g]
    if not group.queued and group.queue != NOWHERE:
        link_after(world.queues, g, group.queue, world.queues.queue[group.queue].head)


@inlined
def _discard_kept_kv(world: World, g: int) -> None:
    """Drop what host memory keeps of the group's waiting requests."""
    r = world.queues.group[g].head
    while r != NOWHERE:
        discard(world.fleet, world.requests, r)
        r = world.requests[r].next


@kernel
def _return_engine_queue(world: World, i: int) -> None:
    r = dequeue(world.fleet, world.requests, i)
    while r != NOWHERE:
        return_to_group(world, r)
        r = dequeue(world.fleet, world.requests, i)


@kernel
def _evict(world: World, i: int) -> float:
    """Carry out the pending eviction; returns the seconds its copies to host memory take.

    Whatever is not of the head group leaves the engine.
    """
    fleet, requests = world.fleet, world.requests
    engine = fleet.engine[i]
    keep = engine.pending_eviction == EVICT_KEEP
    engine.pending_eviction = NO_EVICTION
    head = world.queues.queue[i].head
    copied_bytes = 0.0
    count = 0
    for slot in range(engine.num_running - 1, -1, -1):
        r = fleet.slot[i, slot].request
        if requests[r].group != head:
            copied_bytes += evict(fleet, requests, i, slot, keep)
            count += 1
            return_to_group(world, r)
    r = engine.queue_head
    if r != NOWHERE and requests[r].group != head:
        # The engine's own queue holds preempted requests of earlier groups, without KV.
        _return_engine_queue(world, i)
    record(world, EVICT, i, NOWHERE, count)
    return copied_bytes / fleet.placement[i, engine.active_model].kv_swap_bytes_per_s


@kernel
def _next_candidate(world: World, i: int) -> int:
    """The request to admit next: the engine's own queue, else the head group's first if it may be pulled."""
    engine = world.fleet.engine[i]
    if engine.queue_head != NOWHERE:
        return engine.queue_head
    queue = world.queues.queue[i]
    if queue.head == NOWHERE or not (world.auto_pull or queue.pull_requested):
        return NOWHERE
    head = world.queues.group[queue.head]
    return head.head if head.model == engine.active_model else NOWHERE


@inlined
def take_from_head(world: World, i: int) -> bool:
    """The head group's first request goes to the engine; whether that empties the group."""
    queue = world.queues.queue[i]
    g = queue.head
    take_first(world.queues, world.requests, g)
    record(world, PULL, i, g, 1)
    if world.queues.group[g].waiting > 0:
        return False
    unlink(world.queues, g)
    queue.pull_requested = 0
    return True


@kernel
def runs_less_urgent(world: World, i: int, r: int) -> bool:
    """Whether the batch holds a request with a longer target than the waiting request ``r``."""
    target_s = world.slo[world.requests[r].slo_class].target_s
    for slot in range(world.fleet.engine[i].num_running):
        running = world.requests[world.fleet.slot[i, slot].request]
        if world.slo[running.slo_class].target_s > target_s:
            return True
    return False


@inlined
def end_blocking(world: World, i: int) -> None:
    """Add up the time in which less urgent requests held the room that the next one waits for."""
    queue = world.queues.queue[i]
    if queue.blocked_since_s != NEVER:
        world.clock[0].hol_blocking_s += world.clock[0].now_s - queue.blocked_since_s
        queue.blocked_since_s = NEVER


@kernel
def _schedule(world: World, i: int, admit: bool) -> int:
    """Schedule the instance's next leap with pulls from its head groups; returns epoch bits."""
    fleet, requests = world.fleet, world.requests
    engine = fleet.engine[i]
    queue = world.queues.queue[i]
    now_s = world.clock[0].now_s
    preempted_before = engine.preemptions
    epoch = 0
    blocked = False
    while True:
        begin_step(fleet, requests, i, now_s)
        blocked = False
        while admit:
            r = _next_candidate(world, i)
            if r == NOWHERE:
                break
            if not try_admit(fleet, requests, i, r):
                blocked = True
                break
            if r == engine.queue_head:
                dequeue(fleet, requests, i)
                continue
            if take_from_head(world, i):
                epoch |= HEAD_EMPTIED
        if not must_reschedule(fleet, i):
            break
    end_step(fleet, requests, i, now_s)
    if engine.preemptions > preempted_before:
        record(world, PREEMPT, i, NOWHERE, engine.preemptions - preempted_before)
    if blocked and runs_less_urgent(world, i, _next_candidate(world, i)):
        queue.blocked_since_s = now_s
    queue.pull_requested = 0
    return epoch


@kernel
def _boundary(world: World, i: int) -> int:
    """Between two steps: evict, swap or schedule. The engine is up and not loading; returns epoch bits."""
    fleet = world.fleet
    engine = fleet.engine[i]
    clock = world.clock[0]
    end_blocking(world, i)
    if engine.active_model == NOWHERE and engine.pending_swap == NOWHERE:
        return 0
    if engine.pending_eviction != NO_EVICTION:
        reap(fleet, i)
        copy_s = _evict(world, i)
        if copy_s > 0:
            engine.next_event_s = clock.now_s + copy_s
            return 0
    if engine.pending_swap != NOWHERE and engine.num_running == engine.leaving:
        reap(fleet, i)
        _return_engine_queue(world, i)
        record(world, SWAP_BEGIN, i, engine.pending_swap, 0)
        start_swap(fleet, i, engine.pending_swap, clock.now_s)
        return 0
    return _schedule(world, i, engine.pending_swap == NOWHERE)


@kernel
def poke(world: World, i: int) -> int:
    """Something changed for the instance: act at the next step boundary, now if it is idle."""
    engine = world.fleet.engine[i]
    if not engine.up:
        return 0
    if engine.next_event_s == NEVER:
        return _boundary(world, i)
    if (
        engine.pending_eviction != NO_EVICTION
        or engine.pending_swap != NOWHERE
        or (engine.num_running < world.fleet.max_num_seqs and _next_candidate(world, i) != NOWHERE)
    ):
        interrupt(world.fleet, i, world.clock[0].now_s)
    elif world.queues.queue[i].blocked_since_s == NEVER:
        r = _next_candidate(world, i)
        if r != NOWHERE and runs_less_urgent(world, i, r):
            world.queues.queue[i].blocked_since_s = world.clock[0].now_s
    return 0


# --------------------------------------------------------------------------- events
@kernel
def receive(world: World) -> bool:
    """The next request arrives: it joins a group or is rejected; whether a new group formed."""
    clock = world.clock[0]
    r = clock.next_arrival
    clock.next_arrival += 1
    if world.requests[r].reject_reason:
        world.requests[r].state = REJECTED
        clock.rejected += 1
        settle(world, r, MISSED)
        return False
    return join(world.queues, world.requests, r, clock.now_s)


@kernel
def _arrive(world: World) -> int:
    """Every request that arrives at this instant joins a group or is rejected."""
    requests = world.requests
    clock = world.clock[0]
    epoch = 0
    while clock.next_arrival < len(requests) and requests[clock.next_arrival].arrival_s <= clock.now_s:
        r = clock.next_arrival
        if receive(world):
            epoch |= GROUP_FORMED
        elif requests[r].group != NOWHERE:
            group = world.queues.group[requests[r].group]
            if group.queued and group.previous == NOWHERE:
                epoch |= poke(world, group.queue)
    return epoch


@kernel
def _engine_event(world: World, i: int) -> int:
    """A leap, a swap or a copy ended."""
    engine = world.fleet.engine[i]
    epoch = 0
    if engine.swap_target != NOWHERE:
        record(world, SWAP_END, i, engine.swap_target, 0)
        activate(world.fleet, i, engine.swap_target, world.clock[0].now_s)
        epoch = MODEL_READY
    elif engine.steps > 0:
        for k in range(finish_leap(world.fleet, world.requests, i, world.finished)):
            finish(world, world.finished[k])
    else:
        engine.next_event_s = NEVER
    return epoch | _boundary(world, i)


@kernel
def disband_queue(world: World, i: int) -> None:
    """The instance is down: its groups lose their queue, and what its host memory kept for them."""
    queues = world.queues
    while queues.queue[i].head != NOWHERE:
        unlink(queues, queues.queue[i].head)
    for k in range(queues.tally[0].live):
        group = queues.group[queues.live[k]]
        if group.queue == i:
            group.queue = NOWHERE
            _discard_kept_kv(world, queues.live[k])
    queues.queue[i].pull_requested = 0


@kernel
def _fail(world: World, i: int) -> None:
    """The instance goes down: its requests return to their groups without KV, its groups lose their queue."""
    fleet, requests = world.fleet, world.requests
    engine = fleet.engine[i]
    catch_up(fleet, i, world.clock[0].now_s)
    end_blocking(world, i)
    for slot in range(engine.num_running - 1, -1, -1):
        # The step in progress is lost; blocks need no books, the GPU starts empty.
        r = release(fleet, requests, i, slot, 0)
        drop_kv(requests, r)
        return_to_group(world, r)
    _return_engine_queue(world, i)
    disband_queue(world, i)
    power_off(fleet, i, world.clock[0].now_s)
    record(world, FAIL, i, NOWHERE, 0)


@kernel
def _failure_event(world: World) -> None:
    clock = world.clock[0]
    failure = world.failures[clock.next_failure]
    clock.next_failure += 1
    engine = world.fleet.engine[failure.instance]
    if failure.up and not engine.up:
        engine.up = 1
        record(world, RECOVER, failure.instance, NOWHERE, 0)
    elif not failure.up and engine.up:
        _fail(world, failure.instance)


@compiled
def advance(world: World, until_s: float, stop_at_epoch: bool) -> int:
    """Let time pass up to ``until_s``, or to the next decision epoch if that is sooner and asked for.

    The time reached is ``clock.now_s``; every event up to and including it has happened, and every engine's
    books stand at its last whole step.

    Returns:
        the epoch's reasons as bits (0 when ``until_s`` was reached); LOG_FULL asks to empty the log and go on.
    """
    fleet, requests = world.fleet, world.requests
    clock = world.clock[0]
    num_instances = len(fleet.engine)
    epoch = 0
    for i in range(num_instances):
        # What this pulls is the effect of the decision just taken, not news that calls for another.
        poke(world, i)
    while clock.finished + clock.rejected < len(requests):
        arrival_s = requests[clock.next_arrival].arrival_s if clock.next_arrival < len(requests) else NEVER
        failure_s = world.failures[clock.next_failure].time_s if clock.next_failure < len(world.failures) else NEVER
        engine_s = NEVER
        stage_s = NEVER
        busy = 0
        staging = 0
        for i in range(num_instances):
            if fleet.engine[i].next_event_s < engine_s:
                engine_s = fleet.engine[i].next_event_s
                busy = i
            if fleet.engine[i].stage_end_s < stage_s:
                stage_s = fleet.engine[i].stage_end_s
                staging = i
        event_s = min(arrival_s, failure_s, engine_s, stage_s)
        if epoch and stop_at_epoch and event_s > clock.now_s:
            break
        if event_s > until_s or event_s == NEVER:
            clock.now_s = max(clock.now_s, until_s)
            break
        if world.logging and clock.events + 4 * fleet.max_num_seqs > len(world.log):
            epoch = epoch | LOG_FULL if stop_at_epoch else LOG_FULL
            break
        clock.now_s = max(clock.now_s, event_s)
        if failure_s == event_s:
            _failure_event(world)
            epoch |= INSTANCE_CHANGED
        elif arrival_s == event_s:
            epoch |= _arrive(world)
        elif stage_s == event_s:
            record(world, WARM_END, staging, fleet.engine[staging].stage_target, 0)
            finish_staging(fleet, staging, clock.now_s)
            epoch |= MODEL_READY
        else:
            epoch |= _engine_event(world, busy)
    for i in range(num_instances):
        catch_up(fleet, i, clock.now_s)
    settle_up_to_now(world)
    return epoch


# --------------------------------------------------------------------------- LSOs
@inlined
def balance(world: World, g: int, i: int, front: bool) -> None:
    """Put a group into a virtual queue; KV kept at another host is dropped."""
    if world.queues.group[g].queue != i:
        _discard_kept_kv(world, g)
    place(world.queues, g, i, front)
    record(world, BALANCE, i, g, world.queues.group[g].waiting)


@kernel
def stage(world: World, i: int, model: int) -> None:
    """Begin a warm start."""
    start_staging(world.fleet, i, model, world.clock[0].now_s)
    record(world, WARM_BEGIN, i, model, 0)


@compiled
def find_unservable(world: World) -> None:
    """Mark, before the episode, the requests that can never run; they are rejected on arrival."""
    fleet, requests = world.fleet, world.requests
    for r in range(len(requests)):
        request = requests[r]
        reason = NO_INSTANCE
        for i in range(len(fleet.engine)):
            if not fits(fleet, i, request.model):
                continue
            reason = TOO_LONG
            if can_ever_run(fleet, requests, i, r):
                reason = NOT_REJECTED
                break
        request.reject_reason = reason
