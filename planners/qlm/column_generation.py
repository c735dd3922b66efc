"""Bound and polish: how good the cheapest plan can be, by column generation over whole virtual queues.

A plan is a choice of queues (columns), with ``x_c`` for a queue of a class of alike instances, ``a_gc`` how often it
holds group ``g`` and ``n_k`` the instances of class ``k``:

``min sum_c cost_c x_c + sum_g hold_g y_g``  subject to  ``sum_c a_gc x_c + y_g = 1`` for each group,
``sum_{c of k} x_c <= n_k`` for each class, ``x, y >= 0``.

SCIP solves this for the columns there are; :mod:`planners.qlm.pricing` adds those that would lower it. For any prices
``p`` with ``p_g <= hold_g``, the optimal ones or not,

``sum_g p_g + sum_k n_k * (least reduced cost of a queue of class k under p)``

is at most the cost of every plan, so there is a bound from the first round on, and pricing at points between the best
prices so far and SCIP's makes it rise steadily. Pricing and these columns use relaxed costs. The queues found are then
given their true costs, and SCIP combines them with the plan's own into one that is never worse.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyscipopt
from pyscipopt.scip import PY_SCIP_PARAMSETTING as SCIP_PARAMSETTING
from pyscipopt.scip import PY_SCIP_RESULT as SCIP_RESULT

from planners.qlm.construct import evaluate
from planners.qlm.cost import cost_of_holding, cost_of_queue
from planners.qlm.cost_tables import largest_prices, make_tables, relaxed_cost
from planners.qlm.master import Column, solve_master
from planners.qlm.plan import Plan
from planners.qlm.pricing import chain_of, make_workspace, price
from planners.qlm.problem import Float, Problem

SMOOTHING = 0.7
"""Weight of the best prices so far against SCIP's when pricing."""
FIRST_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the plan's costs that are tried as first prices: too high ones give a bound below 0."""
COLUMNS_PER_CLASS = 3
"""Queues added per class of instances and round, at most."""
LEAST_REDUCTION = 1e-6
"""A column must lower the cost by more than this, relative to the plan's, to be added."""
CLOSED = 1e-4
"""The bound counts as reached when the columns cannot raise it by more than this share."""
ROUNDING = 1e-9
"""Share of the bound given up for rounding errors."""
LATER_SHARE = 0.3
"""Of the time, kept for the finer stages."""
POLISH_COLUMNS = 2000
POLISH_NODES = 1000


@dataclass(frozen=True, slots=True)
class Resolution:
    """How many states pricing keeps apart."""

    time_cells: int
    """Cells for the beginnings of runs."""
    count_cells: int
    """Cells for the requests in a run."""
    labels: int
    """Chains in a cell."""


@dataclass(frozen=True, slots=True)
class BoundSettings:
    """How fine the relaxation is and how long it may take."""

    time_limit_s: float = 10.0
    """Wall-clock guard of bounding; polishing has as much again."""
    round_limit: int = 500
    """The reproducible limit: rounds of pricing."""
    time_steps: int = 512
    """Points of the cost tables."""
    stages: tuple[Resolution, ...] = (Resolution(24, 12, 2), Resolution(48, 24, 8), Resolution(96, 48, 24))
    """Each starts from the prices and the queues of the one before it."""
    polish: bool = True
    """Combine the queues found with those of the plan."""


@dataclass(frozen=True, slots=True)
class BoundResult:
    """What bounding a plan gave."""

    bound: float
    """No plan costs less."""
    plan: Plan
    """The plan given, or a cheaper one."""
    rounds: int
    columns: int
    converged: bool
    """The relaxation is solved: more time would not raise the bound."""
    time_s: float

    @property
    def gap(self) -> float:
        """``(cost - bound)/cost``: at most what a better plan could save."""
        return 1.0 - self.bound / self.plan.total if self.plan.total > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class _Priced:
    """A queue that pricing found; groups may occur more than once."""

    instances: int
    """Its class of alike instances."""
    groups: tuple[int, ...]
    cost: float
    """Relaxed."""


