"""The master problem on SCIP: from the virtual queues of many plans, the cheapest set that covers every group once.

With ``c`` ranging over candidate queues (columns), each of one instance, and ``x_c`` binary:

``min sum cost_c x_c``  subject to  ``sum_{c contains g} x_c = 1`` for each group, ``sum_{c of i} x_c <= 1`` for each
instance.

Holding a group back is a column of no instance. Every plan is a feasible choice, so the optimum is never worse than
the best of them; it recombines one plan's queue for one instance with another's for the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyscipopt


@dataclass(frozen=True, slots=True)
class Column:
    """A candidate queue: the groups, in order, that an instance would run; ``None`` holds a group back."""

    instance: int | None
    groups: tuple[int, ...]
    cost: float


@dataclass(frozen=True, slots=True)
class MasterResult:
    """The chosen columns."""

    columns: list[Column]
    cost: float
    optimal: bool
    """SCIP proved that no other choice among the columns is cheaper."""


def solve_master(
    columns: list[Column], num_groups: int, start: list[Column], time_limit_s: float, node_limit: int
) -> MasterResult:
    """Choose columns.

    Args:
        start: a feasible choice, part of ``columns``; the result is never worse, whatever stops SCIP.
        time_limit_s: wall-clock guard.
        node_limit: the reproducible limit.
    """
    fallback = MasterResult(start, sum(column.cost for column in start), False)
    model = pyscipopt.Model("qlm-master")
    model.hideOutput()
    model.setParam("limits/time", time_limit_s)
    model.setParam("limits/nodes", node_limit)
    model.setParam("parallel/maxnthreads", 1)
    x = [model.addVar(vtype="B", obj=column.cost) for column in columns]
    for g in range(num_groups):
        model.addCons(pyscipopt.quicksum(x[c] for c, column in enumerate(columns) if g in column.groups) == 1)
    for i in sorted({column.instance for column in columns if column.instance is not None}):
        model.addCons(pyscipopt.quicksum(x[c] for c, column in enumerate(columns) if column.instance == i) <= 1)
    chosen = set(start)
    solution = model.createSol()
    # Every variable must be set: SCIP does not complete a partial solution.
    for variable, column in zip(x, columns, strict=True):
        model.setSolVal(solution, variable, float(column in chosen))
    model.addSol(solution)
    # Does not hold the interpreter lock, so that the time limit cannot stall other threads.
    model.optimizeNogil()
    best = model.getBestSol()
    if best is None:
        return fallback
    picked = [column for variable, column in zip(x, columns, strict=True) if best[variable] > 0.5]
    cost = sum(column.cost for column in picked)
    if cost > fallback.cost:
        return fallback
    return MasterResult(picked, cost, model.getStatus() == "optimal")
