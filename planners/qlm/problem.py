"""The planning problem at one decision epoch, as plain arrays.

K groups, I instances. A group's requests finish at ``wait + latency``: they wait for a place in the batch, one
admission interval for each request beyond a full batch, and a request's latency grows with the batch it runs in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planners.rwt import full_batch, remaining_s, service_of_batch
from planners.spec import QlmSpec
from qlm_env.view import ClusterView, GroupView

Float = NDArray[np.float64]
Int = NDArray[np.int32]
Flag = NDArray[np.bool_]


class Problem(NamedTuple):
    """Times in seconds from now."""

    requests: Float
    """(K,) waiting requests of each group"""
    weight: Float
    """(K,) of one request"""
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
    load_s: Float
    """(I, M) to bring a model onto the GPU"""
    unload_s: Float
    """(I, M) to take it off"""
    idle_s: Float
    """(I,) time for which the instance has had nothing to do"""
    swap_cost: Float
    """(I,) requests' worth of one second in which an instance serves nothing"""
    hold_s: float
    """time that a group in no queue waits, at least: until it is looked at again, and for all other work"""


DELAY_COST_PER_S = 2e-5
"""Cost of one request finishing a second later while its SLO is safe: enough to break ties, no more."""


def make_problem(view: ClusterView, groups: list[GroupView], spec: QlmSpec, idle_s: Float) -> Problem:
    """The problem of ``groups`` (at least one) on the cluster as it is; ``idle_s`` (I,) as in :class:`Problem`."""
    instances = view.instances
    models = np.array([g.model for g in groups], np.int32)
    placement = view.placements[:, models].T
    outputs = [view.group_output(g) for g in groups]
    prompt = np.array([g.mean_prompt_tokens for g in groups])[:, None]
    mean = np.array([o.mean_tokens for o in outputs])[:, None]
    variance = np.array([o.variance_tokens2 for o in outputs])[:, None]
    engine = view.scenario.cluster.engine
    batch = full_batch(engine, placement, prompt, mean, variance)
    full = service_of_batch(placement, batch, prompt, mean)
    alone = service_of_batch(placement, np.ones_like(batch), prompt, mean)
    fits = placement["num_blocks"] > 0
    allowed = np.array([[i.up and (g.movable or g.instance == i.index) for i in instances] for g in groups]) & fits
    serving = [i.serving_model for i in instances]
    steady = np.array([0.0 if i.coming_model is not None else 1.0 for i in instances])
    now_s = view.now_s
    classes = view.scenario.slo.classes
    drain_s = np.array([remaining_s(view, i) for i in instances])
    loading_s = np.array([i.loading_left_s for i in instances])
    rate = np.where(allowed, 1.0 / np.where(allowed, full.interval_s, 1.0), 0.0)
    requests = np.array([float(g.waiting) for g in groups])
    # Were the whole backlog spread over the instances that may take it.
    backlog_s = float((requests / np.maximum(rate.sum(axis=1), 1e-9))[allowed.any(axis=1)].sum())
    present = steady * np.array([float(i.num_running + i.engine_queue_length) for i in instances])
    # A swap displaces other work only as far as there is some.
    busy = np.minimum(1.0, present / np.where(allowed, batch, np.inf).min(axis=0))
    return Problem(
        requests=requests,
        weight=np.array([classes[g.slo_class].weight for g in groups]),
        first_slack_s=np.array([g.deadline_s - now_s for g in groups]),
        last_slack_s=np.array([g.last_deadline_s - now_s for g in groups]),
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
        load_s=np.array([[i.load_s(m) for m in view.models] for i in instances]),
        unload_s=view.placements["sleep_s"].astype(np.float64),
        idle_s=idle_s,
        swap_cost=spec.swap_weight * rate.max(axis=0) * busy,
        hold_s=spec.hold_s + backlog_s,
    )
