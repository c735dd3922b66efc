"""What happens to the queues, one thing at a time: the compiled rules of :mod:`.dynamics` for callers in Python.

Each call passes a whole world, which costs some fifty microseconds: nothing where engines are real, and far too much
where they are emulated in the same process.
"""

from __future__ import annotations

from qlm_env.compiled import compiled
from qlm_env.dynamics import (
    FAIL,
    World,
    disband_queue,
    end_blocking,
    finish,
    receive,
    record,
    return_to_group,
    runs_less_urgent,
    settle_up_to_now,
    take_from_head,
)
from qlm_env.requests import NOWHERE


@compiled
def note(world: World, kind: int, i: int, subject: int, count: int) -> None:
    """Append to the event log."""
    record(world, kind, i, subject, count)


@compiled
def request_arrives(world: World) -> bool:
    """The next request joins a group or is rejected; whether a new group formed."""
    return receive(world)


@compiled
def request_is_pulled(world: World, i: int) -> bool:
    """The first request of instance ``i``'s head group goes to the engine; whether that empties the group."""
    return take_from_head(world, i)


@compiled
def request_finished(world: World, r: int) -> None:
    """The request left its engine with all its tokens."""
    finish(world, r)


@compiled
def request_returned(world: World, r: int) -> None:
    """The request left its engine unfinished, for its group, which goes behind the head of its queue."""
    return_to_group(world, r)


@compiled
def instance_failed(world: World, i: int) -> None:
    """The instance is down, and its requests have been returned: its groups lose their queue."""
    end_blocking(world, i)
    disband_queue(world, i)
    record(world, FAIL, i, NOWHERE, 0)


@compiled
def uncomputed_tokens(world: World, i: int) -> int:
    """Tokens of the requests in the engine that it has yet to compute before it generates more."""
    engine = world.fleet.engine[i]
    tokens = 0
    for slot in range(engine.first_prefill, engine.num_running):
        tokens += world.fleet.slot[i, slot].prefill_left
    r = engine.queue_head
    while r != NOWHERE:
        tokens += world.requests[r].prompt_tokens + world.requests[r].generated_tokens
        r = world.requests[r].next
    return tokens


@compiled
def watch_blocking(world: World, i: int, r: int) -> None:
    """Request ``r`` waits for room in the batch of instance ``i``, or none does (NOWHERE).

    It is blocked while a request with a longer target holds that room.
    """
    end_blocking(world, i)
    if r != NOWHERE and runs_less_urgent(world, i, r):
        world.queues.queue[i].blocked_since_s = world.clock[0].now_s


@compiled
def settle_outcomes(world: World) -> None:
    """Settle what was served by now, and as missed what should have been."""
    settle_up_to_now(world)
