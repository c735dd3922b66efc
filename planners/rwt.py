"""Request waiting time (RWT): how fast an instance works off requests, and how long one takes.

A continuous batch of ``B`` sequences with mean prompt ``P`` and mean output ``O`` steps in

``tau = c0 + c1*min(n, n0) + c2*max(0, n - n0) + c3*B*(P + O/2) + c4*(B/O)*P^2/2 + c5*B``,  ``n = B + B*P/O``

as every step decodes ``B`` tokens and prefills the ``B/O`` requests that take the places of finished ones. A
request then takes ``O*tau``, and the instance admits ``B/(O*tau)`` requests a second. The batch is bounded by slots
and KV memory. A group of ``n`` requests is admitted over ``n`` such intervals; by the central limit theorem its
variance is ``n`` times that of one interval, from the spread of output lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlm_env.view import ClusterView, GroupView, InstanceView, OutputStatistics


@dataclass(frozen=True, slots=True)
class ServiceEstimate:
    """How an instance serves requests of a kind while its batch is as assumed."""

    interval_s: float
    """Mean time between admissions."""
    latency_s: float
    """Admission to last token of one request."""
    interval_std_s: float
    """Standard deviation of the time one request contributes."""

    def group_s(self, requests: int) -> tuple[float, float]:
        """Mean and standard deviation of the time in which ``requests`` are admitted."""
        return requests * self.interval_s, math.sqrt(requests) * self.interval_std_s


def full_batch(view: ClusterView, placement: Any, prompt_tokens: float, output: OutputStatistics) -> float:
    """Sequences that fit the batch in steady state: bounded by slots and by KV memory.

    A sequence is in the batch for as long as its output, so the mean it holds there is ``P + E[O^2]/(2*E[O])``.
    """
    engine = view.scenario.cluster.engine
    kv_tokens = placement.num_blocks * engine.block_size
    square = output.variance_tokens2 + output.mean_tokens**2
    resident_tokens = prompt_tokens + square / (2 * output.mean_tokens)
    return float(max(1.0, min(engine.max_num_seqs, kv_tokens / resident_tokens)))


def estimate_service(
    placement: Any, batch: float, prompt_tokens: float, output_tokens: float, output_std_tokens: float
) -> ServiceEstimate:
    """Service by a batch of ``batch`` sequences; see the module's formula.

    Args:
        placement: a record with ``c0..c5, n0``.
    """
    new_tokens = batch * (1 + prompt_tokens / output_tokens)
    step_s = (
        placement.c0
        + placement.c1 * min(new_tokens, placement.n0)
        + placement.c2 * max(0.0, new_tokens - placement.n0)
        + placement.c3 * batch * (prompt_tokens + output_tokens / 2)
        + placement.c4 * batch / output_tokens * prompt_tokens**2 / 2
        + placement.c5 * batch
    )
    latency_s = output_tokens * step_s
    return ServiceEstimate(
        interval_s=float(latency_s / batch),
        latency_s=float(latency_s),
        interval_std_s=float(step_s * output_std_tokens / batch),
    )


def group_service(
    view: ClusterView, instance: InstanceView, group: GroupView, batch: float | None = None
) -> tuple[ServiceEstimate, float]:
    """How ``instance`` would serve ``group``, and the batch that is assumed.

    Args:
        batch: sequences running beside it, itself included, if fewer than a full batch.
    """
    output = view.output_statistics(group.model, group.slo_class)
    placement = instance.placement(group.model)
    full = full_batch(view, placement, group.mean_prompt_tokens, output)
    batch = full if batch is None else max(1.0, min(batch, full))
    std_tokens = math.sqrt(output.variance_tokens2)
    return estimate_service(placement, batch, group.mean_prompt_tokens, output.mean_tokens, std_tokens), full


def remaining_s(view: ClusterView, instance: InstanceView) -> float:
    """Expected time until the batch has drained.

    A running request is expected to produce its class's mean beyond what it has (memoryless, as the prior is), and
    the last of ``B`` such takes about ``ln(B) + 0.577`` times the mean.
    """
    running = list(instance.running())
    if not running or instance.active_model is None:
        return 0.0
    means = [view.output_statistics(request.model, request.slo_class).mean_tokens for request in running]
    mean_tokens = sum(means) / len(means)
    placement = instance.placement(instance.active_model)
    prompt_tokens = sum(r.prompt_tokens + r.generated_tokens for r in running) / len(running)
    service = estimate_service(placement, len(running), prompt_tokens, mean_tokens, 0.0)
    return float(service.latency_s * (math.log(len(running)) + 0.577 if len(running) > 1 else 1.0))


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
    return max(0.0, present - full) * service.interval_s + service.latency_s
