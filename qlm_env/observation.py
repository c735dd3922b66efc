"""What a policy sees: fixed-size float32 arrays in [-1, 1], built only from what a real cluster can know.

Rows of ``groups`` are the groups with waiting requests, most urgent first: by the deadline of their first waiting
request, then by age of the group. Groups beyond the last row are summed up in it, never dropped. Never output
lengths: expected output is the mean of finished requests of the same model and class, with a prior.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from qlm_env.backends.emulator.state import HOST, NO_EVICTION
from qlm_env.compiled import kernel
from qlm_env.dynamics import World
from qlm_env.requests import NOWHERE, Byte, Int, Records

Float32 = NDArray[np.float32]

PRIOR_OUTPUT_TOKENS = 256.0
PRIOR_REQUESTS = 8.0
"""Weight of the prior, in finished requests."""


class Feature(NamedTuple):
    """One entry of the feature table in the documentation. ``width`` is 1, or "M" / "C" for one-hot codes."""

    name: str
    width: int | str
    unit: str
    scaling: str
    meaning: str


GROUP_FEATURES = (
    Feature("model", "M", "-", "one-hot", "the group's model"),
    Feature("slo_class", "C", "-", "one-hot", "the group's SLO class"),
    Feature("waiting", 1, "requests", "log1p(x)/log1p(4096)", "requests waiting in the group"),
    Feature("in_engine", 1, "requests", "log1p(x)/log1p(4096)", "requests of the group inside an engine"),
    Feature("prompt_tokens", 1, "tokens", "x/4096", "mean prompt length of the waiting requests"),
    Feature("output_tokens", 1, "tokens", "x/4096", "expected output length (finished requests, prior of 256)"),
    Feature("slack", 1, "target", "x", "time to the deadline of the first waiting request, over its target"),
    Feature("last_slack", 1, "target", "x", "the same of the last waiting request"),
    Feature("target_s", 1, "s", "log1p(x)/log1p(36000)", "the class's latency target"),
    Feature("queued", 1, "-", "0 or 1", "is in a virtual queue"),
    Feature("queue", 1, "-", "(i+1)/I", "instance of that queue, 0 when in none"),
    Feature("position", 1, "groups", "1/(1+x)", "groups ahead in that queue, 0 when in none"),
    Feature("kept_kv", 1, "-", "0 or 1", "its first waiting request has KV in host memory"),
    Feature("aggregate", 1, "groups", "log1p(x)/log1p(4096)", "groups summed up in this row beyond the first"),
)

INSTANCE_FEATURES = (
    Feature("up", 1, "-", "0 or 1", "not failed"),
    Feature("active_model", "M", "-", "one-hot", "model on the GPU"),
    Feature("swap_target", "M", "-", "one-hot", "model being loaded, or waiting for the batch to drain"),
    Feature("warm", "M", "-", "0 or 1", "models in host memory"),
    Feature("staging", "M", "-", "one-hot", "model being staged into host memory"),
    Feature("fits", "M", "-", "0 or 1", "models the instance can serve"),
    Feature("loading_left", 1, "s", "x/100", "time until the model being loaded is ready"),
    Feature("staging_left", 1, "s", "x/100", "time until the model being staged is warm"),
    Feature("running", 1, "requests", "x/max_num_seqs", "requests in the batch"),
    Feature(
        "foreign", 1, "requests", "x/max_num_seqs", "of those, not of the head group: what an eviction would remove"
    ),
    Feature("prefilling", 1, "-", "0 or 1", "a prefill is in progress"),
    Feature("kv_used", 1, "blocks", "x/num_blocks", "KV cache in use"),
    Feature("engine_queue", 1, "requests", "log1p(x)/log1p(4096)", "preempted requests in the engine's own queue"),
    Feature("queue_groups", 1, "groups", "log1p(x)/log1p(4096)", "groups in the virtual queue"),
    Feature("queue_waiting", 1, "requests", "log1p(x)/log1p(4096)", "requests waiting in the virtual queue"),
    Feature("head_slack", 1, "target", "x", "slack of the head group's first request, 1 when empty"),
    Feature("head_active", 1, "-", "0 or 1", "the head group's model is active"),
    Feature("evicting", 1, "-", "0 or 1", "an eviction is carried out at the end of the step"),
    Feature("host_memory", 1, "bytes", "share", "host memory for weights in use"),
    Feature("host_kv", 1, "bytes", "share", "host memory for KV in use"),
    Feature("decode_s", 1, "s", "x/0.1", "time of a decode step of 32 sequences of 512 tokens (active model)"),
)

CLUSTER_FEATURES = (
    Feature("waiting", 1, "requests", "log1p(x)/log1p(65536)", "requests waiting anywhere"),
    Feature("running", 1, "requests", "log1p(x)/log1p(65536)", "requests in batches"),
    Feature("groups", 1, "groups", "log1p(x)/log1p(4096)", "groups with waiting requests"),
    Feature("unqueued", 1, "groups", "log1p(x)/log1p(4096)", "of those, in no virtual queue"),
    Feature("settled", 1, "requests", "log1p(x)/log1p(65536)", "requests whose outcome is certain"),
    Feature("attainment", 1, "-", "share", "of those, met"),
    Feature("instances_up", 1, "-", "share", "instances that are up"),
)


def width(features: tuple[Feature, ...], num_models: int, num_classes: int) -> int:
    """Columns of a feature table."""
    sizes: dict[int | str, int] = {"M": num_models, "C": num_classes}
    return sum(sizes.get(feature.width, 1) for feature in features)


def observation_space(num_rows: int, num_instances: int, num_models: int, num_classes: int) -> spaces.Dict:
    """The observation space: G = ``num_rows`` groups, I instances; masks are 1 where a row is real."""

    def box(low: float, *shape: int) -> spaces.Box[np.float32]:
        return spaces.Box(low, 1.0, shape, np.float32)

    def columns(features: tuple[Feature, ...]) -> int:
        return width(features, num_models, num_classes)

    return spaces.Dict(
        {
            "groups": box(-1.0, num_rows, columns(GROUP_FEATURES)),
            "group_mask": box(0.0, num_rows),
            "instances": box(-1.0, num_instances, columns(INSTANCE_FEATURES)),
            "instance_mask": box(0.0, num_instances),
            "cluster": box(-1.0, columns(CLUSTER_FEATURES)),
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
@kernel
def _unit(x: float) -> float:
    return min(1.0, max(-1.0, x))


@kernel
def _log(x: float, scale: float) -> float:
    return min(1.0, np.log1p(x) / np.log1p(scale))


@kernel
def expected_output_tokens(kind: Records) -> float:
    """Mean output length of finished requests of a (model, class), shrunk towards the prior."""
    return (PRIOR_OUTPUT_TOKENS * PRIOR_REQUESTS + kind.output_tokens) / (PRIOR_REQUESTS + kind.finished)


@kernel
def _slack(world: World, r: int) -> float:
    request = world.requests[r]
    target_s = world.slo[request.slo_class].target_s
    return _unit((request.arrival_s + target_s - world.clock[0].now_s) / target_s)


@kernel
def _position(world: World, g: int) -> int:
    ahead = 0
    while world.queues.group[g].previous != NOWHERE:
        g = world.queues.group[g].previous
        ahead += 1
    return ahead


@kernel
def _observe_group(world: World, g: int, row: Float32) -> None:
    group = world.queues.group[g]
    num_instances, num_models = world.fleet.placement.shape
    num_classes = len(world.slo)
    row[group.model] = 1.0
    row[num_models + group.slo_class] = 1.0
    f = num_models + num_classes
    row[f] = _log(group.waiting, 4096.0)
    row[f + 1] = _log(group.in_engine, 4096.0)
    row[f + 2] = _unit(group.prompt_tokens / group.waiting / 4096.0)
    row[f + 3] = _unit(expected_output_tokens(world.queues.kind[group.model, group.slo_class]) / 4096.0)
    row[f + 4] = _slack(world, group.head)
    row[f + 5] = _slack(world, group.tail)
    row[f + 6] = _log(world.slo[group.slo_class].target_s, 36000.0)
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
        output_tokens += group.waiting * expected_output_tokens(world.queues.kind[group.model, group.slo_class])
    last = len(groups) - 1
    for g in groups:
        group = world.queues.group[g]
        row[group.model] += group.waiting / waiting
        row[num_models + group.slo_class] += group.waiting / waiting
        row[f + 6] += _log(world.slo[group.slo_class].target_s, 36000.0) * group.waiting / waiting
        row[f + 7] += group.queued * group.waiting / waiting
    for column in range(f + 8):
        row[column] = _unit(row[column])
    row[f] = _log(waiting, 4096.0)
    row[f + 1] = _log(in_engine, 4096.0)
    row[f + 2] = _unit(prompt_tokens / waiting / 4096.0)
    row[f + 3] = _unit(output_tokens / waiting / 4096.0)
    row[f + 4] = _slack(world, world.queues.group[groups[0]].head)
    row[f + 5] = _slack(world, world.queues.group[groups[last]].tail)
    row[f + 11] = _log(len(groups) - 1.0, 4096.0)


@kernel
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
    row[f + 6] = _log(engine.queue_length, 4096.0)
    row[f + 7] = _log(queue.groups, 4096.0)
    row[f + 8] = _log(queue.waiting, 4096.0)
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


@kernel
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
    cluster[0] = _log(waiting, 65536.0)
    cluster[1] = _log(running, 65536.0)
    cluster[2] = _log(count, 4096.0)
    cluster[3] = _log(unqueued, 4096.0)
    cluster[4] = _log(clock.settled, 65536.0)
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


def feature_tables() -> str:
    """The documentation's tables of features, as Markdown."""
    lines = []
    for title, features in (
        ("groups", GROUP_FEATURES),
        ("instances", INSTANCE_FEATURES),
        ("cluster", CLUSTER_FEATURES),
    ):
        lines += [f"### `{title}`", "", "| feature | columns | unit | scaling | meaning |", "|---|---|---|---|---|"]
        lines += [f"| {f.name} | {f.width} | {f.unit} | {f.scaling} | {f.meaning} |" for f in features]
        lines.append("")
    return "\n".join(lines)
