"""Either published program as a planner for small clusters.

As in the paper, queues are planned anew when the estimate predicts that a deadline in them will be missed. A program
takes the most urgent groups; the rest follows them in order of deadline. In between, a new group goes to the end of
the queue that is expected to finish it first. When a program has no solution its relaxation is solved; whatever leaves
no plan at all (a limit, an error in the solver) is counted, and the queues are put in order of deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from planners.base import Planner
from planners.dispatch import EarliestCompletion, order_queue, swap_to_head
from planners.qlm.guard import SolverBusyError, SolverThread
from planners.qlm.problem import make_problem
from planners.qlm.published.chance_program import normal_quantile, solve_chance_program
from planners.qlm.published.slot_model import Limits, Solution
from planners.qlm.published.slot_problem import (
    TOLERANCE_S,
    Goal,
    Queues,
    SlotProblem,
    completions,
    cost,
    slot_problem,
)
from planners.qlm.published.slot_program import solve_slot_program
from planners.qlm.report import PlannerCounters
from planners.spec import QlmSpec, QlmV1Spec, QlmV2Spec
from qlm_env.lso import Lso
from qlm_env.view import ClusterView, GroupView

Program = Callable[[SlotProblem, Goal, Limits], Solution]

SOLVER_SHARE = 0.8
"""Of the time left for a decision, SCIP may take so much; the rest is for what it does after its clock has run out."""


@dataclass(slots=True)
class PublishedCounters(PlannerCounters):
    """Over an episode so far. A fallback is a solve after which queues were put in order of deadline."""

    proven: int = 0
    """Solves whose plan is optimal, for the program or its relaxation."""
    relaxed: int = 0
    """Solves that minimised lateness, for not all deadlines could be met or no way to was found."""


class PublishedPlanner(Planner):
    """QLM's slot program, or its chance-constrained one.

    Attributes:
        counters: since the start of the episode.
    """

    def __init__(self, spec: QlmV1Spec | QlmV2Spec) -> None:
        self._spec = spec
        self._quantile = 0.0
        self._program: Program = solve_slot_program
        if isinstance(spec, QlmV1Spec):
            self._quantile = normal_quantile(spec.confidence)
            self._program = partial(solve_chance_program, confidence=spec.confidence)
        self._dispatcher = EarliestCompletion()

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        self._dispatcher.reset()
        self._solver: SolverThread[Solution] = SolverThread()
        self._planned_at_s = -np.inf
        self.counters = PublishedCounters()

    def statistics(self) -> Mapping[str, int]:
        return self.counters.as_dict()

    def act(self, view: ClusterView) -> Sequence[Lso]:
        deadline = time.perf_counter() + self._spec.time_limit_s
        queues = {instance.index: instance.queue for instance in view.instances}
        groups = sorted(view.groups, key=lambda group: (group.deadline_s, group.id))
        wanted = self._dispatch(view, groups, queues)
        if view.now_s - self._planned_at_s >= self._spec.replan_interval_s:
            wanted = self._plan(view, groups, wanted, deadline)
        lsos: list[Lso] = []
        for instance in view.instances:
            queue = wanted[instance.index]
            lsos += order_queue(queues[instance.index], queue, instance.index)
            if queue and instance.up:
                lsos += swap_to_head(view, instance, queue[0])
        return lsos

    def _dispatch(
        self, view: ClusterView, groups: list[GroupView], queues: Mapping[int, list[int]]
    ) -> dict[int, list[int]]:
        """The queues with new groups behind, and those of an instance that is down elsewhere, where possible."""
        wanted = {i: list(queue) for i, queue in queues.items()}
        for group in groups:
            place = next((i for i, queue in wanted.items() if group.id in queue), None)
            if place is not None and view.instances[place].up:
                continue
            options = [instance for instance in view.instances if _may_take(view, instance.index, group)]
            if options:
                if place is not None:
                    wanted[place].remove(group.id)
                wanted[self._dispatcher.choose(view, group, options, wanted).index].append(group.id)
        return wanted

    def _plan(
        self, view: ClusterView, groups: list[GroupView], queues: dict[int, list[int]], deadline: float
    ) -> dict[int, list[int]]:
        """The queues wanted, by group id; as they are while no deadline is at risk."""
        window = [group for group in groups if any(_may_take(view, i, group) for i in queues)]
        window = window[: self._spec.window_groups]
        if not window:
            return queues
        row = {group.id: k for k, group in enumerate(window)}
        slots = slot_problem(make_problem(view, window, QlmSpec(), np.zeros(len(queues))))
        present = [[row[g] for g in queue if g in row] for queue in queues.values()]
        if not self._at_risk(slots, present):
            return queues
        self._planned_at_s = view.now_s
        plan = self._solve(slots, [sorted(rows) for rows in present], deadline)
        wanted: dict[int, list[int]] = {}
        for (i, queue), order in zip(queues.items(), plan, strict=True):
            behind = [group.id for group in groups if group.id in queue and group.id not in row]
            # What an instance that is down still holds has nowhere to go, and cannot be moved.
            wanted[i] = [window[k].id for k in order] + behind if view.instances[i].up else queue
        return wanted

    def _at_risk(self, slots: SlotProblem, present: Queues) -> bool:
        return any(
            mean_s + self._quantile * std_s > slots.deadline_s[g] + TOLERANCE_S
            for i, order in enumerate(present)
            for g, (mean_s, std_s) in zip(order, completions(slots, i, order), strict=True)
        )

    def _solve(self, slots: SlotProblem, by_deadline: Queues, deadline: float) -> Queues:
        """The program's queues, its relaxation's, or those given."""
        self.counters.solves += 1
        for goal in Goal:
            self.counters.relaxed += goal is Goal.TARDINESS
            solution = self._attempt(slots, goal, deadline - time.perf_counter())
            if solution is None or solution.queues is None:
                continue
            self.counters.proven += solution.status == "optimal"
            if solution.status == "optimal" or self._lateness(slots, solution.queues) <= self._lateness(
                slots, by_deadline
            ):
                self.counters.adopted += 1
                return solution.queues
        self.counters.fallbacks += 1
        return by_deadline

    def _attempt(self, slots: SlotProblem, goal: Goal, left_s: float) -> Solution | None:
        limits = Limits(self._spec.node_limit, SOLVER_SHARE * left_s)
        try:
            solution = self._solver.run(lambda: self._program(slots, goal, limits), max(0.0, left_s))
        except (TimeoutError, SolverBusyError):
            self.counters.timeouts += 1
            return None
        # SCIP's interface raises plain Exceptions; an episode goes on whatever they say.
        except Exception:
            self.counters.failures += 1
            return None
        self.counters.timeouts += solution.status == "limit"
        return solution

    def _lateness(self, slots: SlotProblem, queues: Queues) -> float:
        return cost(slots, queues, Goal.TARDINESS, self._quantile)


def _may_take(view: ClusterView, i: int, group: GroupView) -> bool:
    instance = view.instances[i]
    return instance.up and instance.fits(group.model) and (group.movable or group.instance == i)
