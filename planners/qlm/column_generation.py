"""Bound and polish: how good the cheapest plan can be, by column generation over whole virtual queues.

A plan is a choice of queues (columns), with ``x_c`` for a queue of a class of alike instances, ``a_gc`` how often it
holds group ``g`` and ``n_k`` the instances of class ``k``:

``min sum_c cost_c x_c + sum_g hold_g y_g``  subject to  ``sum_c a_gc x_c + y_g = 1`` for each group,
``sum_{c of k} x_c <= n_k`` for each class, ``x, y >= 0``.

SCIP solves this for the columns there are; :mod:`planners.qlm.pricing` adds those that would lower it. For any prices
``p`` with ``p_g <= hold_g``, the optimal ones or not,

``sum_g p_g + sum_k n_k * (least reduced cost of a queue of class k under p)``

is at most the cost of every plan, so there is a bound from the first round on. SCIP's prices jump about while columns
are few. So they are kept in a box around the best so far, by two more columns for each group (the box step method of
Marsten, Hogan and Blankenship, Operations Research 23(3), 1975), pricing is done half way to them, and the box moves
along. Pricing starts from few states and goes on with more. It and these columns use relaxed costs. The queues found
are then given their true costs, and SCIP combines them with the plan's own into one that is never worse.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

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

SMOOTHING = 0.5
"""Weight of the best prices so far against SCIP's when pricing."""
FIRST_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the plan's costs that are tried as first prices: too high ones give a bound below 0."""
FIRST_WIDTH, LATER_WIDTH = 1.0, 0.2
"""Of the box in the first stage and in those that start from its prices; relative to these."""
BOX_FLOOR = 0.02
"""Share of its largest price by which a price of 0 can rise in a box of width 1."""
ROUNDS_IN_BOX = 6
"""After so many the box moves to the best prices."""
COLUMNS_PER_CLASS = 3
"""Queues added per class of instances and round, at most."""
CLOSED, CLOSED_EARLY = 1e-4, 1e-2
"""The bound counts as reached when the columns cannot raise it by more than this share; in all stages but the last."""
ROUNDING = 1e-9
"""Share of the bound given up for rounding errors, and by which numbers differ from a limit they are at."""
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
    time_steps: int = 1024
    """Points of the cost tables."""
    stages: tuple[Resolution, ...] = (Resolution(24, 24, 2), Resolution(96, 96, 3), Resolution(192, 192, 4))
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
        self.largest = np.minimum(self.hold, largest_prices(problem, self.tables))

    def refine(self, resolution: Resolution, deadline: float) -> None:
        """Price like this from now on, until ``deadline`` (of ``time.perf_counter``)."""
        self._work = make_workspace(self.problem, resolution.time_cells, resolution.count_cells, resolution.labels)
        self._deadline = deadline

    def late(self) -> bool:
        """Whether time is up."""
        return time.perf_counter() > self._deadline

    def price(self, prices: Float, pool: _Pool) -> tuple[float, list[_Priced]]:
        """The bound that ``prices`` (K,) give, and queues of less reduced cost than those of ``pool``.

        No bound if time is up before.
        """
        prices = np.minimum(prices, self.largest)
        bound = float(prices.sum())
        known = pool.least(prices)
        found: list[_Priced] = []
        for k, members in enumerate(self.classes):
            if self.late():
                return -math.inf, found
            bound += self.count[k] * price(self.problem, self.tables, self._work, members[0], prices, known[k])
            costs = self._work.last_cost
            for g in np.argsort(costs, kind="stable")[:COLUMNS_PER_CLASS]:
                if costs[g] < known[k] and (chain := chain_of(self._work, int(g))) is not None:
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
    alone = (
        problem.start_model,
        problem.ready_s,
        problem.present,
        problem.drain_s,
        problem.evict_s,
        problem.displaced_weight,
        problem.displaced_slack_s,
        problem.displaced_delay_cost,
        problem.swap_cost,
    )
    return [np.asarray(array, np.float64) for array in (*per_group, *alone)]


class _Pool:
    """The queues that are known, each with the least relaxed cost it was found at."""

    def __init__(self, num_classes: int) -> None:
        self.costs: dict[tuple[int, tuple[int, ...]], float] = {}
        self._num_classes = num_classes

    def add(self, column: _Priced) -> bool:
        """Whether it was not known at this cost."""
        key = column.instances, column.groups
        if column.cost >= self.costs.get(key, math.inf):
            return False
        self.costs[key] = column.cost
        return True

    def columns(self) -> list[_Priced]:
        return [_Priced(k, groups, cost) for (k, groups), cost in self.costs.items()]

    def least(self, prices: Float) -> Float:
        """Least reduced cost of a queue of each class, or 0, under ``prices`` (K,)."""
        least = np.zeros(self._num_classes)
        if self.costs:
            groups = np.fromiter((g for _, queue in self.costs for g in queue), np.int64)
            sizes = np.fromiter((len(queue) for _, queue in self.costs), np.int64)
            ends = np.cumsum(sizes)
            worth = np.add.reduceat(prices[groups], ends - sizes)
            of_class = np.fromiter((k for k, _ in self.costs), np.int64)
            np.minimum.at(least, of_class, np.fromiter(self.costs.values(), float) - worth)
        return least


class _Centre(NamedTuple):
    """The best prices so far."""

    prices: Float
    """(K,)"""
    bound: float
    """What these give."""

    def box(self, width: float, largest: Float) -> tuple[Float, Float]:
        """(K,) least and largest prices to look at, so far from the best relative to these; at most ``largest``."""
        reach = width * (self.prices + BOX_FLOOR * largest)
        return np.maximum(0.0, self.prices - reach), np.minimum(largest, self.prices + reach)


