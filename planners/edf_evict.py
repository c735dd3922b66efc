"""EDF with eviction: earliest deadline first, preempting running work where that saves the next deadline.

Groups wait in order of deadline, as under EDF. When the head of a queue would miss its deadline behind the running
batch and would make it with the batch out of the way, and everything that would have to go has a later deadline, the
batch is evicted with its KV cache kept in host memory. What was evicted waits behind the head, in order of its own
deadline, and resumes from its cache. Preemption in order of deadlines is what makes EDF optimal on one processor
(Liu and Layland, JACM 1973); here it is not free, so it happens only where it decides about a miss.
"""

from __future__ import annotations

from collections.abc import Sequence

from planners.dispatch import EarliestCompletion, ListPlanner, by_deadline
from planners.pace import pace
from planners.rwt import remaining_s
from qlm_env.lso import Evict, Lso
from qlm_env.view import ClusterView, GroupView, InstanceView


class EdfEvictPlanner(ListPlanner):
    """EDF that preempts."""

    def __init__(self) -> None:
        super().__init__(by_deadline, EarliestCompletion(), steal=True)

    def make_way(self, view: ClusterView, instance: InstanceView, queue: Sequence[int]) -> list[Lso]:
        """An eviction if it saves the head of the queue, and a swap to its model."""
        evict = Evict(instance.index, keep_kv=True)
        head = view.group(queue[0])
        saves = view.is_legal(evict) and _saves(view, instance, head)
        return ([evict] if saves else []) + super().make_way(view, instance, queue)


def _saves(view: ClusterView, instance: InstanceView, head: GroupView) -> bool:
    """Whether the head misses behind the batch, makes it without, and goes before all that runs."""
    if instance.active_model is None or instance.coming_model not in (None, head.model):
        return False
    head_pace = pace(view, instance, head)
    slack_s = head.deadline_s - view.now_s
    if head.model == instance.active_model:
        wait_s = head_pace.interval_s * max(0.0, instance.num_running + 1.0 - head_pace.full)
        swap_s = 0.0
    else:
        wait_s = remaining_s(view, instance)
        swap_s = instance.load_s(head.model) + float(instance.placement(instance.active_model)["sleep_s"])
    without_batch_s = swap_s + head_pace.latency_s(head.waiting)
    # The next look at it may come a decision interval later, which must not be too late.
    latest_s = without_batch_s + wait_s + view.scenario.environment.decision_interval_s
    if wait_s <= 0.0 or not without_batch_s <= slack_s < latest_s:
        return False
    running = [request for request in instance.running() if request.group != head.id]
    return all(request.deadline_s > head.deadline_s for request in running)
