"""List planners: an order of groups and a rule for which instance takes the next one.

FCFS, EDF, SJF, least laxity, round robin and least loaded are all of this shape. Each instance swaps to the model of
its head group when that is not active, letting the batch drain first. Planners that arrange a queue otherwise, or clear
the way for its head otherwise, override these two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from planners.base import Planner
from planners.rwt import completion_s
from qlm_env.lso import Balance, Lso, SwapModel
from qlm_env.view import ClusterView, GroupView, InstanceView

Order = Callable[[ClusterView, GroupView], float]

Keys = Mapping[int, tuple[float, int]]
"""By group id: its place in the planner's order; ties go to the older group."""


def by_arrival(view: ClusterView, group: GroupView) -> float:
    """First come first served."""
    return group.arrival_s


def by_deadline(view: ClusterView, group: GroupView) -> float:
    """Earliest deadline first."""
    return group.deadline_s


def by_expected_tokens(view: ClusterView, group: GroupView) -> float:
    """Shortest job first: expected tokens of one request of the group."""
    return group.mean_prompt_tokens + view.group_output(group).mean_tokens


def candidates(view: ClusterView, group: GroupView) -> list[InstanceView]:
    """Instances that are up and can serve the group."""
    return [instance for instance in view.instances if instance.up and instance.fits(group.model)]


def order_queue(queue: Sequence[int], wanted: Sequence[int], instance: int) -> list[Lso]:
    """The moves that turn ``queue``, the groups now in an instance's virtual queue, into ``wanted``.

    ``wanted`` holds every group of ``queue`` that stays, and new ones. The longest common head is left alone.
    """
    staying = [g for g in queue if g in set(wanted)]
    same = 0
    while same < min(len(staying), len(wanted)) and staying[same] == wanted[same]:
        same += 1
    return [Balance(g, instance) for g in wanted[same:]]


def swap_to_head(view: ClusterView, instance: InstanceView, head: int) -> list[Lso]:
    """A swap to the head group's model where another one is active or coming, and a swap is possible."""
    model = view.group(head).model
    swap = SwapModel(instance.index, model)
    return [swap] if instance.serving_model != model and view.is_legal(swap) else []


class Dispatcher:
    """Chooses the instance of a new group."""

    def reset(self) -> None:
        """An episode begins."""

    def choose(
        self, view: ClusterView, group: GroupView, options: list[InstanceView], ahead: Mapping[int, list[int]]
    ) -> InstanceView:
        """One of ``options``, given the groups that would run before ``group`` on each."""
        raise NotImplementedError


class EarliestCompletion(Dispatcher):
    """The instance that would finish the group soonest, by estimated waiting time, swaps and service."""

    def choose(
        self, view: ClusterView, group: GroupView, options: list[InstanceView], ahead: Mapping[int, list[int]]
    ) -> InstanceView:
        return min(options, key=lambda i: completion_s(view, i, ahead[i.index], group))


class FewestRequests(Dispatcher):
    """The instance with the fewest requests, waiting or running."""

    def choose(
        self, view: ClusterView, group: GroupView, options: list[InstanceView], ahead: Mapping[int, list[int]]
    ) -> InstanceView:
        def requests(instance: InstanceView) -> int:
            waiting = sum(view.group(g).waiting for g in ahead[instance.index])
            return instance.num_running + instance.engine_queue_length + waiting

        return min(options, key=requests)


class InTurn(Dispatcher):
    """Each instance in turn."""

    def reset(self) -> None:
        self._next = 0

    def choose(
        self, view: ClusterView, group: GroupView, options: list[InstanceView], ahead: Mapping[int, list[int]]
    ) -> InstanceView:
        best = min(options, key=lambda i: (i.index - self._next) % len(view.instances))
        self._next = (best.index + 1) % len(view.instances)
        return best


class ListPlanner(Planner):
    """Keeps every virtual queue in an order, and dispatches new groups.

    Args:
        steal: an instance with nothing waiting takes over the first group, in the order, that it would finish
            sooner than where it waits; without it a group stays where it was dispatched.
    """

    def __init__(self, order: Order, dispatcher: Dispatcher, steal: bool) -> None:
        self._order = order
        self._dispatcher = dispatcher
        self._steal = steal

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        self._dispatcher.reset()

    def act(self, view: ClusterView) -> Sequence[Lso]:
        groups = {group.id: group for group in view.groups}
        keys = {g: (self._order(view, group), g) for g, group in groups.items()}
        queues = {instance.index: instance.queue for instance in view.instances}
        wanted = {i: self.arrange(view, view.instances[i], queue, keys) for i, queue in queues.items()}
        for _, g in sorted((keys[g], g) for g, group in groups.items() if not group.queued):
            options = candidates(view, groups[g])
            if options:
                having = {i.index: self.arrange(view, i, [*wanted[i.index], g], keys) for i in options}
                ahead = {i: queue[: queue.index(g)] for i, queue in having.items()}
                choice = self._dispatcher.choose(view, groups[g], options, ahead).index
                wanted[choice] = having[choice]
        if self._steal:
            staying_s: dict[int, float] = {}
            for instance in view.instances:
                if instance.up and not wanted[instance.index]:
                    self._take_over(view, instance, groups, keys, wanted, staying_s)
        lsos: list[Lso] = []
        for instance in view.instances:
            queue = wanted[instance.index]
            lsos += order_queue(queues[instance.index], queue, instance.index)
            if queue and instance.up:
                lsos += self.make_way(view, instance, queue)
        return lsos

    def arrange(self, view: ClusterView, instance: InstanceView, queue: Sequence[int], keys: Keys) -> list[int]:
        """The groups of ``queue`` as the instance should run them."""
        return sorted(queue, key=keys.__getitem__)

    def make_way(self, view: ClusterView, instance: InstanceView, queue: Sequence[int]) -> list[Lso]:
        """Operations that let the head of ``queue``, which is not empty, run."""
        return swap_to_head(view, instance, queue[0])

    def _take_over(
        self,
        view: ClusterView,
        idle: InstanceView,
        groups: Mapping[int, GroupView],
        keys: Keys,
        wanted: dict[int, list[int]],
        staying_s: dict[int, float],
    ) -> None:
        """Move a group to an idle instance; ``staying_s`` remembers when groups would finish where they are."""
        waiting = sorted((keys[g], g, i) for i, queue in wanted.items() for g in queue if groups[g].movable)
        for _, g, i in waiting:
            group = groups[g]
            if not idle.fits(group.model):
                continue
            if g not in staying_s:
                ahead = wanted[i][: wanted[i].index(g)]
                staying_s[g] = completion_s(view, view.instances[i], ahead, group)
            if completion_s(view, idle, [], group) < staying_s[g]:
                wanted[i].remove(g)
                wanted[idle.index].append(g)
                staying_s.clear()
                return
