"""Least laxity first: the group that can wait least runs first.

The laxity (slack) of a request is what is left of the time to its deadline after its own service,
``deadline - now - service`` (Mok, "Fundamental design problems of distributed systems for the hard-real-time
environment", MIT 1983). ``now`` is the same for all, so the order is that of ``deadline - service``. The service of
a group is the latency of one of its requests in a full batch, from expected output lengths; of a group in no queue
yet, on the instance that is fastest for it. Against EDF it prefers kinds with long outputs and slow models.
"""

from __future__ import annotations

import math

from planners.dispatch import candidates
from planners.rwt import group_service
from qlm_env.view import ClusterView, GroupView, InstanceView


def by_laxity(view: ClusterView, group: GroupView) -> float:
    """Least laxity first: the deadline of the group's first request, less its expected service."""
    home = group.instance
    options = candidates(view, group) if home is None else [view.instances[home]]
    return group.deadline_s - min((_service_s(view, instance, group) for instance in options), default=0.0)


def _service_s(view: ClusterView, instance: InstanceView, group: GroupView) -> float:
    in_full_batch, _ = group_service(view, instance, group, math.inf)
    return float(in_full_batch.latency_s)
