"""What a request that joins a running batch costs the requests in it: it slows them down, and some then miss.

A running request with ``t`` tokens and ``s`` seconds left meets its deadline if at most ``s/tau`` tokens are still to
come, ``tau`` being the time of a step, which grows with the batch. Lengths are taken as Weibull with the mean and the
coefficient of variation ``v`` of their kind: shape ``k = v^-1.086`` (Justus et al., "Methods for estimating wind speed
frequency distributions", 1978), scale ``c = mean/Gamma(1 + 1/k)``, so that

``P(miss) = P(L > t + s/tau | L > t) = exp((t/c)^k - ((t + s/tau)/c)^k)``.

What the batch would lose if it were full, less what it loses as it is, shared among the requests that would fill it,
is the *crowding* of an instance, in weighted misses per request.

**Waiting does not avoid crowding, it moves it.** A request that is not served now will slow down others later: much
the same as now if its own deadline is near. So it pays the difference alone, by how much a batch is more crowded than
those that serve its model are on average. One whose deadline is far away can wait until the present load has passed,
and pays almost in full.

Places that are left free are service lost, which counts once there is not enough of it: the difference is charged by
the share of the free places that would stay free if everything that cannot wait took one. Nothing is charged while a
group waits for a model that no instance serves: its swap comes the later, the longer others take.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import gamma

from planners.rwt import full_batch, service_of_batch
from qlm_env.view import ClusterView, GroupView, InstanceView

Float: TypeAlias = NDArray[np.float64]

LOAD_LASTS_S = 60.0
"""The present load is expected to last so long."""
NOTHING = -1
LEAST_CV = 0.2
"""Lengths that vary less count as varying so much; only a few have been seen then."""


def miss_probability(
    generated_tokens: Float, slack_s: Float, step_s: float, mean_tokens: Float, output_cv: Float
) -> Float:
    """(B,) of running requests that would go on at one token per ``step_s``."""
    shape = np.maximum(LEAST_CV, output_cv) ** -1.086
    scale_tokens = mean_tokens / gamma(1.0 + 1.0 / shape)
    end_tokens = generated_tokens + np.maximum(0.0, slack_s) / step_s
    missed: Float = np.exp((generated_tokens / scale_tokens) ** shape - (end_tokens / scale_tokens) ** shape)
    return missed


def crowding(view: ClusterView, instance: InstanceView) -> float:
    """Weighted misses among what runs on an instance per request that joins; 0 where nothing can."""
    model, running = instance.active_model, instance.num_running
    if model is None or not running or instance.coming_model is not None:
        return 0.0
    batch = instance.batch()
    classes = view.scenario.slo.classes
    outputs = [view.output_statistics(model, c) for c in range(len(classes))]
    mean_tokens = np.array([o.mean_tokens for o in outputs])[batch.slo_class]
    variance_tokens2 = np.array([o.variance_tokens2 for o in outputs])[batch.slo_class]
    typical = (float(batch.prompt_tokens.mean()), float(mean_tokens.mean()))
    placement = instance.placement(model)
    full = float(full_batch(view.scenario.cluster.engine, placement, *typical, float(variance_tokens2.mean())))
    if full <= running:
        return 0.0
    slack_s = batch.deadline_s - view.now_s
    output_cv = np.sqrt(variance_tokens2) / mean_tokens
    missed_if_full, missed = (
        miss_probability(
            batch.generated_tokens,
            slack_s,
            float(service_of_batch(placement, size, *typical).latency_s) / typical[1],
            mean_tokens,
            output_cv,
        )
        for size in (full, float(running))
    )
    weight = np.array([c.weight for c in classes])[batch.slo_class]
    return float(weight @ (missed_if_full - missed)) / (full - running)


def crowding_cost(view: ClusterView, groups: list[GroupView], room: Float) -> Float:
    """(K, I) what each request of a group that joins an instance's batch costs; 0 where another model serves.

    Args:
        room: (I,) free places in the batches.
    """
    lasts = np.minimum(1.0, LOAD_LASTS_S / np.array([group.target_s for group in groups]))
    pressing = float(np.array([group.waiting for group in groups]) @ lasts)
    spare = max(0.0, 1.0 - pressing / max(1.0, float(room.sum())))
    serving = [
        NOTHING if i.coming_model is not None or i.active_model is None else i.active_model for i in view.instances
    ]
    serves = np.array(serving)[None, :] == np.array([group.model for group in groups])[:, None]
    if spare == 0.0 or not serves.any(axis=1).all():
        return np.zeros(serves.shape)
    asked = serves.any(axis=0)
    now = np.array([crowding(view, i) if asked[i.index] else 0.0 for i in view.instances])
    mean = (serves @ now) / np.maximum(1, serves.sum(axis=1))
    cost: Float = spare * np.where(serves, np.maximum(0.0, now[None, :] - (lasts * mean)[:, None]), 0.0)
    return cost
