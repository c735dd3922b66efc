"""SHEPHERD-style serving: the largest feasible batch runs, and preempts one that is much smaller.

From H. Zhang et al., "SHEPHERD: Serving DNNs in the Wild" (NSDI 2023), the online algorithm (Flex): requests of a
model wait in order of deadline; a batch of it is *feasible* if, begun now, all of it meets its deadlines, so more
urgent requests allow only smaller batches; an instance that is free takes the largest feasible batch over all
models. One that is busy goes on, unless the largest feasible batch is worth more than ``preemption_ratio`` (lambda)
times the running one: then that is preempted. The ratio of 3.03 is the paper's.

What differs here:

- A batch is worth its requests' weights, which are 1 by default, so that it is then the number of requests.
- Batches are made of request groups. Batching is continuous: a batch of the model that runs joins what runs there
  as far as there is room, with latencies of the joint batch. One of another model waits for the batch to drain, or
  preempts it.
- Preempted requests keep their KV cache and may be part of a later batch of the same instance; the paper loses
  their work.
- Models have to be loaded, which the paper's instances need not. A busy instance of a model goes on adding to its
  batch as room permits, and another instance loads that model only for what the model's own cannot do in time.
- Service times are expected ones, as output lengths are unknown; a DNN's are deterministic.
- The paper drops requests that cannot meet their deadline. Here all are served: instances that have nothing else to
  do take them, and any feasible batch preempts them.
- The paper's planning part, which groups streams and instances by an integer program, is left out: all instances
  serve all models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planners.base import Planner
from planners.dispatch import order_queue, swap_to_head
from planners.pace import Pace, pace
from planners.rwt import remaining_s
from planners.spec import ShepherdSpec
from qlm_env.lso import Evict, Lso
from qlm_env.view import ClusterView, GroupView, InstanceView


@dataclass(frozen=True)
class Batch:
    """Groups of one model that an instance could run together from now on."""

    groups: tuple[int, ...]
    """In order of deadline."""
    value: float
    """Weights of the requests that make their deadline."""
    latency_s: float
    """From now until they have finished."""

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better: the value, and of equal ones the sooner done."""
        return self.value, -self.latency_s


