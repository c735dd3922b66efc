"""How fast an instance serves requests of a group, as four numbers that are quick to reckon with."""

from __future__ import annotations

import math
from typing import NamedTuple

from planners.rwt import full_batch, service_of_batch
from qlm_env.view import ClusterView, GroupView, InstanceView


class Pace(NamedTuple):
    """Service of one group by one instance; latency is taken as linear in the batch."""

    full: float
    """Sequences of a full batch."""
    interval_s: float
    """Mean time between admissions to a full batch."""
    alone_s: float
    """Admission to last token of a request alone in the batch."""
    growth_s: float
    """What each further request in the batch adds to that."""

    def latency_s(self, batch: float) -> float:
        """Admission to last token in a batch of ``batch`` sequences, at most a full one."""
        return self.alone_s + self.growth_s * max(0.0, min(batch, self.full) - 1.0)

    def batch_within(self, latency_s: float) -> float:
        """The largest batch whose requests take at most ``latency_s``, were there room for it; 0 if there is none."""
        if latency_s < self.alone_s:
            return 0.0
        return 1.0 + (latency_s - self.alone_s) / self.growth_s if self.growth_s > 0.0 else math.inf


def pace(view: ClusterView, instance: InstanceView, group: GroupView) -> Pace:
    """The pace at which ``instance`` would serve ``group``, with the output lengths expected of its kind."""
    output = view.group_output(group)
    placement = instance.placement(group.model)
    prompt_tokens = group.mean_prompt_tokens
    full = float(
        full_batch(view.scenario.cluster.engine, placement, prompt_tokens, output.mean_tokens, output.variance_tokens2)
    )
    in_full = service_of_batch(placement, full, prompt_tokens, output.mean_tokens)
    alone = service_of_batch(placement, 1.0, prompt_tokens, output.mean_tokens)
    growth_s = (in_full.latency_s - alone.latency_s) / (full - 1.0) if full > 1.0 else 0.0
    return Pace(full, float(in_full.interval_s), float(alone.latency_s), float(growth_s))
