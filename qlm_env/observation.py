"""What a policy sees: fixed-size float32 arrays in [-1, 1], built only from what a real cluster can know.

Rows of ``groups`` are the groups with waiting requests, most urgent first: by the deadline of their first waiting
request, then by age of the group. Groups beyond the last row are summed up in it, never dropped. Never output
lengths: expected output is the mean of finished requests of the same model, class and length cluster, with a prior.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from qlm_env.backends.emulator.state import HOST, NO_EVICTION
from qlm_env.compiled import inlined, kernel
from qlm_env.dynamics import World
from qlm_env.features import CLUSTER_FEATURES, GROUP_FEATURES, INSTANCE_FEATURES, width
from qlm_env.requests import NOWHERE, Byte, Int, Records

Float32 = NDArray[np.float32]

PRIOR_OUTPUT_TOKENS = 256.0
PRIOR_REQUESTS = 8.0
"""Weight of the prior, in finished requests."""

LOG_4096, LOG_36000, LOG_65536 = math.log1p(4096.0), math.log1p(36000.0), math.log1p(65536.0)
"""What logarithms of counts and seconds are scaled by."""

LOG_OF_COUNT = np.array([math.log1p(count) for count in range(256)])
"""log1p of small counts, of which an observation has dozens."""


def observation_space(num_rows: int, num_instances: int, num_models: int, num_classes: int) -> spaces.Dict:
    """The observation space: G = ``num_rows`` groups, I instances; masks are 1 where a row is real."""

    def box(low: float, *shape: int) -> spaces.Box[np.float32]:
        return spaces.Box(low, 1.0, shape, np.float32)

    return spaces.Dict(
        {
            "groups": box(-1.0, num_rows, width(GROUP_FEATURES, num_models, num_classes)),
            "group_mask": box(0.0, num_rows),
            "instances": box(-1.0, num_instances, width(INSTANCE_FEATURES, num_models, num_classes)),
            "instance_mask": box(0.0, num_instances),
            "cluster": box(-1.0, width(CLUSTER_FEATURES, num_models, num_classes)),
        }
    )


class Panel(NamedTuple):
    """What a policy sees of a world and may do in it, in arrays that are filled anew at every decision.

    G rows of groups, I instances, n actions, N requests.
    """

    groups: Float32
    """(G, F)"""
    group_mask: Float32
    """(G,)"""
    instances: Float32
    """(I, F)"""
    instance_mask: Float32
    """(I,)"""
    cluster: Float32
    """(F,)"""
    row_groups: Int
    """(G,) the group of each row; NOWHERE for padding and for a row that sums up several groups"""
    action_mask: Byte
    """(n,) 1 for what is legal, in the order of :class:`qlm_env.lso.ActionCodec`"""
    order: Int
    """(N,) scratch"""
    urgency: NDArray[np.float64]
    """(N,) scratch"""

    def observation(self) -> dict[str, Float32]:
        """A copy of the observation arrays, in the order of the observation space."""
        return {
            "cluster": self.cluster.copy(),
            "group_mask": self.group_mask.copy(),
            "groups": self.groups.copy(),
            "instance_mask": self.instance_mask.copy(),
            "instances": self.instances.copy(),
        }


def make_panel(space: spaces.Dict, num_requests: int, num_actions: int) -> Panel:
    """A panel to fill, for observations of ``space``."""
    arrays = {name: np.zeros(box.shape or (), np.float32) for name, box in space.items()}
    return Panel(
        **arrays,
        row_groups=np.full(len(arrays["groups"]), NOWHERE, np.int32),
        action_mask=np.zeros(num_actions, np.int8),
        order=np.zeros(num_requests, np.int32),
        urgency=np.zeros(num_requests),
    )


# --------------------------------------------------------------------------- kernels
@inlined
def _unit(x: float) -> float:
    return min(1.0, max(-1.0, x))


@inlined
def _log(x: float, full: float) -> float:
    return min(1.0, np.log1p(x) / full)


@inlined
def _log_of_count(count: int, full: float) -> float:
    return min(1.0, (LOG_OF_COUNT[count] if count < len(LOG_OF_COUNT) else np.log1p(count)) / full)


@inlined
def expected_output_tokens(kind: Records) -> float:
    """Mean output length of finished requests of a (model, class, length cluster), shrunk towards the prior."""
    return (PRIOR_OUTPUT_TOKENS * PRIOR_REQUESTS + kind.output_tokens) / (PRIOR_REQUESTS + kind.finished)


@inlined
def _expected_output_tokens(world: World, g: int) -> float:
    group = world.queues.group[g]
    return expected_output_tokens(world.queues.kind[group.model, group.slo_class, group.cluster])


@inlined
def _slack(world: World, r: int) -> float:
    request = world.requests[r]
    target_s = world.slo[request.slo_class].target_s
    return _unit((request.arrival_s + target_s - world.clock[0].now_s) / target_s)


@inlined
def _position(world: World, g: int) -> int:
    ahead = 0
    while world.queues.group[g].previous != NOWHERE:
        g = world.queues.group[g].previous
        ahead += 1
    return ahead


@inlined
def _observe_group(world: World, g: int, row: Float32) -> None:
    group = world.queues.group[g]
    num_instances, num_models = world.fleet.placement.shape
    num_classes = len(world.slo)
    row[group.model] = 1.0
    row[num_models + group.slo_class] = 1.0
    f = num_models + num_classes
    row[f] = _log_of_count(group.waiting, LOG_4096)
    row[f + 1] = _log_of_count(group.in_engine, LOG_4096)
    row[f + 2] = _unit(group.prompt_tokens / group.waiting / 4096.0)
    row[f + 3] = _unit(_expected_output_tokens(world, g) / 4096.0)
    row[f + 4] = _slack(world, group.head)
    row[f + 5] = _slack(world, group.tail)
    row[f + 6] = _log(world.slo[group.slo_class].target_s, LOG_36000)
    if group.queued:
        row[f + 7] = 1.0
        row[f + 8] = (group.queue + 1.0) / num_instances
        row[f + 9] = 1.0 / (1.0 + _position(world, g))
    row[f + 10] = world.requests[group.head].kv_host != NOWHERE


@kernel
def _observe_rest(world: World, groups: Int, row: Float32) -> None:
    """The last row, summing up several groups: means weighted by waiting requests, slack of the most urgent."""
    num_models = world.fleet.placement.shape[1]
    f = num_models + len(world.slo)
    waiting = 0.0
    in_engine = 0.0
    prompt_tokens = 0.0
    output_tokens = 0.0
    for g in groups:
        group = world.queues.group[g]
        waiting += group.waiting
        in_engine += group.in_engine
        prompt_tokens += group.prompt_tokens
        output_tokens += group.waiting * _expected_output_tokens(world, g)
    last = len(groups) - 1
    for g in groups:
        group = world.queues.group[g]
        row[group.model] += group.waiting / waiting
        row[num_models + group.slo_class] += group.waiting / waiting
        row[f + 6] += _log(world.slo[group.slo_class].target_s, LOG_36000) * group.waiting / waiting
        row[f + 7] += group.queued * group.waiting / waiting
    for column in range(f + 8):
        row[column] = _unit(row[column])
    row[f] = _log(waiting, LOG_4096)
    row[f + 1] = _log(in_engine, LOG_4096)
    row[f + 2] = _unit(prompt_tokens / waiting / 4096.0)
    row[f + 3] = _unit(output_tokens / waiting / 4096.0)
    row[f + 4] = _slack(world, world.queues.group[groups[0]].head)
    row[f + 5] = _slack(world, world.queues.group[groups[last]].tail)
    row[f + 11] = _log(len(groups) - 1.0, LOG_4096)


@inlined
def _observe_instance(world: World, i: int, row: Float32) -> None:
    engine = world.fleet.engine[i]
    queue = world.queues.queue[i]
    num_models = world.fleet.placement.shape[1]
    now_s = world.clock[0].now_s
    row[0] = engine.up
    loading = engine.swap_target if engine.swap_target != NOWHERE else engine.pending_swap
    for m in range(num_models):
        row[1 + m] = engine.active_model == m
        row[1 + num_models + m] = loading == m
        row[1 + 2 * num_models + m] = world.fleet.placement[i, m].residency == HOST
        row[1 + 3 * num_models + m] = engine.stage_target == m
        row[1 + 4 * num_models + m] = world.fleet.placement[i, m].num_blocks > 0
    f = 1 + 5 * num_models
    if engine.swap_target != NOWHERE:
        row[f] = _unit((engine.next_event_s - now_s) / 100.0)
    if engine.stage_target != NOWHERE:
        row[f + 1] = _unit((engine.stage_end_s - now_s) / 100.0)
    foreign = 0
    for slot in range(engine.num_running):
        foreign += world.requests[world.fleet.slot[i, slot].request].group != queue.head
    row[f + 2] = engine.num_running / world.fleet.max_num_seqs
    row[f + 3] = foreign / world.fleet.max_num_seqs
    row[f + 4] = engine.first_prefill < engine.num_running
    if engine.active_model != NOWHERE:
        placement = world.fleet.placement[i, engine.active_model]
        row[f + 5] = 1.0 - engine.free_blocks / placement.num_blocks
        decode_s = placement.c0 + placement.c1 * 32.0 + placement.c3 * 32.0 * 512.0 + placement.c5 * 32.0
        row[f + 14] = _unit(decode_s / 0.1)
    row[f + 6] = _log_of_count(engine.queue_length, LOG_4096)
    row[f + 7] = _log_of_count(queue.groups, LOG_4096)
    row[f + 8] = _log_of_count(queue.waiting, LOG_4096)
    row[f + 9] = 1.0
    if queue.head != NOWHERE:
        head = world.queues.group[queue.head]
        row[f + 9] = _slack(world, head.head)
        row[f + 10] = head.model == engine.active_model
    row[f + 11] = engine.pending_eviction != NO_EVICTION
    if engine.host_memory_bytes > 0:
        row[f + 12] = engine.host_used_bytes / engine.host_memory_bytes
    if engine.host_kv_bytes > 0:
        row[f + 13] = _unit(engine.host_kv_used_bytes / engine.host_kv_bytes)


@inlined
def observe(world: World, panel: Panel) -> None:
    """Fill the panel's observation arrays and ``row_groups``."""
    groups, row_groups, cluster = panel.groups, panel.row_groups, panel.cluster
    order, urgency = panel.order, panel.urgency
    queues = world.queues
    groups[:] = 0.0
    panel.group_mask[:] = 0.0
    panel.instances[:] = 0.0
    panel.instance_mask[:] = 1.0
    cluster[:] = 0.0
    row_groups[:] = NOWHERE
    count = 0
    waiting = 0
    unqueued = 0
    for k in range(queues.tally[0].live):
        g = queues.live[k]
        group = queues.group[g]
        if group.waiting > 0:
            order[count] = g
            urgency[g] = world.requests[group.head].arrival_s + world.slo[group.slo_class].target_s
            count += 1
            waiting += group.waiting
            unqueued += group.queued == 0
    _sort_by_urgency(order, urgency, count)
    num_rows = len(row_groups)
    alone = count if count <= num_rows else num_rows - 1
    for row in range(alone):
        _observe_group(world, order[row], groups[row])
        panel.group_mask[row] = 1.0
        row_groups[row] = order[row]
    if alone < count:
        _observe_rest(world, order[alone:count], groups[num_rows - 1])
        panel.group_mask[num_rows - 1] = 1.0
    running = 0
    up = 0
    for i in range(len(world.fleet.engine)):
        _observe_instance(world, i, panel.instances[i])
        running += world.fleet.engine[i].num_running
        up += world.fleet.engine[i].up
    clock = world.clock[0]
    cluster[0] = _log_of_count(waiting, LOG_65536)
    cluster[1] = _log_of_count(running, LOG_65536)
    cluster[2] = _log_of_count(count, LOG_4096)
    cluster[3] = _log_of_count(unqueued, LOG_4096)
    cluster[4] = _log_of_count(clock.settled, LOG_65536)
    cluster[5] = clock.met / max(1, clock.settled)
    cluster[6] = up / len(world.fleet.engine)


@kernel
def _before(order_a: int, order_b: int, urgency: NDArray[np.float64]) -> bool:
    if urgency[order_a] != urgency[order_b]:
        return urgency[order_a] < urgency[order_b]
    return order_a < order_b


@kernel
def _sort_by_urgency(order: Int, urgency: NDArray[np.float64], count: int) -> None:
    """Heap sort of ``order[:count]``: in place, no allocation, ties by group id."""
    for start in range(count // 2 - 1, -1, -1):
        _sift(order, urgency, start, count)
    for end in range(count - 1, 0, -1):
        order[0], order[end] = order[end], order[0]
        _sift(order, urgency, 0, end)


@kernel
def _sift(order: Int, urgency: NDArray[np.float64], start: int, end: int) -> None:
    root = start
    while 2 * root + 1 < end:
        child = 2 * root + 1
        if child + 1 < end and _before(order[child], order[child + 1], urgency):
            child += 1
        if not _before(order[root], order[child], urgency):
            return
        order[root], order[child] = order[child], order[root]
        root = child
