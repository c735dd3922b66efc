"""The layers of a solve: plans of simple rules, the search that improves the best of them, and SCIP to combine them.

Each layer can only improve on the ones before it. One that fails, or is late, is counted, and the plan is the best of
the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TypeVar

import numpy as np

from planners.qlm.column_generation import BackgroundBound, BoundSettings
from planners.qlm.construct import evaluate
from planners.qlm.cost import cost_of_holding
from planners.qlm.guard import SolverBusyError, SolverThread
from planners.qlm.heuristics import batched_edf_plan, edf_plan, inserted_plan
from planners.qlm.master import Column, MasterResult, solve_master
from planners.qlm.plan import Plan
from planners.qlm.problem import Problem, smallest_problem
from planners.qlm.report import PlannerCounters, PlanReport
from planners.qlm.sequencing import search_plan
from planners.spec import QlmSpec

R = TypeVar("R")

HEURISTICS: tuple[tuple[str, Callable[[Problem], Plan]], ...] = (
    ("edf", edf_plan),
    ("batched_edf", batched_edf_plan),
    ("insertion", inserted_plan),
)
LEAST_GAIN = 5e-2
"""A new plan must be cheaper than the present one by this share, so that plans do not flicker."""
SEARCH_SHARE = 0.6
"""Of the time left, the search may take so much if SCIP comes after it."""
LEAST_MASTER_S = 0.02
"""With less time left, SCIP is not called."""

_log = logging.getLogger(__name__)


@cache
def prepare() -> None:
    """Load what is compiled, or compile it: once in a process, and before a decision is timed."""
    problem = smallest_problem()
    for _, build in HEURISTICS:
        search_plan(problem, build(problem), np.random.default_rng(0), 1, 1.0)
    cost_of_holding(problem, 0)


class Layers:
    """Solves one planning problem after another.

    Attributes:
        counters: since the start of the episode.
    """

    def __init__(self, spec: QlmSpec) -> None:
        self._spec = spec
        self._solver: SolverThread[MasterResult] = SolverThread()
        self._report: PlanReport | None = None
        self._bound: BackgroundBound | None = None
        self.counters = PlannerCounters()

    @property
    def report(self) -> PlanReport | None:
        """Of the last solve; with ``bound_time_s``, its bound once that is found, until the next solve."""
        self._collect_bound()
        return self._report

    def solve(self, problem: Problem, present: Plan, rng: np.random.Generator, deadline: float) -> Plan:
        """The cheapest plan found by ``deadline`` (of ``time.perf_counter``); the present one if that is as good."""
        begin = time.perf_counter()
        failures: list[str] = []
        layer, best = "present", present
        plans = [present]
        for name, build in HEURISTICS:
            if time.perf_counter() < deadline:
                plans.append(build(problem))
                if plans[-1].total < best.total:
                    layer, best = name, plans[-1]
        left_s = deadline - time.perf_counter()
        share = SEARCH_SHARE if self._spec.polish else 1.0
        start = best
        searched = self._attempt(
            "sequencing",
            failures,
            lambda: search_plan(problem, start, rng, self._spec.iterations, share * max(0.0, left_s)),
        )
        if searched is not None:
            self.counters.timeouts += searched.timed_out
            plans.append(searched.plan)
            if searched.plan.total < best.total:
                layer, best = "sequencing", searched.plan
        if self._spec.polish:
            combined = self._combine(problem, plans, best, deadline, failures)
            if combined is not None and combined.total < best.total:
                layer, best = "master", combined
        if best.total >= present.total * (1.0 - LEAST_GAIN):
            layer, best = "present", present
        self.counters.solves += 1
        self.counters.adopted += best is not present
        self.counters.fallbacks += bool(failures)
        iterations = searched.iterations if searched is not None else 0
        self._report = PlanReport(best.total, layer, time.perf_counter() - begin, iterations, failures=tuple(failures))
        if self._spec.bound_time_s > 0:
            self._begin_bound(problem, best)
        return best

    def _begin_bound(self, problem: Problem, plan: Plan) -> None:
        """Look for a bound in the background, which no decision depends on; that of the solve before is given up."""
        if self._bound is not None:
            self._bound.interrupt()
        settings = BoundSettings(time_limit_s=self._spec.bound_time_s, polish=False)
        self._bound = BackgroundBound(problem, plan.copy(), settings)

    def _collect_bound(self) -> None:
        """Put a bound that has been found into the report."""
        if self._bound is None or self._report is None or not self._bound.finished:
            return
        result = self._attempt("bound", [], self._bound.result)
        self._bound = None
        if result is not None:
            self._report = replace(self._report, bound=result.bound)

    def _combine(
        self, problem: Problem, plans: list[Plan], best: Plan, deadline: float, failures: list[str]
    ) -> Plan | None:
        """What SCIP makes of the queues of all plans, in its own thread; None if it fails or is late."""
        left_s = deadline - time.perf_counter()
        if left_s < LEAST_MASTER_S:
            self.counters.timeouts += 1
            return None
        num_groups = problem.allowed.shape[0]
        columns: dict[tuple[int | None, tuple[int, ...]], Column] = {}
        for plan in plans:
            for column in _columns(problem, plan):
                columns.setdefault((column.instance, column.groups), column)
        start = [columns[column.instance, column.groups] for column in _columns(problem, best)]

        def solve() -> MasterResult:
            return solve_master(list(columns.values()), num_groups, start, 0.5 * left_s, self._spec.node_limit)

        result = self._attempt("master", failures, lambda: self._solver.run(solve, left_s))
        return None if result is None else _plan_of(problem, result.columns)

    def _attempt(self, layer: str, failures: list[str], solve: Callable[[], R]) -> R | None:
        """What ``solve`` returns; None, counted and logged, if it raises an error or returns nothing."""
        try:
            result = solve()
        except (TimeoutError, SolverBusyError) as error:
            self.counters.timeouts += 1
            reason = str(error)
        # Whatever a solver raises, the episode goes on with another layer's plan.
        except Exception as error:
            self.counters.failures += 1
            reason = f"{type(error).__name__}: {error}"
        else:
            if result is not None:
                return result
            self.counters.failures += 1
            reason = "no plan was returned"
        failures.append(f"{layer}: {reason}")
        _log.warning("%s failed (%s); the plan is the best of the other layers", layer, reason)
        return None


def _columns(problem: Problem, plan: Plan) -> list[Column]:
    num_instances = len(plan.length) - 1
    queues = [Column(i, tuple(plan.queue(i)), float(plan.costs[i])) for i in range(num_instances) if plan.length[i]]
    return queues + [Column(None, (g,), float(cost_of_holding(problem, g))) for g in plan.queue(num_instances)]


def _plan_of(problem: Problem, columns: list[Column]) -> Plan:
    num_groups, num_instances = problem.allowed.shape
    plan = Plan.empty(num_instances, num_groups)
    for column in columns:
        i = num_instances if column.instance is None else column.instance
        start = plan.length[i]
        plan.sequence[i, start : start + len(column.groups)] = column.groups
        plan.length[i] += len(column.groups)
    plan.total = evaluate(problem, plan.sequence, plan.length, plan.costs)
    return plan
