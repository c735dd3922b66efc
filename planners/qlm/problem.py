"""The planning problem at one decision epoch, as plain arrays.

K groups, I instances. A group's requests finish at ``wait + latency``: they wait for a place in the batch, one
admission interval for each request beyond a full batch, and a request's latency grows with the batch it runs in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from planners.qlm.crowding import crowding_cost
from planners.rwt import full_batch, remaining_s, service_of_batch
from planners.spec import QlmSpec
from qlm_env.view import ClusterView, GroupView, OutputStatistics

Float = NDArray[np.float64]
Int = NDArray[np.int32]
Flag = NDArray[np.bool_]

Outputs: TypeAlias = Callable[[ClusterView, GroupView], OutputStatistics]
"""What is known of the output lengths of a group's requests."""

MISS, LATENESS, CHANCE, POINT = range(4)
FORMS = {"miss": MISS, "lateness": LATENESS, "chance": CHANCE, "point": POINT}
"""What a request costs, by the name it has in settings; see :mod:`planners.qlm.cost`."""

FARTHEST_S = 1e9
"""Deadlines are at most so far away, so that differences of them stay numbers."""


class Problem(NamedTuple):
    """Times in seconds from now."""

    requests: Float
    """(K,) waiting requests of each group"""
    weight: Float
    """(K,) of one request; with LATENESS, of one request that is a second late"""
    delay_cost: Float
    """(K,) of one request finishing a second later while its SLO is safe"""
    first_slack_s: Float
    """(K,) time to the deadline of the group's first waiting request"""
    last_slack_s: Float
    """(K,) and of its last"""
    model: Int
    """(K,)"""
    output_cv: Float
    """(K,) coefficient of variation of output lengths"""
    allowed: Flag
    """(K, I) whether the instance may take the group: up, the model fits, not executing elsewhere"""
    interval_s: Float
    """(K, I) between admissions to a full batch"""
    batch: Float
    """(K, I) full batch"""
    latency_s: Float
    """(K, I) of one request alone in the batch"""
    latency_growth_s: Float
    """(K, I) and what each further request in the batch adds"""
    start_model: Int
    """(I,) model that new work finds, -1 for none"""
    ready_s: Float
    """(I,) time until it is loaded"""
    present: Float
    """(I,) requests in the batch"""
    drain_s: Float
    """(I,) time until the batch has drained, were nothing admitted"""
    evict_s: Float
    """(I,) to evict the batch, and again to take it up; inf where it must drain"""
    displaced_weight: Float
    """(I,) weight of the running requests together"""
    displaced_slack_s: Float
    """(I,) by how much they may be late to go on, the most urgent of them, if they are evicted"""
    displaced_delay_cost: Float
    """(I,) of all of them going on a second later"""
    load_s: Float
    """(I, M) to bring a model onto the GPU"""
    unload_s: Float
    """(I, M) to take it off"""
    idle_s: Float
    """(I,) time for which the instance has had nothing to do"""
    crowding_cost: Float
    """(K, I) of one request that joins the running batch, to those in it; see :mod:`planners.qlm.crowding`"""
    swap_cost: Float
    """(I,) requests' worth of one second in which an instance serves nothing"""
    hold_s: float
    """time that a group in no queue waits, at least: until it is looked at again, and for all other work"""
    form: int
    """MISS, LATENESS, CHANCE or POINT"""
    confidence: float
    """CHANCE: the probability with which a request must meet its deadline"""


DELAY_COST = 1.2e-3
"""Cost of one request finishing an SLO target later while its SLO is safe: enough to break ties, no more.

A delay counts by the share of the target that it takes: what waits now is overtaken by what comes later and is more
urgent, and the less room there is the sooner that becomes a miss. So of two orders that meet every SLO as far as can be
seen, the one by deadline is cheaper.
"""


def class_weights(view: ClusterView, spec: QlmSpec) -> Float:
    """(C,) weight of a request of each SLO class.

    Lateness counts in targets, so that an hour late for a target of an hour is as bad as a minute for a minute.
    """
    classes = view.scenario.slo.classes
    weight = np.array([c.weight for c in classes])
    return weight / np.array([c.target_s for c in classes]) if spec.cost == "lateness" else weight


def class_outputs(view: ClusterView, group: GroupView) -> OutputStatistics:
    """Finished requests of the same model, SLO class and length cluster, and the prior."""
    return view.group_output(group)


