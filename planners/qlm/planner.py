"""The QLM planner at work: when to plan anew, and how a plan becomes LSOs.

Between plans, new groups are inserted where they cost least, with everything else left as it is. A new plan is made
when the present one is expected to miss SLOs and the state has moved since the last; it replaces the present one
only if it is cheaper. Operations follow from the plan: a head group whose model is not active asks for a swap, one
that would miss its SLO behind less urgent running requests for an eviction, and models that will be needed are staged
ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planners.base import Planner
from planners.dispatch import order_queue, swap_to_head
from planners.qlm.construct import evaluate, improve, insert_all
from planners.qlm.cost import cost_of_holding
from planners.qlm.master import Column, solve_master
from planners.qlm.problem import Float, Int, Problem, make_problem
from planners.rwt import group_service, remaining_s
from planners.spec import QlmSpec
from qlm_env.lso import Evict, Lso, WarmStart
from qlm_env.view import ClusterView, GroupView, InstanceView

IMPROVEMENT_ROUNDS = 2
LEAST_GAIN = 1e-3
"""A new plan must be cheaper than the present one by this share, so that plans do not flicker."""
URGENCY_FACTOR = 3.0
"""An eviction is considered when the running requests have this many times the slack of the waiting head."""


@dataclass
class Plan:
    """Groups (rows of the problem) of each instance in order; the last row is held back."""

    sequence: Int
    """(I + 1, K)"""
    length: Int
    """(I + 1,)"""
    costs: Float
    """(I + 1,)"""
    total: float

    @classmethod
    def empty(cls, num_instances: int, num_groups: int) -> Plan:
        return cls(
            np.zeros((num_instances + 1, num_groups), np.int32),
            np.zeros(num_instances + 1, np.int32),
            np.zeros(num_instances + 1),
            0.0,
        )

    def copy(self) -> Plan:
        return Plan(self.sequence.copy(), self.length.copy(), self.costs.copy(), self.total)

    def queue(self, i: int) -> list[int]:
        return [int(g) for g in self.sequence[i, : self.length[i]]]


class QlmPlanner(Planner):
    """QLM with plans combined on SCIP."""

    def __init__(self, spec: QlmSpec) -> None:
        self._spec = spec

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        self._rng = rng
        self._planned_at_s = -np.inf
        self._busy_until_s = np.full(len(view.instances), view.now_s)
        self._planned_state: tuple[object, ...] = ()
        self.solves = 0
        self.solves_proven = 0

    def act(self, view: ClusterView) -> Sequence[Lso]:
        lsos: list[Lso] = []
        queues = {instance.index: instance.queue for instance in view.instances}
        groups = view.groups
        for instance in view.instances:
            if instance.num_running or queues[instance.index] or instance.coming_model is not None:
                self._busy_until_s[instance.index] = view.now_s
        if groups:
            wanted = self._plan(view, groups, queues)
            for instance in view.instances:
                lsos += order_queue(queues[instance.index], wanted[instance.index], instance.index)
            queues = wanted
        for instance in view.instances:
            queue = queues[instance.index]
            if queue and instance.up:
                lsos += self._make_way(view, instance, view.group(queue[0]))
        if self._spec.warm_start:
            lsos += self._stage_ahead(view)
        return lsos

    # ----------------------------------------------------------------- planning
    def _plan(self, view: ClusterView, groups: list[GroupView], queues: dict[int, list[int]]) -> dict[int, list[int]]:
        """The queues wanted, by group id."""
        new = [group for group in groups if not group.queued]
        state = (tuple(map(tuple, queues.values())), tuple(g.id for g in new))
        due = view.now_s - self._planned_at_s >= self._spec.replan_interval_s
        if not new and (not due or state == self._planned_state):
            return queues
        groups = sorted(groups, key=lambda group: (group.deadline_s, group.id))
        window = groups[: self._spec.window_groups]
        problem = make_problem(view, window, self._spec, view.now_s - self._busy_until_s)
        plan = self._present_plan(problem, window, queues)
        if due and plan.total > 0.5:
            plan = self._solve(problem, plan)
            self._planned_at_s = view.now_s
        wanted = {i: [window[k].id for k in plan.queue(i)] for i in queues}
        self._append_rest(wanted, groups, queues)
        self._planned_state = (tuple(map(tuple, wanted.values())), tuple(window[k].id for k in plan.queue(len(queues))))
        return wanted

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

    def _solve(self, problem: Problem, present: Plan) -> Plan:
        """The cheapest plan SCIP can combine from the present one, EDF's and randomised insertions."""
        num_groups, num_instances = problem.allowed.shape
        urgency = problem.first_slack_s
        by_deadline = np.argsort(urgency, kind="stable").astype(np.int32)
        edf = Plan.empty(num_instances, num_groups)
        edf.total = insert_all(problem, by_deadline, True, edf.sequence, edf.length, edf.costs)
        plans = [present, edf]
        for base in (present, edf):
            better = base.copy()
            better.total = improve(
                problem, by_deadline, better.sequence, better.length, better.costs, IMPROVEMENT_ROUNDS
            )
            plans.append(better)
        for _ in range(self._spec.trial_plans):
            noise = self._rng.lognormal(0.0, 0.5, num_groups)
            order = np.argsort(np.maximum(urgency, 0.0) * noise, kind="stable").astype(np.int32)
            trial = Plan.empty(num_instances, num_groups)
            trial.total = insert_all(problem, order, False, trial.sequence, trial.length, trial.costs)
            plans.append(trial)
        best = min(plans, key=lambda plan: plan.total)
        columns: dict[tuple[int | None, tuple[int, ...]], Column] = {}
        for plan in plans:
            for column in self._columns(problem, plan):
                columns.setdefault((column.instance, column.groups), column)
        start = [columns[column.instance, column.groups] for column in self._columns(problem, best)]
        result = solve_master(list(columns.values()), num_groups, start, self._spec.time_limit_s, self._spec.node_limit)
        self.solves += 1
        self.solves_proven += result.optimal
        combined = self._plan_of(problem, result.columns)
        return combined if combined.total < present.total * (1 - LEAST_GAIN) else present

    def _columns(self, problem: Problem, plan: Plan) -> list[Column]:
        num_instances = len(plan.length) - 1
        queues = [Column(i, tuple(plan.queue(i)), float(plan.costs[i])) for i in range(num_instances) if plan.length[i]]
        return queues + [Column(None, (g,), float(cost_of_holding(problem, g))) for g in plan.queue(num_instances)]

    def _plan_of(self, problem: Problem, columns: list[Column]) -> Plan:
        num_groups, num_instances = problem.allowed.shape
        plan = Plan.empty(num_instances, num_groups)
        for column in columns:
            i = num_instances if column.instance is None else column.instance
            start = plan.length[i]
            plan.sequence[i, start : start + len(column.groups)] = column.groups
            plan.length[i] += len(column.groups)
        plan.total = evaluate(problem, plan.sequence, plan.length, plan.costs)
        return plan

    @staticmethod
    def _append_rest(wanted: dict[int, list[int]], groups: list[GroupView], queues: dict[int, list[int]]) -> None:
        """Groups beyond the window keep their queue, behind everything planned; in none, they stay in none."""
        planned = {g for queue in wanted.values() for g in queue}
        for group in groups:
            instance = group.instance
            if instance is not None and group.id not in planned and group.id in queues[instance]:
                wanted[instance].append(group.id)

    # ----------------------------------------------------------------- operations
    def _make_way(self, view: ClusterView, instance: InstanceView, head: GroupView) -> list[Lso]:
        """Let the head group run: swap to its model, and evict what stands in its way if that saves its SLO."""
        lsos: list[Lso] = []
        evict = Evict(instance.index, self._spec.keep_kv)
        if self._spec.evict and self._eviction_saves(view, instance, head) and view.is_legal(evict):
            lsos.append(evict)
        return lsos + swap_to_head(view, instance, head.id)

    def _eviction_saves(self, view: ClusterView, instance: InstanceView, head: GroupView) -> bool:
        """Whether the head would miss behind the running batch, makes it without, and the batch can wait."""
        if instance.active_model is None or instance.num_running == 0:
            return False
        slack_s = head.deadline_s - view.now_s
        service, full = group_service(view, instance, head, float(head.waiting))
        if head.model == instance.active_model:
            wait_s = service.interval_s * max(0.0, instance.num_running + 1.0 - full)
            swap_s = 0.0
        else:
            wait_s = remaining_s(view, instance)
            swap_s = instance.swap_s(head.model) if instance.coming_model is None else 0.0
        alone_s = swap_s + float(service.latency_s)
        if not alone_s < slack_s < alone_s + wait_s:
            return False
        running = [request for request in instance.running() if request.group != head.id]
        return bool(running) and all(
            request.deadline_s - view.now_s > URGENCY_FACTOR * max(slack_s, alone_s) for request in running
        )

    def _stage_ahead(self, view: ClusterView) -> list[Lso]:
        """Stage the model most asked for among those an instance could serve only from storage."""
        demand = view.arrivals_per_model()
        by_demand = [int(model) for model in np.argsort(-demand, kind="stable") if demand[model] > 0]
        lsos: list[Lso] = []
        for instance in view.instances:
            if instance.staging or not instance.up:
                continue
            for model in by_demand:
                lso = WarmStart(instance.index, model)
                if instance.cold(model) and instance.has_host_memory_for(model) and view.is_legal(lso):
                    lsos.append(lso)
                    break
        return lsos
