"""From planned queues to LSOs beside the moves themselves: swaps, evictions and warm starts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planners.dispatch import swap_to_head
from planners.qlm.problem import Outputs
from planners.rwt import full_batch, remaining_s, service_of_batch
from planners.spec import QlmSpec
from qlm_env.lso import Evict, Lso, SwapModel, WarmStart
from qlm_env.view import ClusterView, GroupView, InstanceView

URGENCY_FACTOR = 3.0
"""An eviction is considered when the running requests have this many times the slack of the waiting head."""


def make_way(view: ClusterView, instance: InstanceView, head: GroupView, spec: QlmSpec, outputs: Outputs) -> list[Lso]:
    """Let the head group run: swap to its model, and evict what stands in its way if that saves its SLO."""
    lsos: list[Lso] = []
    evict = Evict(instance.index, spec.keep_kv)
    if spec.evict and _eviction_saves(view, instance, head, outputs) and view.is_legal(evict):
        lsos.append(evict)
    return lsos + swap_to_head(view, instance, head.id)


def _eviction_saves(view: ClusterView, instance: InstanceView, head: GroupView, outputs: Outputs) -> bool:
    """Whether the head would miss behind the running batch, makes it without, and the batch can wait."""
    if instance.active_model is None or instance.num_running == 0:
        return False
    slack_s = head.deadline_s - view.now_s
    expected = outputs(view, head)
    placement = instance.placement(head.model)
    prompt_tokens = head.mean_prompt_tokens
    engine = view.scenario.cluster.engine
    full = float(full_batch(engine, placement, prompt_tokens, expected.mean_tokens, expected.variance_tokens2))
    batch = max(1.0, min(float(head.waiting), full))
    service = service_of_batch(placement, batch, prompt_tokens, expected.mean_tokens)
    if head.model == instance.active_model:
        wait_s = service.interval_s * max(0.0, instance.num_running + 1.0 - full)
        swap_s = 0.0
    else:
        wait_s = remaining_s(view, instance)
        swap_s = instance.swap_s(head.model) if instance.coming_model is None else 0.0
    alone_s = swap_s + float(service.latency_s)
    if not alone_s < slack_s < alone_s + wait_s:
        return False
    running = [request for request in instance.running() if request.group != head.id]
    return bool(running) and all(
        request.deadline_s - view.now_s > URGENCY_FACTOR * max(slack_s, alone_s) for request in running
    )


def stage_ahead(view: ClusterView, decided: Sequence[Lso]) -> list[Lso]:
    """Stage the model most asked for among those an instance could serve only from storage.

    Args:
        decided: what is done before; a model that an instance swaps to needs no staging, and one is staged at a time.
    """
    swaps = {(lso.instance, lso.model) for lso in decided if isinstance(lso, SwapModel)}
    staging = {lso.instance for lso in decided if isinstance(lso, WarmStart)}
    demand = view.arrivals_per_model()
    by_demand = [int(model) for model in np.argsort(-demand, kind="stable") if demand[model] > 0]
    lsos: list[Lso] = []
    for instance in view.instances:
        if instance.staging or not instance.up or instance.index in staging:
            continue
        for model in by_demand:
            lso = WarmStart(instance.index, model)
            if (instance.index, model) in swaps:
                continue
            if instance.cold(model) and instance.has_host_memory_for(model) and view.is_legal(lso):
                lsos.append(lso)
                break
    return lsos