class _QueuePricer(pyscipopt.Pricer):
    """Adds queues to SCIP's master, and keeps the best prices."""

    def __init__(
        self, pricing: _Pricing, pool: _Pool, centre: _Centre, round_limit: int, closed: float, stop: threading.Event
    ) -> None:
        self._pricing = pricing
        self._pool = pool
        self._round_limit = round_limit
        self._closed = closed
        self._stop = stop
        self.cover: list[Any] = []
        self.limits: list[Any] = []
        self.best = centre
        self.rounds = 0
        self.solved = False
        """No prices in the box give a bound that is better by more than ``closed``."""
        self.error: Exception | None = None

    def add(self, column: _Priced, priced: bool) -> None:
        """Make a queue a variable; ``priced`` while SCIP is solving."""
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
        if self.solved or self.rounds >= self._round_limit or self._pricing.late() or self._stop.is_set():
            return
        duals = np.array([self.model.getDualsolLinear(row) for row in self.cover])
        of_class = np.array([self.model.getDualsolLinear(row) for row in self.limits])
        value = float(duals.sum() + self._pricing.count @ of_class)
        for smoothing in (SMOOTHING, 0.0):
            if self.best.bound >= value * (1.0 - self._closed):
                break
            self.rounds += 1
            point = smoothing * self.best.prices + (1.0 - smoothing) * duals
            bound, found = self._pricing.price(point, self._pool)
            if bound > self.best.bound:
                self.best = _Centre(point, bound)
            fresh = [column for column in found if self._pool.add(column)]
            for column in fresh:
                self.add(column, True)
            if fresh or self._pricing.late():
                return
        self.solved = True


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
    bound, rounds, converged = 0.0, 0, False
    found: dict[tuple[int, tuple[int, ...]], float] = {}
    for k, resolution in enumerate(settings.stages, 1):
        later = LATER_SHARE * (1.0 - k / len(settings.stages))
        pricing.refine(resolution, begin_s + settings.time_limit_s * (1.0 - later))
        pool = _Pool(len(pricing.classes))
        for column in columns:
            pool.add(column)
        centre = _first_prices(pricing, guess, pool, FIRST_SHARES if k == 1 else (1.0,), stop)
        is_last = k == len(settings.stages)
        closed, width = CLOSED if is_last else CLOSED_EARLY, FIRST_WIDTH if k == 1 else LATER_WIDTH
        converged = False
        while not (converged or pricing.late() or rounds >= settings.round_limit or stop.is_set()):
            round_limit = min(ROUNDS_IN_BOX, settings.round_limit - rounds)
            pricer = _QueuePricer(pricing, pool, centre, round_limit, closed, stop)
            inside = _generate(pricing, pricer, pool, centre.box(width, pricing.largest), settings.time_limit_s)
            converged = pricer.solved and inside
            if pricer.solved:
                width *= 4.0
            elif pricer.best is centre:
                width *= 0.5
            centre, rounds = pricer.best, rounds + pricer.rounds
        bound, guess = max(bound, centre.bound), centre.prices
        found |= pool.costs
        columns = pricing.costed_anew(found)
    best = plan
    if settings.polish and not stop.is_set():
        best = _polish(pricing, list(found), guess, plan, settings)
    return BoundResult(
        bound=min(bound, best.total),
        plan=best,
        rounds=rounds,
        columns=len(found),
        converged=converged,
        time_s=time.perf_counter() - begin_s,
    )


def _first_prices(
    pricing: _Pricing, guess: Float, pool: _Pool, shares: tuple[float, ...], stop: threading.Event
) -> _Centre:
    """The share of ``guess`` (K,) with the highest bound; the queues found meanwhile go to ``pool``."""
    guess = np.minimum(guess, pricing.largest)
    best = _Centre(shares[0] * guess, 0.0)
    for share in shares:
        if stop.is_set():
            break
        bound, found = pricing.price(share * guess, pool)
        for column in found:
            pool.add(column)
        if bound <= best.bound:
            break
        best = _Centre(share * guess, bound)
    return best


def _generate(
    pricing: _Pricing, pricer: _QueuePricer, pool: _Pool, box: tuple[Float, Float], time_limit_s: float
) -> bool:
    """Solve the master with prices in a box, over the queues of ``pool`` and those found, which are added there.

    Returns:
        whether its prices are within the box, so that they would be the same without it.
    """
    model = pyscipopt.Model("qlm-bound")
    model.hideOutput()
    model.setParam("parallel/maxnthreads", 1)
    model.setParam("limits/time", time_limit_s)
    model.setPresolve(SCIP_PARAMSETTING.OFF)
    model.setHeuristics(SCIP_PARAMSETTING.OFF)
    model.setSeparating(SCIP_PARAMSETTING.OFF)
    model.disablePropagation()
    model.includePricer(pricer, "queues", "virtual queues of negative reduced cost")
    # A group may be covered otherwise at the box's largest price, and covered again for its least.
    edges = []
    for least, most, largest in zip(*box, pricing.largest, strict=True):
        bought, sold = model.addVar(obj=float(most)), model.addVar(obj=-float(least))
        pricer.cover.append(model.addCons(bought - sold == 1.0, separate=False, modifiable=True))
        edges += [bought] if most < largest * (1.0 - ROUNDING) else []
        edges += [sold] if least > 0.0 else []
    for count in pricing.count:
        # A row needs a variable; this one cannot be chosen.
        none = model.addVar(ub=0.0)
        pricer.limits.append(model.addCons(none <= count, separate=False, modifiable=True))
    for column in pool.columns():
        pricer.add(column, False)
    model.optimizeNogil()
    if pricer.error is not None:
        raise pricer.error
    solution = model.getBestSol()
    return solution is not None and all(model.getSolVal(solution, edge) <= ROUNDING for edge in edges)


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
