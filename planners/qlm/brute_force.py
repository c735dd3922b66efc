"""The cheapest plan of a small problem, by trying every assignment and every order.

For each instance and each set of groups, all orders; then, instance by instance, all ways to divide the groups. The
first takes ``I * K! * e`` evaluations of a queue, the second ``I * 3^K`` steps: up to about eight groups.
"""

from __future__ import annotations

import math

import numpy as np

from planners.qlm.construct import evaluate
from planners.qlm.cost import cost_of_holding, queue_cost
from planners.qlm.master import Column
from planners.qlm.plan import Plan
from planners.qlm.problem import Float, Int, Problem
from qlm_env.compiled import compiled
from qlm_env.spec import ConfigError

MOST_GROUPS = 9


@compiled
def _cheapest_orders(problem: Problem, i: int, queue: Int, following: Int, cost: Float, order: Int) -> None:
    """The cheapest order of every set of groups on instance ``i``.

    Args:
        queue, following: (K,) and (K + 1,) scratch: the queue tried, and the group to try next at each place.
        cost: (2^K,) by set as a bit mask; infinite where the instance may not take a group.
        order: (2^K, K) and the order.
    """
    num_groups = len(queue)
    cost[:] = math.inf
    cost[0] = 0.0
    taken = 0
    depth = 0
    following[0] = 0
    while depth >= 0:
        g = following[depth]
        if g == num_groups:
            depth -= 1
            if depth >= 0:
                taken &= ~(1 << queue[depth])
            continue
        following[depth] += 1
        if taken & (1 << g) or not problem.allowed[g, i]:
            continue
        queue[depth] = g
        taken |= 1 << g
        depth += 1
        following[depth] = 0
        total = queue_cost(problem, i, queue, depth)
        if total < cost[taken]:
            cost[taken] = total
            for position in range(depth):
                order[taken, position] = queue[position]


@compiled
def _divide(queue_costs: Float, least: Float, choice: Int) -> None:
    """Least cost of giving each set of groups to the first so many instances.

    Args:
        queue_costs: (I, 2^K)
        least: (I + 1, 2^K), the first row given: the cost of holding a set back.
        choice: (I + 1, 2^K) filled with the set that goes to the last of these instances.
    """
    for i in range(len(queue_costs)):
        for groups in range(queue_costs.shape[1]):
            least[i + 1, groups] = least[i, groups]
            choice[i + 1, groups] = 0
            own = groups
            while own:
                total = least[i, groups ^ own] + queue_costs[i, own]
                if total < least[i + 1, groups]:
                    least[i + 1, groups] = total
                    choice[i + 1, groups] = own
                own = (own - 1) & groups


def _queues(problem: Problem) -> tuple[Float, Int]:
    """(I, 2^K) least cost of each set of groups on each instance, and (I, 2^K, K) its order."""
    num_groups, num_instances = problem.allowed.shape
    if num_groups > MOST_GROUPS:
        raise ConfigError(f"brute force takes at most {MOST_GROUPS} groups (got {num_groups})")
    costs = np.empty((num_instances, 1 << num_groups))
    orders = np.zeros((num_instances, 1 << num_groups, num_groups), np.int32)
    queue, following = np.zeros(num_groups, np.int32), np.zeros(num_groups + 1, np.int32)
    for i in range(num_instances):
        _cheapest_orders(problem, i, queue, following, costs[i], orders[i])
    return costs, orders


def _members(groups: int) -> list[int]:
    """The groups of a bit mask."""
    return [g for g in range(groups.bit_length()) if groups >> g & 1]


def cheapest_plan(problem: Problem) -> Plan:
    """The optimum: no other assignment, order or choice of groups to hold back costs less.

    Raises:
        ConfigError: there are too many groups.
    """
    num_groups, num_instances = problem.allowed.shape
    costs, orders = _queues(problem)
    hold = np.array([cost_of_holding(problem, g) for g in range(num_groups)])
    least = np.empty((num_instances + 1, 1 << num_groups))
    least[0] = [hold[_members(groups)].sum() for groups in range(1 << num_groups)]
    choice = np.zeros(least.shape, np.int32)
    _divide(costs, least, choice)
    plan = Plan.empty(num_instances, num_groups)
    rest = (1 << num_groups) - 1
    for i in reversed(range(num_instances)):
        own = int(choice[i + 1, rest])
        plan.length[i] = own.bit_count()
        plan.sequence[i] = orders[i, own]
        rest ^= own
    plan.length[num_instances] = rest.bit_count()
    plan.sequence[num_instances, : rest.bit_count()] = _members(rest)
    plan.total = float(evaluate(problem, plan.sequence, plan.length, plan.costs))
    return plan


def every_column(problem: Problem) -> list[Column]:
    """The cheapest queue of every set of groups on every instance, and holding each group back: the whole master.

    Raises:
        ConfigError: there are too many groups.
    """
    num_groups, num_instances = problem.allowed.shape
    costs, orders = _queues(problem)
    columns = [Column(None, (g,), float(cost_of_holding(problem, g))) for g in range(num_groups)]
    for i in range(num_instances):
        for groups in range(1, 1 << num_groups):
            if math.isfinite(costs[i, groups]):
                queue = tuple(int(g) for g in orders[i, groups, : groups.bit_count()])
                columns.append(Column(i, queue, float(costs[i, groups])))
    return columns