class _Pricing:
    """Queues under prices on groups, for each class of alike instances."""

    def __init__(self, problem: Problem, settings: BoundSettings) -> None:
        self.problem = problem
        self.tables = make_tables(problem, settings.time_steps)
        self.classes = _alike(problem)
        self.count = np.array([len(members) for members in self.classes], float)
        self.hold = np.array([cost_of_holding(problem, g) for g in range(len(problem.requests))])
        self._largest = np.minimum(self.hold, largest_prices(problem, self.tables))

    def refine(self, resolution: Resolution, deadline: float) -> None:
        """Price like this from now on, until ``deadline`` (of ``time.perf_counter``)."""
        self._work = make_workspace(self.problem, resolution.time_cells, resolution.count_cells, resolution.labels)
        self._deadline = deadline

    def late(self) -> bool:
        """Whether time is up."""
        return time.perf_counter() > self._deadline

    def price(self, prices: Float) -> tuple[float, list[_Priced]]:
        """The bound that ``prices`` (K,) give, and the queues of least reduced cost; no bound if time is up before."""
        prices = np.minimum(prices, self._largest)
        bound = float(prices.sum())
        found: list[_Priced] = []
        for k, members in enumerate(self.classes):
            if self.late():
                return -math.inf, found
            bound += self.count[k] * price(self.problem, self.tables, self._work, members[0], prices)
            costs = self._work.last_cost
            for g in np.argsort(costs, kind="stable")[:COLUMNS_PER_CLASS]:
                if costs[g] < 0.0 and (chain := chain_of(self._work, int(g))) is not None:
                    found.append(_Priced(k, tuple(chain), float(costs[g] + prices[chain].sum())))
        return bound - ROUNDING * abs(bound), found

    def columns_of(self, plan: Plan) -> tuple[list[_Priced], Float]:
        """A plan's queues with relaxed costs, and what each group costs in it (K,): a first guess of its price."""
        columns: list[_Priced] = []
        prices = self.hold.copy()
        for k, members in enumerate(self.classes):
            for i in members:
                groups = plan.queue(i)
                if groups:
                    column, shares = self._relaxed(k, tuple(groups))
                    columns.append(column)
                    prices[groups] = shares
        return columns, prices

    def costed_anew(self, queues: Iterable[tuple[int, tuple[int, ...]]]) -> list[_Priced]:
        """Queues (class and groups) at relaxed costs that no merging of states has lowered; those without repeats."""
        return [self._relaxed(k, groups)[0] for k, groups in queues if len(set(groups)) == len(groups)]

    def _relaxed(self, k: int, groups: tuple[int, ...]) -> tuple[_Priced, Float]:
        shares = np.empty(len(groups))
        i = self.classes[k][0]
        cost = relaxed_cost(self.problem, self.tables, i, np.array(groups, np.int32), shares)
        return _Priced(k, groups, float(cost)), shares


def _alike(problem: Problem) -> list[list[int]]:
    """Instances in classes within which every array of the problem is equal."""
    arrays = [np.atleast_2d(value.T).reshape(len(problem.ready_s), -1) for value in _per_instance(problem)]
    rows = np.concatenate(arrays, axis=1)
    classes: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        classes.setdefault(row.tobytes(), []).append(i)
    return list(classes.values())


def _per_instance(problem: Problem) -> list[Float]:
    per_group = (
        problem.allowed,
        problem.interval_s,
        problem.batch,
        problem.latency_s,
        problem.latency_growth_s,
        problem.load_s.T,
        problem.unload_s.T,
    )
    alone = (problem.start_model, problem.ready_s, problem.present, problem.drain_s, problem.swap_cost)
    return [np.asarray(array, np.float64) for array in (*per_group, *alone)]