def make_problem(
    view: ClusterView, groups: list[GroupView], spec: QlmSpec, idle_s: Float, outputs: Outputs = class_outputs
) -> Problem:
    """The problem of ``groups`` (at least one) on the cluster as it is; ``idle_s`` (I,) as in :class:`Problem`."""
    instances = view.instances
    models = np.array([g.model for g in groups], np.int32)
    placement = view.placements[:, models].T
    expected = [outputs(view, g) for g in groups]
    prompt = np.array([g.mean_prompt_tokens for g in groups])[:, None]
    mean = np.array([o.mean_tokens for o in expected])[:, None]
    variance = np.array([o.variance_tokens2 for o in expected])[:, None]
    engine = view.scenario.cluster.engine
    batch = full_batch(engine, placement, prompt, mean, variance)
    full = service_of_batch(placement, batch, prompt, mean)
    alone = service_of_batch(placement, np.ones_like(batch), prompt, mean)
    fits = placement["num_blocks"] > 0
    movable = [g.movable and (spec.balance or not g.queued) for g in groups]
    up = np.array([i.up for i in instances])
    home = np.array([-1 if g.instance is None else g.instance for g in groups])
    allowed = fits & up & (np.array(movable)[:, None] | (home[:, None] == np.arange(len(instances))))
    serving = [i.serving_model for i in instances]
    steady = np.array([0.0 if i.coming_model is not None else 1.0 for i in instances])
    now_s = view.now_s
    drain_s = np.array([remaining_s(view, i) for i in instances])
    loading_s = np.array([i.loading_left_s for i in instances])
    rate = np.where(allowed, 1.0 / np.where(allowed, full.interval_s, 1.0), 0.0)
    requests = np.array([float(g.waiting) for g in groups])
    weight = class_weights(view, spec)[[g.slo_class for g in groups]]
    evict_s, displaced_weight, displaced_slack_s, displaced_delay_cost = _displaced(view, spec, drain_s)
    # Were the whole backlog spread over the instances that may take it.
    backlog_s = float((requests / np.maximum(rate.sum(axis=1), 1e-9))[allowed.any(axis=1)].sum())
    present = steady * np.array([float(i.num_running + i.engine_queue_length) for i in instances])
    room = np.maximum(0.0, np.where(allowed, batch, 0.0).max(axis=0) - present)
    # A swap displaces other work only as far as there is some.
    busy = np.minimum(1.0, present / np.where(allowed, batch, np.inf).min(axis=0))
    problem = Problem(
        requests=requests,
        weight=weight,
        delay_cost=DELAY_COST / np.array([g.target_s for g in groups]),
        first_slack_s=np.clip([g.deadline_s - now_s for g in groups], -FARTHEST_S, FARTHEST_S),
        last_slack_s=np.clip([g.last_deadline_s - now_s for g in groups], -FARTHEST_S, FARTHEST_S),
        model=models,
        output_cv=np.sqrt(variance[:, 0]) / mean[:, 0],
        allowed=allowed,
        interval_s=full.interval_s,
        batch=batch,
        latency_s=alone.latency_s,
        latency_growth_s=(full.latency_s - alone.latency_s) / np.maximum(1.0, batch - 1.0),
        start_model=np.array([-1 if model is None else model for model in serving], np.int32),
        # A swap that was asked for still waits for the batch to drain.
        ready_s=loading_s + (1.0 - steady) * np.where(loading_s > 0, 0.0, drain_s),
        present=present,
        drain_s=steady * drain_s,
        evict_s=evict_s,
        displaced_weight=displaced_weight,
        displaced_slack_s=displaced_slack_s,
        displaced_delay_cost=displaced_delay_cost,
        load_s=np.array([[i.load_s(m) for m in view.models] for i in instances]),
        unload_s=view.placements["sleep_s"].astype(np.float64),
        idle_s=idle_s,
        # Without a distribution there is no telling how many would miss.
        crowding_cost=np.zeros(allowed.shape) if spec.cost == "point" else crowding_cost(view, groups, room),
        swap_cost=spec.swap_weight * rate.max(axis=0) * busy,
        hold_s=spec.hold_s + backlog_s,
        form=FORMS[spec.cost],
        confidence=spec.confidence,
    )
    # Compiled functions are compiled for one layout of every array.
    return Problem._make(np.ascontiguousarray(v) if isinstance(v, np.ndarray) else v for v in problem)


def _displaced(view: ClusterView, spec: QlmSpec, drain_s: Float) -> tuple[Float, Float, Float, Float]:
    """(I,) each: ``evict_s``, ``displaced_weight``, ``displaced_slack_s`` and ``displaced_delay_cost``."""
    instances = view.instances
    evict_s = np.full(len(instances), np.inf)
    weight, slack_s, delay_cost = np.zeros((3, len(instances)))
    if not spec.evict:
        return evict_s, weight, slack_s, delay_cost
    class_weight = class_weights(view, spec)
    target_s = np.array([c.target_s for c in view.scenario.slo.classes])
    block_size = view.scenario.cluster.engine.block_size
    for i, instance in enumerate(instances):
        model = instance.active_model
        if model is None or not instance.num_running or instance.coming_model is not None:
            continue
        placement = instance.placement(model)
        tokens = float(instance.used_blocks * block_size)
        if spec.keep_kv:
            evict_s[i] = tokens * placement["kv_bytes_per_token"] / placement["kv_swap_bytes_per_s"]
        else:
            evict_s[i] = tokens * placement["c2"]
        batch = instance.batch()
        weight[i] = class_weight[batch.slo_class].sum()
        slack_s[i] = float(batch.deadline_s.min()) - view.now_s - drain_s[i]
        delay_cost[i] = (DELAY_COST / target_s[batch.slo_class]).sum()
    return evict_s, weight, slack_s, delay_cost


def smallest_problem() -> Problem:
    """One group and one instance: to have what works on problems compiled before time counts."""
    one, square, zero = np.ones(1), np.ones((1, 1)), np.zeros(1, np.int32)
    return Problem(
        requests=one,
        weight=one,
        delay_cost=one,
        first_slack_s=one,
        last_slack_s=one,
        model=zero,
        output_cv=one,
        allowed=square.astype(np.bool_),
        interval_s=square,
        batch=square,
        latency_s=square,
        latency_growth_s=square,
        start_model=zero,
        ready_s=one,
        present=one,
        drain_s=one,
        evict_s=one,
        displaced_weight=one,
        displaced_slack_s=one,
        displaced_delay_cost=one,
        load_s=square,
        unload_s=square,
        idle_s=one,
        crowding_cost=square,
        swap_cost=one,
        hold_s=1.0,
        form=MISS,
        confidence=0.5,
    )