class ShepherdPlanner(Planner):
    """The largest feasible batch, by preemption if need be."""

    def __init__(self, spec: ShepherdSpec) -> None:
        self._spec = spec

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        self._weights = np.array([c.weight for c in view.scenario.slo.classes])
        self._entering: dict[int, list[int]] = {instance.index: [] for instance in view.instances}
        self._promised = np.zeros(len(view.instances))

    def act(self, view: ClusterView) -> Sequence[Lso]:
        queues = {instance.index: instance.queue for instance in view.instances}
        groups = sorted(view.groups, key=lambda group: (group.deadline_s, group.id))
        for i, entering in self._entering.items():
            # What has been pulled, or lost its queue with its instance, is of the batch no longer.
            self._entering[i] = [g for g in entering if g in queues[i]]
        pool = _Pool(view, groups, self._entering)
        evicting = self._assign(view, pool)
        lsos: list[Lso] = []
        for instance in view.instances:
            i = instance.index
            entering = self._entering[i]
            # What was preempted waits behind; only this instance has its KV cache.
            rest = [g for g in queues[i] if g not in entering and not pool.taken_elsewhere(g, i)]
            lsos += order_queue(queues[i], entering + rest, i)
            if entering and instance.up:
                lsos += evicting.get(i, [])
                lsos += swap_to_head(view, instance, entering[0])
        return lsos

    def _assign(self, view: ClusterView, pool: _Pool) -> dict[int, list[Lso]]:
        """Give out batches, the best first, until no instance wants another; returns evictions by instance."""
        evicting: dict[int, list[Lso]] = {}
        offers = {i.index: self._offer(view, i, pool) for i in view.instances if i.up}
        while any(offers.values()):
            chosen, (batch, evict) = max(
                ((i, offer) for i, offer in offers.items() if offer), key=lambda entry: (entry[1][0].rank, -entry[0])
            )
            pool.take(batch.groups, chosen)
            joins = evict is None and view.group(batch.groups[0]).model == view.instances[chosen].active_model
            self._entering[chosen] = (self._entering[chosen] if joins else []) + list(batch.groups)
            self._promised[chosen] = batch.value + (self._promised[chosen] if joins else 0.0)
            if evict is not None:
                evicting[chosen] = [evict]
            del offers[chosen]
            for i, offer in offers.items():
                if offer and not set(offer[0].groups).isdisjoint(batch.groups):
                    offers[i] = self._offer(view, view.instances[i], pool)
        return evicting

    def _offer(self, view: ClusterView, instance: InstanceView, pool: _Pool) -> tuple[Batch, Evict | None] | None:
        """The batch the instance would begin now, and the eviction that goes before it; None to go on as it is."""
        if instance.coming_model is not None:
            return None
        entering = self._entering[instance.index]
        evict = Evict(instance.index, keep_kv=True)
        if view.is_legal(evict):
            best = self._largest(view, instance, pool, preempting=True)
            if best is not None and best.value > self._spec.preemption_ratio * self._value(view, instance):
                return best, evict
        best = self._largest(view, instance, pool, preempting=False)
        if best is None and not entering:
            best = self._leftovers(view, instance, pool)
        return None if best is None else (best, None)

    def _value(self, view: ClusterView, instance: InstanceView) -> float:
        """Of the instance's batch: the weights of what is left of it, but not of requests it was to run too late."""
        entering = [view.group(g) for g in self._entering[instance.index]]
        left = float(instance.running_per_class() @ self._weights)
        left += sum(float(self._weights[group.slo_class]) * group.waiting for group in entering)
        return min(left, float(self._promised[instance.index]))

    def _largest(self, view: ClusterView, instance: InstanceView, pool: _Pool, preempting: bool) -> Batch | None:
        """The largest feasible batch; with ``preempting``, of those of another model that could run in its place."""
        best: Batch | None = None
        for model, groups in pool.of(instance).items():
            if model == instance.active_model:
                # What the batch has no room for is no larger than the batch.
                if preempting:
                    continue
            elif self._entering[instance.index] and not preempting:
                continue
            else:
                groups = [group for group in groups if not self._served_at_home(view, group, pool)]
            for batch in self._feasible(view, instance, groups, pool, preempting):
                if best is None or batch.rank > best.rank:
                    best = batch
        return best

    def _feasible(
        self,
        view: ClusterView,
        instance: InstanceView,
        groups: list[GroupView],
        pool: _Pool,
        preempting: bool,
    ) -> list[Batch]:
        """For each group of a model, in order of deadline, the largest batch in which it is the most urgent one."""
        batches = []
        for first, group in enumerate(groups):
            present, wait_s, room = self._conditions(view, instance, group, pool, preempting)
            if room < 1.0:
                continue
            taken: list[int] = []
            value = 0.0
            size = 0.0
            for other in groups[first:]:
                count = min(float(other.waiting), room - size)
                taken.append(other.id)
                size += count
                value += count * float(self._weights[other.slo_class])
                if size >= room - 1.0:
                    break
            latency_s = pool.pace(instance, group).latency_s(present + size)
            batches.append(Batch(tuple(taken), value, wait_s + latency_s))
            if size >= sum(other.waiting for other in groups[first:]):
                # Beginning later only leaves requests out.
                break
        return batches

    def _conditions(
        self, view: ClusterView, instance: InstanceView, group: GroupView, pool: _Pool, preempting: bool
    ) -> tuple[float, float, float]:
        """Requests that run beside those of ``group``, the time until these can begin, and how many can in time."""
        speed = pool.pace(instance, group)
        slack_s = group.deadline_s - view.now_s
        if group.model != instance.active_model or instance.coming_model is not None:
            wait_s = instance.loading_left_s + instance.swap_s(group.model)
            if not preempting:
                wait_s += pool.drain_s(instance)
            return 0.0, wait_s, min(speed.full, speed.batch_within(slack_s - wait_s))
        engine = view.scenario.cluster.engine
        entering = sum(view.group(g).waiting for g in self._entering[instance.index])
        present = float(instance.num_running + instance.engine_queue_length + entering)
        output = view.group_output(group)
        # The mean that a request holds while it is in the batch, as in planners.rwt.full_batch.
        held = (output.variance_tokens2 + output.mean_tokens**2) / (2.0 * output.mean_tokens)
        needed_tokens = group.mean_prompt_tokens + held
        memory = instance.free_blocks * engine.block_size / needed_tokens - instance.engine_queue_length - entering
        return present, 0.0, min(engine.max_num_seqs - present, memory, speed.batch_within(slack_s) - present)

    def _served_at_home(self, view: ClusterView, group: GroupView, pool: _Pool) -> bool:
        """Whether an instance that has the group's model has room for some of it in time."""
        homes = [i for i in view.instances if i.up and i.serving_model == group.model]
        return any(self._conditions(view, home, group, pool, preempting=False)[2] >= 1.0 for home in homes)

    @staticmethod
    def _leftovers(view: ClusterView, instance: InstanceView, pool: _Pool) -> Batch | None:
        """Requests that cannot make their deadlines any more, for an instance that has nothing better to do."""
        if instance.num_running:
            return None
        # No model is loaded for them that another instance has.
        elsewhere = {i.serving_model for i in view.instances if i.up} - {instance.active_model}
        groups = {model: groups for model, groups in pool.of(instance).items() if model not in elsewhere}
        if not groups:
            return None
        model = min(groups, key=lambda m: (m != instance.active_model, groups[m][0].deadline_s))
        head = groups[model][0]
        return Batch((head.id,), 0.0, pool.pace(instance, head).latency_s(head.waiting))