class _QueuePricer(pyscipopt.Pricer):
    """Adds queues to SCIP's master, and keeps the best bound."""

    def __init__(self, pricing: _Pricing, guess: Float, round_limit: int, stop: threading.Event) -> None:
        self._pricing = pricing
        self._round_limit = round_limit
        self._stop = stop
        self._tolerance = LEAST_REDUCTION * max(1e-6, float(guess.sum()))
        self.best_prices = guess
        """Those that gave the bound."""
        self.cover: list[Any] = []
        self.limits: list[Any] = []
        self.columns: dict[tuple[int, tuple[int, ...]], float] = {}
        self.bound = 0.0
        self.rounds = 0
        self.converged = False
        self.error: Exception | None = None

    def add(self, column: _Priced, priced: bool) -> None:
        """Make a queue a variable; ``priced`` while SCIP is solving."""
        self.columns[column.instances, column.groups] = column.cost
        variable = self.model.addVar(obj=column.cost, pricedVar=priced)
        for g in set(column.groups):
            self.model.addConsCoeff(self.cover[g], variable, float(column.groups.count(g)))
        self.model.addConsCoeff(self.limits[column.instances], variable, 1.0)

    def pricerinit(self) -> None:
        self.cover = [self.model.getTransformedCons(row) for row in self.cover]
        self.limits = [self.model.getTransformedCons(row) for row in self.limits]

    def pricerredcost(self) -> dict[str, Any]:
        try:
            self._round()
        except Exception as error:
            # SCIP's callbacks cannot raise.
            self.error = error
        return {"result": SCIP_RESULT.SUCCESS}

    def pricerfarkas(self) -> dict[str, Any]:
        return {"result": SCIP_RESULT.SUCCESS}

    def _round(self) -> None:
        """Price once; a round that adds nothing ends the solve."""
        if self.converged or self._pricing.late() or self.rounds >= self._round_limit or self._stop.is_set():
            return
        self.rounds += 1
        duals = np.array([self.model.getDualsolLinear(row) for row in self.cover])
        of_class = np.array([self.model.getDualsolLinear(row) for row in self.limits])
        value = float(duals.sum() + self._pricing.count @ of_class)
        for smoothing in (SMOOTHING, 0.0):
            point = smoothing * self.best_prices + (1.0 - smoothing) * duals
            bound, found = self._pricing.price(point)
            if bound > self.bound:
                self.bound, self.best_prices = bound, point
            if self.bound >= value * (1.0 - CLOSED):
                break
            fresh = [
                column
                for column in found
                if column.cost - duals[list(column.groups)].sum() - of_class[column.instances] < -self._tolerance
                and column.cost < self.columns.get((column.instances, column.groups), math.inf)
            ]
            if fresh:
                for column in fresh:
                    self.add(column, True)
                return
            if self._pricing.late():
                return
        self.converged = True


def bound_plan(
    problem: Problem, plan: Plan, settings: BoundSettings, stop: threading.Event | None = None
) -> BoundResult:
    """A lower bound on the cost of every plan, and ``plan`` or a cheaper one.

    Args:
        stop: once set, ends the work early with what there is; may be set by another thread.
    """
    begin_s = time.perf_counter()
    stop = threading.Event() if stop is None else stop
    pricing = _Pricing(problem, settings)
    columns, guess = pricing.columns_of(plan)
    bound, rounds = 0.0, 0
    found: dict[tuple[int, tuple[int, ...]], float] = {}
    for k, resolution in enumerate(settings.stages, 1):
        later = LATER_SHARE * (1.0 - k / len(settings.stages))
        pricing.refine(resolution, begin_s + settings.time_limit_s * (1.0 - later))
        if k == 1:
            bound, guess = _first_prices(pricing, guess, stop)
        pricer = _QueuePricer(pricing, guess, settings.round_limit - rounds, stop)
        _generate(pricing, pricer, columns, settings.time_limit_s)
        bound, rounds, guess = max(bound, pricer.bound), rounds + pricer.rounds, pricer.best_prices
        found |= pricer.columns
        columns = pricing.costed_anew(found)
    best = plan
    if settings.polish and not stop.is_set():
        best = _polish(pricing, list(found), guess, plan, settings)
    return BoundResult(
        bound=min(bound, best.total),
        plan=best,
        rounds=rounds,
        columns=len(found),
        converged=pricer.converged,
        time_s=time.perf_counter() - begin_s,
    )


def _first_prices(pricing: _Pricing, guess: Float, stop: threading.Event) -> tuple[float, Float]:
    """The share of ``guess`` (K,) with the highest bound, and that bound."""
    best = 0.0, guess
    for share in FIRST_SHARES:
        bound, _ = pricing.price(share * guess)
        if bound <= best[0] or stop.is_set():
            break
        best = bound, share * guess
    return best


