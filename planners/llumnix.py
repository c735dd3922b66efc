"""Llumnix-style load balancing: new work goes where most memory is free per running request, and moves there later.

From B. Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving" (OSDI 2024): the *freeness* of an
instance is ``F = (M - sum V) / B``, its KV memory less the virtual usage of its requests, over its batch size: for
how many steps the batch can go on before memory is full. The virtual usage of a running request is what it holds,
that of a waiting one what its prompt will need, so that instances with a queue have little or negative freeness. A
new request goes to the freest instance. Periodically the least free instance is paired with the freest, and
requests migrate from one to the other, so that queues do not wait while memory is free elsewhere. When the
instances of a model are short of freeness, another is added.

What differs here:

- What is dispatched and migrates is a request group, with the demand of all its requests; the paper counts the
  demand of the first waiting request only.
- Only waiting groups migrate. A running request could move by an eviction, but that takes out the whole batch, and
  its KV cache does not follow to another host; the paper's live migration copies it while decoding goes on.
- Several models share the cluster. A group goes to an instance that serves its model, or will for others of it;
  where these fall below ``SCARCE_STEPS`` of freeness, an instance with nothing to do is added by a swap, in place
  of the paper's auto-scaling. Where none serves the model and none has nothing to do, it goes where the fewest
  requests wait, and the instance swaps when its turn comes.
- Priorities (headroom for urgent requests) are left out: SLO classes are deadlines, which the paper does not know.
- Order within an instance is first come first served, as in the paper and in vLLM; of several models in a queue,
  the one with the oldest group first, and all its groups with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planners.base import Planner
from planners.dispatch import by_arrival, candidates, order_queue, swap_to_head
from qlm_env.lso import Lso
from qlm_env.view import ClusterView, GroupView, InstanceView

SCARCE_STEPS = 10.0
"""Freeness, in decode steps of the whole batch, below which a model gets another instance if one has nothing to do."""
MOST_MIGRATIONS = 8
"""Groups that migrate at one epoch, at most."""


class LlumnixPlanner(Planner):
    """Dispatch and migration by freeness."""

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        pass

    def act(self, view: ClusterView) -> Sequence[Lso]:
        queues = {instance.index: instance.queue for instance in view.instances}
        wanted = {i: list(queue) for i, queue in queues.items()}
        new = [group for group in view.groups if not group.queued]
        for group in sorted(new, key=lambda group: (by_arrival(view, group), group.id)):
            home = _destination(view, group, wanted)
            if home is not None:
                wanted[home.index].append(group.id)
        for _ in range(MOST_MIGRATIONS):
            if not _migrate(view, wanted):
                break
        lsos: list[Lso] = []
        for instance in view.instances:
            queue = _first_come(view, wanted[instance.index])
            lsos += order_queue(queues[instance.index], queue, instance.index)
            if queue and instance.up:
                lsos += swap_to_head(view, instance, queue[0])
        return lsos


def _first_come(view: ClusterView, queue: Sequence[int]) -> list[int]:
    """The groups of a queue model by model, each in order of arrival."""
    by_model: dict[int, list[int]] = {}
    for g in sorted(queue, key=lambda g: (by_arrival(view, view.group(g)), g)):
        by_model.setdefault(view.group(g).model, []).append(g)
    return [g for groups in by_model.values() for g in groups]


def freeness_steps(view: ClusterView, instance: InstanceView, model: int, queue: Sequence[int]) -> float:
    """Decode steps for which the KV memory of ``instance``, serving ``model``, lasts with ``queue`` admitted."""
    block_size = view.scenario.cluster.engine.block_size
    waiting = [view.group(g) for g in queue]
    free_blocks = float(instance.placement(model)["num_blocks"]) - instance.used_blocks
    free_tokens = free_blocks * block_size - sum(group.waiting * group.mean_prompt_tokens for group in waiting)
    batch = instance.num_running + instance.engine_queue_length + sum(group.waiting for group in waiting)
    return free_tokens / max(1, batch)


def _destination(view: ClusterView, group: GroupView, wanted: dict[int, list[int]]) -> InstanceView | None:
    """The instance of a new group."""

    def freeness(instance: InstanceView) -> float:
        return freeness_steps(view, instance, group.model, wanted[instance.index])

    options = candidates(view, group)
    serving = [i for i in options if _serves(view, i, group.model, wanted[i.index])]
    idle = [i for i in options if i not in serving and _has_nothing_to_do(i, wanted[i.index])]
    best = max(serving, key=freeness, default=None)
    if best is not None and (freeness(best) >= SCARCE_STEPS or not idle):
        return best
    if idle:
        return max(idle, key=freeness)

    def waiting(instance: InstanceView) -> int:
        return sum(view.group(g).waiting for g in wanted[instance.index])

    return min(options, key=waiting, default=None)


def _has_nothing_to_do(instance: InstanceView, queue: Sequence[int]) -> bool:
    return not queue and instance.num_running == 0 and instance.coming_model is None


def _serves(view: ClusterView, instance: InstanceView, model: int, queue: Sequence[int]) -> bool:
    """Whether the instance has the model, or will for groups in its queue."""
    return instance.serving_model == model or any(view.group(g).model == model for g in queue)


def _migrate(view: ClusterView, wanted: dict[int, list[int]]) -> bool:
    """Move the last group that waits at the least free instance of a model to the freest one; whether one moved."""
    for model in view.models:
        sharing = [i for i in view.instances if i.up and _serves(view, i, model, wanted[i.index])]
        if len(sharing) < 2:
            continue
        ranked = sorted(sharing, key=lambda i: freeness_steps(view, i, model, wanted[i.index]))
        source, target = ranked[0], ranked[-1]
        for g in reversed(wanted[source.index]):
            group = view.group(g)
            if not group.movable or group.model != model:
                continue
            before = freeness_steps(view, source, model, wanted[source.index])
            after = freeness_steps(view, target, model, [*wanted[target.index], g])
            if after > max(before, 0.0):
                wanted[source.index].remove(g)
                wanted[target.index].append(g)
                return True
            break
    return False
