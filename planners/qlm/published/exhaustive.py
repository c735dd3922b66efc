"""The published programs by enumeration, of every assignment and every order: for seven groups or so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planners.qlm.published.slot_problem import Goal, Queues, SlotProblem, completions, group_cost


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best of all assignments and orders."""

    queues: Queues
    cost: float


Orders = dict[int, tuple[float, tuple[int, ...]]]
"""Cheapest order, and its cost, of each set of groups (as a bit mask) that an instance can take."""


def best_by_enumeration(slots: SlotProblem, goal: Goal, quantile: float) -> Optimum | None:
    """The optimum of a program, or None where it has no solution.

    Args:
        quantile: as in :func:`~planners.qlm.published.slot_problem.group_cost`.
    """
    num_groups, num_instances = slots.allowed.shape
    plans: dict[int, tuple[float, list[tuple[int, ...]]]] = {0: (0.0, [])}
    for i in range(num_instances):
        orders = _cheapest_orders(slots, i, goal, quantile)
        extended: dict[int, tuple[float, list[tuple[int, ...]]]] = {}
        for taken, (spent, queues) in plans.items():
            for chosen, (added, order) in orders.items():
                if taken & chosen == 0 and spent + added < extended.get(taken | chosen, (math.inf, []))[0]:
                    extended[taken | chosen] = (spent + added, [*queues, order])
        plans = extended
    everything = (1 << num_groups) - 1
    if everything not in plans:
        return None
    total, best = plans[everything]
    return Optimum(best, total)


def _cheapest_orders(slots: SlotProblem, i: int, goal: Goal, quantile: float) -> Orders:
    cheapest: Orders = {0: (0.0, ())}

    def extend(order: tuple[int, ...], mask: int, spent: float) -> None:
        for g in np.flatnonzero(slots.allowed[:, i]).tolist():
            if mask & (1 << g):
                continue
            longer = (*order, g)
            *_, (mean_s, std_s) = completions(slots, i, longer)
            total = spent + group_cost(slots, g, mean_s, std_s, goal, quantile)
            if total == math.inf:
                continue
            taken = mask | (1 << g)
            if total < cheapest.get(taken, (math.inf, ()))[0]:
                cheapest[taken] = (total, longer)
            extend(longer, taken, total)

    extend((), 0, 0.0)
    return cheapest
