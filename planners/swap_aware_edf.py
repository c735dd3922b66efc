"""Swap-aware EDF: earliest deadline first within a model, and a swap only when it pays.

A queue runs model by model: all groups of one model in order of deadline, then those of the next. Which model goes
first is decided at every epoch by an estimate of what the whole queue would then achieve: the weights of the
requests in it that would meet their deadlines, with drains and swaps accumulated along the way. So another model
than the active one goes first only if its requests gain more by that than all others lose by the swap and the wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from planners.dispatch import EarliestCompletion, Keys, ListPlanner, by_deadline
from planners.pace import Pace, pace
from planners.rwt import remaining_s
from qlm_env.lso import Lso
from qlm_env.view import ClusterView, GroupView, InstanceView


class SwapAwareEdfPlanner(ListPlanner):
    """Batches of one model, swapped when the gain exceeds the cost."""

    def __init__(self) -> None:
        super().__init__(by_deadline, EarliestCompletion(), steal=True)

    def act(self, view: ClusterView) -> Sequence[Lso]:
        self._paces: dict[tuple[int, int], Pace] = {}
        self._drains_s: dict[int, float] = {}
        return super().act(view)

    def arrange(self, view: ClusterView, instance: InstanceView, queue: Sequence[int], keys: Keys) -> list[int]:
        """Model by model, the best one first, the others in order of their earliest deadline."""
        blocks: dict[int, list[int]] = {}
        for g in sorted(queue, key=keys.__getitem__):
            blocks.setdefault(view.group(g).model, []).append(g)
        serving = instance.serving_model
        models = sorted(blocks, key=lambda model: model != serving)
        if len(models) > 1 and (instance.coming_model is None or serving not in blocks):
            first = self._first_model(view, instance, blocks, models)
            models = sorted(models, key=lambda model: model != first)
        return [g for model in models for g in blocks[model]]

    def _first_model(
        self, view: ClusterView, instance: InstanceView, blocks: dict[int, list[int]], models: list[int]
    ) -> int:
        def gain(model: int) -> float:
            others = [other for other in models if other != model]
            sequence = [view.group(g) for block in (model, *others) for g in blocks[block]]
            return self._on_time(view, instance, sequence)

        # Of equal models the first counts, which is the active one or that with the earliest deadline.
        return max(models, key=gain)

    def _on_time(self, view: ClusterView, instance: InstanceView, sequence: Sequence[GroupView]) -> float:
        """Weights of the requests that meet their deadlines when the groups run in this order."""
        classes = view.scenario.slo.classes
        steady = instance.coming_model is None
        model = instance.serving_model
        present = float(instance.num_running + instance.engine_queue_length) if steady else 0.0
        drain_s = self._drain_s(view, instance)
        start_s = view.now_s
        if not steady:
            # The batch drains, and then the coming model is loaded.
            start_s += drain_s + instance.loading_left_s
            drain_s = 0.0
        total = 0.0
        for group in sequence:
            if group.model != model:
                start_s += drain_s + _swap_s(instance, model, group.model)
                model, present = group.model, 0.0
            speed = self._pace(view, instance, group)
            first_s = start_s + speed.interval_s * max(0.0, present + 1.0 - speed.full)
            present += group.waiting
            wait_s = speed.interval_s * max(0.0, present - speed.full)
            latency_s = speed.latency_s(present)
            drain_s = wait_s + latency_s
            share = share_in_time(
                group.deadline_s - first_s - latency_s, group.last_deadline_s - start_s - wait_s - latency_s
            )
            total += classes[group.slo_class].weight * group.waiting * share
        return total

    def _pace(self, view: ClusterView, instance: InstanceView, group: GroupView) -> Pace:
        key = (instance.index, group.id)
        if key not in self._paces:
            self._paces[key] = pace(view, instance, group)
        return self._paces[key]

    def _drain_s(self, view: ClusterView, instance: InstanceView) -> float:
        if instance.index not in self._drains_s:
            self._drains_s[instance.index] = remaining_s(view, instance)
        return self._drains_s[instance.index]


def _swap_s(instance: InstanceView, old: int | None, new: int) -> float:
    """Seconds from one model to another, with the active one kept in host memory when it goes."""
    sleep_s = 0.0 if old is None else float(instance.placement(old)["sleep_s"])
    wake_s = float(instance.placement(new)["wake_s"])
    return sleep_s + (wake_s if new == instance.active_model else instance.load_s(new))


def share_in_time(first_slack_s: float, last_slack_s: float) -> float:
    """The share of a group that is in time, if its slack runs linearly from its first request to its last."""
    if first_slack_s >= 0.0 and last_slack_s >= 0.0:
        return 1.0
    if first_slack_s < 0.0 and last_slack_s < 0.0:
        return 0.0
    return max(first_slack_s, last_slack_s) / abs(first_slack_s - last_slack_s)