class _Pool:
    """Waiting groups that no instance has in its batch, and who may take them."""

    def __init__(self, view: ClusterView, groups: list[GroupView], entering: dict[int, list[int]]) -> None:
        self._view = view
        self._taken = {g: i for i, batch in entering.items() for g in batch}
        self._by_model: dict[int, list[GroupView]] = {}
        for group in groups:
            if group.id not in self._taken:
                self._by_model.setdefault(group.model, []).append(group)
        self._paces: dict[tuple[int, int], Pace] = {}
        self._drains_s: dict[int, float] = {}

    def of(self, instance: InstanceView) -> dict[int, list[GroupView]]:
        """By model, the groups that ``instance`` may take, in order of deadline; no empty lists."""
        mine = {
            model: [g for g in groups if g.movable or g.instance == instance.index]
            for model, groups in self._by_model.items()
            if instance.fits(model)
        }
        return {model: groups for model, groups in mine.items() if groups}

    def take(self, groups: Sequence[int], instance: int) -> None:
        """The groups are of the instance's batch from now on."""
        for g in groups:
            self._taken[g] = instance
        for model, waiting in self._by_model.items():
            self._by_model[model] = [group for group in waiting if group.id not in self._taken]

    def taken_elsewhere(self, g: int, instance: int) -> bool:
        """Whether another instance has the group in its batch."""
        return self._taken.get(g, instance) != instance

    def pace(self, instance: InstanceView, group: GroupView) -> Pace:
        """See :func:`planners.pace.pace`; worked out once per epoch."""
        key = (instance.index, group.id)
        if key not in self._paces:
            self._paces[key] = pace(self._view, instance, group)
        return self._paces[key]

    def drain_s(self, instance: InstanceView) -> float:
        """Expected time until the instance's batch has drained; worked out once per epoch."""
        if instance.index not in self._drains_s:
            self._drains_s[instance.index] = remaining_s(self._view, instance)
        return self._drains_s[instance.index]
