"""Request groups: waiting requests alike in model and SLO class, first come first served inside.

A group takes arrivals until it holds its model's ``max_members`` or its first request enters an engine;
then the next arrival opens another. Ids are never used again, so a plan that names a group stays
meaningful for as long as the group lives.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qlm_env.compiled import kernel
from qlm_env.requests import NOWHERE, WAITING, Int, Records, RequestTable

GROUP_DTYPE = np.dtype(
    [
        ("created_s", "f8"),
        ("prompt_tokens", "i8"),  # of the waiting requests, summed
        ("model", "i4"),
        ("slo_class", "i4"),
        ("head", "i4"),  # first waiting request
        ("tail", "i4"),
        ("waiting", "i4"),  # requests waiting in the group
        ("in_engine", "i4"),  # requests of the group inside an engine
        ("members", "i4"),  # requests that ever joined
        ("queue", "i4"),  # instance whose virtual queue it is (or was last) in, or NOWHERE
        ("previous", "i4"),  # neighbours in the virtual queue
        ("next", "i4"),
        ("live_index", "i4"),  # position in `live`, or NOWHERE
        ("queued", "i1"),  # linked into the virtual queue
        ("closed", "i1"),  # takes no more arrivals
    ],
    align=True,
)

QUEUE_DTYPE = np.dtype(
    [
        ("head", "i4"),
        ("tail", "i4"),
        ("groups", "i4"),
        ("waiting", "i4"),  # requests waiting in its groups
        ("blocked_since_s", "f8"),  # the next request waits for room a less urgent one holds; inf when not so
        ("pull_requested", "i1"),  # a `pull` to carry out at the end of the step
    ],
    align=True,
)

KIND_DTYPE = np.dtype(
    [
        ("open_group", "i4"),  # the group that takes arrivals, or NOWHERE
        ("max_members", "i4"),  # size at which a group closes
        ("arrived", "i8"),
        # Of finished requests: all a policy may know of output lengths.
        ("finished", "i8"),
        ("output_tokens", "f8"),
        ("output_tokens_squared", "f8"),
    ],
    align=True,
)
"""One (model, SLO class) pair."""

TALLY_DTYPE = np.dtype([("groups", "i8"), ("live", "i8")], align=True)


class Queues(NamedTuple):
    """Groups and virtual queues of a cluster. N requests (at most as many groups), I instances, M models, C classes."""

    group: Records
    """(N,) GROUP_DTYPE"""
    queue: Records
    """(I,) QUEUE_DTYPE"""
    live: Int
    """(N,) ids of the groups with unfinished requests, the first ``tally.live`` of them"""
    kind: Records
    """(M, C) KIND_DTYPE"""
    tally: Records
    """(1,) TALLY_DTYPE"""


def make_queues(num_requests: int, num_instances: int, num_classes: int, max_members: Int) -> Queues:
    """Empty queues.

    Args:
        max_members: (M,) the size at which a model's group closes, at least 1.
    """
    num_models = len(max_members)
    queue = np.zeros(num_instances, QUEUE_DTYPE).view(np.recarray)
    queue["head"] = queue["tail"] = NOWHERE
    queue["blocked_since_s"] = np.inf
    kind = np.zeros((num_models, num_classes), KIND_DTYPE).view(np.recarray)
    kind["open_group"] = NOWHERE
    kind["max_members"] = max_members[:, None]
    return Queues(
        group=np.zeros(num_requests, GROUP_DTYPE).view(np.recarray),
        queue=queue,
        live=np.zeros(num_requests, np.int32),
        kind=kind,
        tally=np.zeros(1, TALLY_DTYPE).view(np.recarray),
    )


@kernel
def _open(queues: Queues, model: int, slo_class: int, now_s: float) -> int:
    tally = queues.tally[0]
    g = tally.groups
    tally.groups += 1
    group = queues.group[g]
    group.created_s = now_s
    group.model = model
    group.slo_class = slo_class
    group.head = NOWHERE
    group.tail = NOWHERE
    group.queue = NOWHERE
    group.previous = NOWHERE
    group.next = NOWHERE
    group.live_index = tally.live
    queues.live[tally.live] = g
    tally.live += 1
    queues.kind[model, slo_class].open_group = g
    return g


@kernel
def close(queues: Queues, g: int) -> None:
    """The group takes no more arrivals."""
    group = queues.group[g]
    group.closed = 1
    if queues.kind[group.model, group.slo_class].open_group == g:
        queues.kind[group.model, group.slo_class].open_group = NOWHERE


@kernel
def join(queues: Queues, requests: RequestTable, r: int, now_s: float) -> bool:
    """An arriving request joins the open group of its model and class, or opens one.

    Returns:
        whether a new group was formed.
    """
    request = requests[r]
    g = queues.kind[request.model, request.slo_class].open_group
    formed = g == NOWHERE
    if formed:
        g = _open(queues, request.model, request.slo_class, now_s)
    group = queues.group[g]
    request.state = WAITING
    request.group = g
    request.next = NOWHERE
    if group.tail == NOWHERE:
        group.head = r
    else:
        requests[group.tail].next = r
    group.tail = r
    group.waiting += 1
    group.members += 1
    group.prompt_tokens += request.prompt_tokens
    if group.queued:
        queues.queue[group.queue].waiting += 1
    if group.members >= queues.kind[request.model, request.slo_class].max_members:
        close(queues, g)
    queues.kind[request.model, request.slo_class].arrived += 1
    return bool(formed)


@kernel
def take_first(queues: Queues, requests: RequestTable, g: int) -> int:
    """The group's first waiting request goes to an engine; the group is closed from then on."""
    group = queues.group[g]
    r = group.head
    group.head = requests[r].next
    if group.head == NOWHERE:
        group.tail = NOWHERE
    requests[r].next = NOWHERE
    group.waiting -= 1
    group.in_engine += 1
    group.prompt_tokens -= requests[r].prompt_tokens
    if group.queued:
        queues.queue[group.queue].waiting -= 1
    if not group.closed:
        close(queues, g)
    return r


@kernel
def give_back(queues: Queues, requests: RequestTable, r: int) -> None:
    """A request comes back from an engine to its group, in order of arrival."""
    request = requests[r]
    group = queues.group[request.group]
    previous = NOWHERE
    cursor = group.head
    while cursor != NOWHERE and cursor < r:
        previous = cursor
        cursor = requests[cursor].next
    request.next = cursor
    request.instance = NOWHERE
    request.state = WAITING
    if previous == NOWHERE:
        group.head = r
    else:
        requests[previous].next = r
    if cursor == NOWHERE:
        group.tail = r
    group.waiting += 1
    group.in_engine -= 1
    group.prompt_tokens += request.prompt_tokens
    if group.queued:
        queues.queue[group.queue].waiting += 1


@kernel
def note_finished(queues: Queues, requests: RequestTable, r: int) -> None:
    """A request of an engine finished: count it, and retire its group when it was the last."""
    request = requests[r]
    group = queues.group[request.group]
    group.in_engine -= 1
    kind = queues.kind[request.model, request.slo_class]
    kind.finished += 1
    kind.output_tokens += request.output_tokens
    kind.output_tokens_squared += float(request.output_tokens) * request.output_tokens
    if group.waiting == 0 and group.in_engine == 0 and group.closed:
        tally = queues.tally[0]
        tally.live -= 1
        last = queues.live[tally.live]
        queues.live[group.live_index] = last
        queues.group[last].live_index = group.live_index
        group.live_index = NOWHERE
