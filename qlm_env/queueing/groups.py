"""Request groups: waiting requests alike in model, SLO class and length, first come first served inside.

A group takes arrivals until it holds its model's ``max_members`` or its first request enters an engine;
then the next arrival opens another. Ids are never used again, so a plan that names a group stays
meaningful for as long as the group lives.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qlm_env.compiled import kernel
from qlm_env.queueing.length_clusters import (
    LENGTH_DTYPE,
    MEMORY,
    MIN_ARRIVALS,
    NUM_BUCKETS,
    cluster_buckets,
    prompt_bucket,
)
from qlm_env.requests import NOWHERE, WAITING, Int, Records, RequestTable

GROUP_DTYPE = np.dtype(
    [
        ("created_s", "f8"),
        ("prompt_tokens", "i8"),  # of the waiting requests, summed
        ("model", "i4"),
        ("slo_class", "i4"),
        ("cluster", "i4"),  # by length
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
"""One (model, SLO class, length cluster)."""

TALLY_DTYPE = np.dtype([("groups", "i8"), ("live", "i8")], align=True)


class Queues(NamedTuple):
    """Groups and virtual queues of a cluster.

    N requests (at most as many groups), I instances, M models, C classes, L length clusters, B buckets of lengths.
    """

    group: Records
    """(N,) GROUP_DTYPE"""
    queue: Records
    """(I,) QUEUE_DTYPE"""
    live: Int
    """(N,) ids of the groups with unfinished requests, the first ``tally.live`` of them"""
    kind: Records
    """(M, C, L) KIND_DTYPE"""
    lengths: Records
    """(M, C, B) LENGTH_DTYPE"""
    tally: Records
    """(1,) TALLY_DTYPE"""


def make_queues(
    num_requests: int, num_instances: int, num_classes: int, max_members: Int, max_clusters: int = 1
) -> Queues:
    """Empty queues, with all lengths in one cluster.

    Args:
        max_members: (M,) the size at which a model's group closes, at least 1.
    """
    num_models = len(max_members)
    queue = np.zeros(num_instances, QUEUE_DTYPE).view(np.recarray)
    queue["head"] = queue["tail"] = NOWHERE
    queue["blocked_since_s"] = np.inf
    kind = np.zeros((num_models, num_classes, max_clusters), KIND_DTYPE).view(np.recarray)
    kind["open_group"] = NOWHERE
    kind["max_members"] = max_members[:, None, None]
    return Queues(
        group=np.zeros(num_requests, GROUP_DTYPE).view(np.recarray),
        queue=queue,
        live=np.zeros(num_requests, np.int32),
        kind=kind,
        lengths=np.zeros((num_models, num_classes, NUM_BUCKETS), LENGTH_DTYPE).view(np.recarray),
        tally=np.zeros(1, TALLY_DTYPE).view(np.recarray),
    )


@kernel
def _open(queues: Queues, model: int, slo_class: int, cluster: int, now_s: float) -> int:
    tally = queues.tally[0]
    g = tally.groups
    tally.groups += 1
    group = queues.group[g]
    group.created_s = now_s
    group.model = model
    group.slo_class = slo_class
    group.cluster = cluster
    group.head = NOWHERE
    group.tail = NOWHERE
    group.queue = NOWHERE
    group.previous = NOWHERE
    group.next = NOWHERE
    group.live_index = tally.live
    queues.live[tally.live] = g
    tally.live += 1
    queues.kind[model, slo_class, cluster].open_group = g
    return g


@kernel
def close(queues: Queues, g: int) -> None:
    """The group takes no more arrivals."""
    group = queues.group[g]
    group.closed = 1
    kind = queues.kind[group.model, group.slo_class, group.cluster]
    if kind.open_group == g:
        kind.open_group = NOWHERE


@kernel
def join(queues: Queues, requests: RequestTable, r: int, now_s: float) -> bool:
    """An arriving request joins the open group of its model, class and length, or opens one.

    Returns:
        whether a new group was formed.
    """
    request = requests[r]
    length = queues.lengths[request.model, request.slo_class, prompt_bucket(request.prompt_tokens)]
    length.arrived += 1
    length.recent += 1.0
    length.prompt_tokens += request.prompt_tokens
    kind = queues.kind[request.model, request.slo_class, length.cluster]
    kind.arrived += 1
    g = kind.open_group
    formed = g == NOWHERE
    if formed:
        g = _open(queues, request.model, request.slo_class, length.cluster, now_s)
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
    if group.members >= kind.max_members:
        close(queues, g)
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
    length = queues.lengths[request.model, request.slo_class, prompt_bucket(request.prompt_tokens)]
    length.finished += 1
    length.output_tokens += request.output_tokens
    length.output_tokens_squared += float(request.output_tokens) * request.output_tokens
    kind = queues.kind[request.model, request.slo_class, length.cluster]
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


def recluster(queues: Queues, min_variance_cut: float) -> None:
    """Find the length clusters anew, from the lengths seen so far, and let past arrivals weigh less next time.

    Groups stay as they are, under the cluster that their mean prompt is in now; where clusters have changed, they
    take no more arrivals.
    """
    num_models, num_classes, max_clusters = queues.kind.shape
    live = queues.live[: queues.tally["live"][0]]
    for model in range(num_models):
        for slo_class in range(num_classes):
            lengths = queues.lengths[model, slo_class]
            if lengths["recent"].sum() < MIN_ARRIVALS:
                continue
            cluster = cluster_buckets(lengths, max_clusters, min_variance_cut)
            if (cluster != lengths["cluster"]).any():
                lengths["cluster"] = cluster
                own = live[(queues.group["model"][live] == model) & (queues.group["slo_class"][live] == slo_class)]
                _regroup(queues, model, slo_class, own)
            lengths["recent"] *= MEMORY
            lengths["prompt_tokens"] *= MEMORY


def _regroup(queues: Queues, model: int, slo_class: int, live: Int) -> None:
    """Statistics and live groups of a model and class under its present clusters."""
    kind, lengths = queues.kind[model, slo_class], queues.lengths[model, slo_class]
    kind["open_group"] = NOWHERE
    for name in ("arrived", "finished", "output_tokens", "output_tokens_squared"):
        kind[name] = np.bincount(lengths["cluster"], lengths[name], len(kind))
    queues.group["closed"][live] = 1
    for g in live[queues.group["waiting"][live] > 0]:
        mean_tokens = queues.group["prompt_tokens"][g] / queues.group["waiting"][g]
        queues.group["cluster"][g] = lengths["cluster"][prompt_bucket(mean_tokens)]