def _generate(pricing: _Pricing, pricer: _QueuePricer, columns: list[_Priced], time_limit_s: float) -> None:
    """Solve the master over whole queues, beginning with ``columns``; what is found stays in ``pricer``."""
    model = pyscipopt.Model("qlm-bound")
    model.hideOutput()
    model.setParam("parallel/maxnthreads", 1)
    model.setParam("limits/time", time_limit_s)
    model.setPresolve(SCIP_PARAMSETTING.OFF)
    model.setHeuristics(SCIP_PARAMSETTING.OFF)
    model.setSeparating(SCIP_PARAMSETTING.OFF)
    model.disablePropagation()
    model.includePricer(pricer, "queues", "virtual queues of negative reduced cost")
    for cost in pricing.hold:
        held = model.addVar(obj=float(cost))
        pricer.cover.append(model.addCons(held == 1.0, separate=False, modifiable=True))
    for count in pricing.count:
        # A row needs a variable; this one cannot be chosen.
        none = model.addVar(ub=0.0)
        pricer.limits.append(model.addCons(none <= count, separate=False, modifiable=True))
    for column in columns:
        pricer.add(column, False)
    model.optimizeNogil()
    if pricer.error is not None:
        raise pricer.error


def _polish(
    pricing: _Pricing, found: list[tuple[int, tuple[int, ...]]], prices: Float, plan: Plan, settings: BoundSettings
) -> Plan:
    """The cheapest plan of the queues found, at true costs, and of those of ``plan``; ``prices`` (K,) tell the best."""
    problem = pricing.problem
    num_groups, num_instances = problem.allowed.shape
    reduced: dict[tuple[int, tuple[int, ...]], tuple[float, float]] = {}
    for k, groups in found:
        once = tuple(dict.fromkeys(groups))
        if (k, once) not in reduced:
            cost = float(cost_of_queue(problem, pricing.classes[k][0], np.array(once, np.int32)))
            reduced[k, once] = (cost - float(prices[list(once)].sum()), cost)
    promising = sorted(reduced, key=lambda key: (reduced[key][0], key))[:POLISH_COLUMNS]
    held = [Column(None, (g,), float(pricing.hold[g])) for g in range(num_groups)]
    columns = {(column.instance, column.groups): column for column in held}
    for k, groups in promising:
        for i in pricing.classes[k]:
            columns[i, groups] = Column(i, groups, reduced[k, groups][1])
    start = []
    for i in range(num_instances):
        queue = tuple(plan.queue(i))
        if queue:
            start.append(columns.setdefault((i, queue), Column(i, queue, float(plan.costs[i]))))
    start += [held[g] for g in plan.queue(num_instances)]
    result = solve_master(list(columns.values()), num_groups, start, settings.time_limit_s, POLISH_NODES)
    polished = Plan.empty(num_instances, num_groups)
    for column in result.columns:
        i = num_instances if column.instance is None else column.instance
        begin = polished.length[i]
        polished.sequence[i, begin : begin + len(column.groups)] = column.groups
        polished.length[i] += len(column.groups)
    polished.total = float(evaluate(problem, polished.sequence, polished.length, polished.costs))
    return polished if polished.total < plan.total else plan


class BackgroundBound:
    """:func:`bound_plan` in a thread of its own: neither SCIP nor pricing holds the interpreter lock for long."""

    def __init__(self, problem: Problem, plan: Plan, settings: BoundSettings) -> None:
        self._stop = threading.Event()
        self._result: BoundResult | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(problem, plan, settings), daemon=True)
        self._thread.start()

    def _run(self, problem: Problem, plan: Plan, settings: BoundSettings) -> None:
        try:
            self._result = bound_plan(problem, plan, settings, self._stop)
        except Exception as error:
            self._error = error

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive()

    def interrupt(self) -> None:
        """End the work after the round of pricing in progress, without waiting for that."""
        self._stop.set()

    def result(self, interrupt: bool = False) -> BoundResult:
        """Wait for the result; ``interrupt`` ends the work after the round of pricing in progress.

        Raises:
            Exception: what stopped the work.
        """
        if interrupt:
            self.interrupt()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result
