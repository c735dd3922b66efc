"""Request waiting time (RWT): how fast an instance works off requests, and how long one takes.

A continuous batch of ``B`` sequences with mean prompt ``P`` and mean output ``O`` steps in

``tau = c0 + c1*min(n, n0) + c2*max(0, n - n0) + c3*B*(P + O/2) + c4*(B/O)*P^2/2 + c5*B``,  ``n = B + B*P/O``

as every step decodes ``B`` tokens and prefills the ``B/O`` requests that take the places of finished ones. A
request then takes ``O*tau``, and the instance admits ``B/(O*tau)`` requests a second. The batch is bounded by slots
and KV memory; requests beyond it wait for one admission interval each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from qlm_env.spec import EngineSpec
from qlm_env.view import ClusterView, GroupView, InstanceView

Array: TypeAlias = Any
"""A float or an array of floats: a formula gives back what it is given."""


@dataclass(frozen=True, slots=True)
class ServiceEstimate:
    """How an instance serves requests of a kind while its batch is as assumed; arrays where the arguments are."""

    interval_s: Array
    """Mean time between admissions."""
    latency_s: Array
    """Admission to last token of one request."""


def full_batch(
    engine: EngineSpec, placement: Any, prompt_tokens: Array, output_tokens: Array, output_variance_tokens2: Array
) -> Array:
    """Sequences that fit the batch in steady state: bounded by slots and by KV memory.

    A sequence is in the batch for as long as its output, so the mean it holds there is ``P + E[O^2]/(2*E[O])``.

    Args:
        placement: PLACEMENT_DTYPE, one record or an array.
    """
    square = output_variance_tokens2 + output_tokens**2
    resident_tokens = prompt_tokens + square / (2 * output_tokens)
    batch = placement["num_blocks"] * engine.block_size / resident_tokens
    return np.maximum(1.0, np.minimum(engine.max_num_seqs, batch))


def service_of_batch(placement: Any, batch: Array, prompt_tokens: Array, output_tokens: Array) -> ServiceEstimate:
    """Service by a batch of ``batch`` sequences; see the module's formula.

    Args:
        placement: PLACEMENT_DTYPE, one record or an array.
    """
    new_tokens = batch * (1 + prompt_tokens / output_tokens)
    step_s = (
        placement["c0"]
        + placement["c1"] * np.minimum(new_tokens, placement["n0"])
        + placement["c2"] * np.maximum(0.0, new_tokens - placement["n0"])
        + placement["c3"] * batch * (prompt_tokens + output_tokens / 2)
        + placement["c4"] * batch / output_tokens * prompt_tokens**2 / 2
        + placement["c5"] * batch
        + placement["c6"] * np.minimum(1.0, batch / output_tokens) * batch * (prompt_tokens + output_tokens / 2)
    )
    latency_s = output_tokens * step_s
    return ServiceEstimate(interval_s=latency_s / batch, latency_s=latency_s)


def group_service(
    view: ClusterView, instance: InstanceView, group: GroupView, batch: float
) -> tuple[ServiceEstimate, float]:
    """How ``instance`` would serve ``group`` in a batch of ``batch``, and the full batch that bounds it."""
    output = view.group_output(group)
    placement = instance.placement(group.model)
    prompt_tokens = group.mean_prompt_tokens
    engine = view.scenario.cluster.engine
    full = float(full_batch(engine, placement, prompt_tokens, output.mean_tokens, output.variance_tokens2))
    return service_of_batch(placement, max(1.0, min(batch, full)), prompt_tokens, output.mean_tokens), full


def remaining_s(view: ClusterView, instance: InstanceView) -> float:
    """Expected time until the batch has drained.

    A running request is expected to produce its class's mean beyond what it has (memoryless, as the prior is), and
    the last of ``B`` such takes about ``ln(B) + 0.577`` times the mean.
    """
    running, model = instance.num_running, instance.active_model
    if not running or model is None:
        return 0.0
    counts = instance.running_per_class()
    means = np.array([view.output_statistics(model, c).mean_tokens for c in range(len(counts))])
    context_tokens = instance.used_blocks * view.scenario.cluster.engine.block_size / running
    service = service_of_batch(instance.placement(model), running, context_tokens, float(counts @ means) / running)
    return float(service.latency_s * (math.log(running) + 0.577 if running > 1 else 1.0))


def completion_s(view: ClusterView, instance: InstanceView, ahead: Sequence[int], group: GroupView) -> float:
    """Expected time until the last request of ``group`` has finished on ``instance``, behind the groups ``ahead``.

    Requests beyond a full batch wait for one admission interval each; a change of model waits for the batch to
    drain and for the swap.
    """
    total_s = instance.loading_left_s
    model = instance.serving_model
    present = instance.num_running + instance.engine_queue_length if instance.coming_model is None else 0
    last: GroupView | None = None
    for other in [*(view.group(g) for g in ahead), group]:
        if other.model != model:
            if last is not None:
                total_s += _drain_s(view, instance, last, present)
            elif present:
                total_s += remaining_s(view, instance)
            total_s += instance.swap_s(other.model)
            model = other.model
            present = 0
        present += other.waiting
        last = other
    return total_s + _drain_s(view, instance, group, present)


def _drain_s(view: ClusterView, instance: InstanceView, group: GroupView, present: int) -> float:
    """Time until ``present`` requests like those of ``group`` have been admitted, and the last has finished."""
    service, full = group_service(view, instance, group, float(present))
    return float(max(0.0, present - full) * service.interval_s + service.latency_s)
