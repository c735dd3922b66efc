"""The QLM planner at work: when to plan anew, and how a plan becomes LSOs.

Between plans, new groups are inserted where they cost least, with everything else left as it is. A new plan is made
when the present one is expected to miss SLOs, and the state has moved since the last or the expectation has become
worse; it replaces the present one only if it is cheaper. Operations follow from the plan: a head group whose model is
not active asks for a swap, one that would miss its SLO behind less urgent running requests for an eviction, and models
that will be needed are staged ahead. With ``placement_interval_s`` the placement program says which, and instances
without work load the models that are expected to be asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from planners.base import Planner
from planners.dispatch import order_queue
from planners.qlm.construct import insert_all
from planners.qlm.dedication import dedicate
from planners.qlm.layers import Layers, prepare
from planners.qlm.operations import make_way, stage_ahead
from planners.qlm.plan import Plan
from planners.qlm.proactive import Proactive
from planners.qlm.problem import Outputs, Problem, class_outputs, make_problem
from planners.qlm.report import PlannerCounters, PlanReport
from planners.spec import QlmSpec
from qlm_env.lso import Lso
from qlm_env.view import ClusterView, GroupView

VIOLATION = 0.5
"""A plan of this cost or less is expected to meet every SLO; one that got so much worse is made anew."""


class QlmPlanner(Planner):
    """QLM: plans by insertion, improved by search and combined on SCIP.

    Args:
        outputs: what is known of the output lengths of a group's requests.
    """

    def __init__(self, spec: QlmSpec, outputs: Outputs = class_outputs) -> None:
        self._spec = spec
        self._outputs = outputs
        self._layers = Layers(spec)

    @property
    def counters(self) -> PlannerCounters:
        """What was counted since the start of the episode."""
        return self._layers.counters

    @property
    def report(self) -> PlanReport | None:
        """How the last solve went; None before the first."""
        return self._layers.report

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        prepare()
        self._rng = rng
        self._layers = Layers(self._spec)
        self._dedicated = None if self._spec.swap else dedicate(view)
        self._proactive: Proactive | None = None
        if self._spec.placement_interval_s > 0 and self._spec.swap:
            # A stream of its own, so that the search draws the same with and without it.
            self._proactive = Proactive(view, self._spec, self.counters, rng.spawn(1)[0])
        self._planned_at_s = -np.inf
        self._planned_cost = 0.0
        self._busy_until_s = np.full(len(view.instances), view.now_s)
        self._planned_state: tuple[object, ...] = ()

    def statistics(self) -> Mapping[str, int]:
        return self.counters.as_dict()

    def act(self, view: ClusterView) -> Sequence[Lso]:
        deadline = time.perf_counter() + self._spec.time_limit_s
        lsos: list[Lso] = []
        queues = {instance.index: instance.queue for instance in view.instances}
        groups = view.groups
        for instance in view.instances:
            if instance.num_running or queues[instance.index] or instance.coming_model is not None:
                self._busy_until_s[instance.index] = view.now_s
        if groups:
            wanted = self._plan(view, groups, queues, deadline)
            for instance in view.instances:
                lsos += order_queue(queues[instance.index], wanted[instance.index], instance.index)
            queues = wanted
        for instance in view.instances:
            queue = queues[instance.index]
            if queue and instance.up:
                lsos += make_way(view, instance, view.group(queue[0]), self._spec, self._outputs)
        if self._proactive is not None:
            self._proactive.update(view, deadline - time.perf_counter())
            lsos += self._proactive.operations(view, queues, lsos)
        if self._spec.warm_start and self._spec.swap:
            lsos += stage_ahead(view, lsos)
        return lsos

    def _plan(
        self, view: ClusterView, groups: list[GroupView], queues: dict[int, list[int]], deadline: float
    ) -> dict[int, list[int]]:
        """The queues wanted, by group id."""
        new = [group for group in groups if not group.queued]
        state = (tuple(map(tuple, queues.values())), tuple(g.id for g in new))
        due = view.now_s - self._planned_at_s >= self._spec.replan_interval_s
        if not new and not due:
            return queues
        groups = sorted(groups, key=lambda group: (group.deadline_s, group.id))
        window = groups[: self._spec.window_groups]
        problem = self._problem(view, window)
        plan = self._present_plan(problem, window, queues)
        moved = state != self._planned_state
        if not new and not moved and plan.total <= self._planned_cost + VIOLATION:
            return queues
        if due and plan.total > VIOLATION:
            plan = self._solve(problem, plan, deadline)
            self._planned_at_s = view.now_s
        self._planned_cost = plan.total
        wanted = {i: [window[k].id for k in plan.queue(i)] for i in queues}
        self._append_rest(wanted, groups, queues)
        self._planned_state = (tuple(map(tuple, wanted.values())), tuple(window[k].id for k in plan.queue(len(queues))))
        return wanted

    def _problem(self, view: ClusterView, window: list[GroupView]) -> Problem:
        problem = make_problem(view, window, self._spec, view.now_s - self._busy_until_s, self._outputs)
        if self._dedicated is None:
            return problem
        return problem._replace(allowed=problem.allowed & (problem.model[:, None] == self._dedicated[None, :]))

    def _present_plan(self, problem: Problem, window: list[GroupView], queues: dict[int, list[int]]) -> Plan:
        """The queues as they are, with new groups inserted where they cost least."""
        row = {group.id: k for k, group in enumerate(window)}
        plan = Plan.empty(len(queues), len(window))
        placed = set()
        for i, queue in queues.items():
            inside = [row[g] for g in queue if g in row]
            plan.sequence[i, : len(inside)] = inside
            plan.length[i] = len(inside)
            placed.update(inside)
        order = np.array([k for k in range(len(window)) if k not in placed], np.int32)
        plan.total = insert_all(problem, order, False, plan.sequence, plan.length, plan.costs)
        return plan

    def _solve(self, problem: Problem, present: Plan, deadline: float) -> Plan:
        """The cheapest plan found by ``deadline`` of the wall clock; the present one if that is as good."""
        return self._layers.solve(problem, present, self._rng, deadline)

    @staticmethod
    def _append_rest(wanted: dict[int, list[int]], groups: list[GroupView], queues: dict[int, list[int]]) -> None:
        """Groups beyond the window keep their queue, behind everything planned; in none, they stay in none."""
        planned = {g for queue in wanted.values() for g in queue}
        for group in groups:
            instance = group.instance
            if instance is not None and group.id not in planned and group.id in queues[instance]:
                wanted[instance].append(group.id)
