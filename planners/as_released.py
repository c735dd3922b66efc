"""QLM as its public code runs it: earliest deadline first within queues that are filled at random.

Read off github.com/QLM-project/QLM (commit 388b720):

- a group that is new goes to a virtual queue drawn at random, and stays there;
- queues are looked at again and again; while no group is predicted to be late they keep their order, and as soon as one
  is, every queue is put in order of deadline (policy ``edf``, the default);
- the prediction adds up along a queue: requests times tokens over token throughput, and a constant for a swap where a
  model follows another; what is running, and which model is resident, is not looked at;
- nothing is evicted, no KV state is swapped, no model staged.

The other policy there, ``lp``, cannot run (``docs/planner.md`` says why). Two things are added to make it run at all
where instances differ: a queue is drawn among those whose instance can serve the model, and an instance swaps to the
model of its head group. Requests, and not their number alone, decide the service time: that of :mod:`planners.rwt`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from planners.base import Planner
from planners.dispatch import candidates, order_queue, swap_to_head
from planners.rwt import group_service
from qlm_env.lso import Lso
from qlm_env.view import ClusterView, InstanceView


class ReleasedPlanner(Planner):
    """Random queues, in order of deadline once something is predicted to be late."""

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        self._rng = rng

    def act(self, view: ClusterView) -> Sequence[Lso]:
        queues = {instance.index: instance.queue for instance in view.instances}
        wanted = {i: list(queue) for i, queue in queues.items()}
        for group in view.groups:
            options = candidates(view, group)
            if not group.queued and options:
                wanted[options[int(self._rng.integers(len(options)))].index].append(group.id)
        up = [instance for instance in view.instances if instance.up]
        if any(_predicts_lateness(view, instance, wanted[instance.index]) for instance in up):
            for instance in up:
                wanted[instance.index].sort(key=lambda g: (view.group(g).deadline_s, g))
        lsos: list[Lso] = []
        for instance in up:
            queue = wanted[instance.index]
            lsos += order_queue(queues[instance.index], queue, instance.index)
            if queue:
                lsos += swap_to_head(view, instance, queue[0])
        return lsos


def _predicts_lateness(view: ClusterView, instance: InstanceView, queue: Sequence[int]) -> bool:
    end_s = view.now_s
    previous: int | None = None
    for group in map(view.group, queue):
        if previous not in (None, group.model):
            end_s += instance.load_s(group.model)
        service, _ = group_service(view, instance, group, math.inf)
        end_s += group.waiting * float(service.interval_s)
        if end_s > group.deadline_s:
            return True
        previous = group.model
    return False
