"""Plans by insertion: each group goes, one after another, where it adds least to the cost.

A plan is ``sequence`` (I + 1, K) and ``length`` (I + 1,): the groups of each instance in order; the last row holds
the groups that are in no queue for now.
"""

from __future__ import annotations

import math

from planners.qlm.cost import cost_from, hold_cost, queue_cost
from planners.qlm.problem import Float, Int, Problem
from qlm_env.compiled import compiled, kernel


@kernel
def _insert(sequence: Int, length: Int, i: int, position: int, g: int) -> None:
    for k in range(length[i], position, -1):
        sequence[i, k] = sequence[i, k - 1]
    sequence[i, position] = g
    length[i] += 1


@kernel
def _remove(sequence: Int, length: Int, i: int, position: int) -> None:
    length[i] -= 1
    for k in range(position, length[i]):
        sequence[i, k] = sequence[i, k + 1]


@kernel
def _insert_cheapest(problem: Problem, sequence: Int, length: Int, costs: Float, g: int, at_end: bool) -> None:
    """Insert ``g`` at the place that adds least; ``costs`` (I + 1,) is kept up to date.

    Args:
        at_end: only the ends of the queues are tried, and holding is not (list scheduling).
    """
    num_instances = len(length) - 1
    best_added = math.inf
    best_i = num_instances
    best_position = length[num_instances]
    if not at_end:
        best_added = hold_cost(problem, g)
    for i in range(num_instances):
        if not problem.allowed[g, i]:
            continue
        queue = sequence[i]
        end = length[i]
        first = end if at_end else 0
        queue[end] = g
        for position in range(end, first - 1, -1):
            if position < end:
                queue[position + 1] = queue[position]
                queue[position] = g
            limit = costs[i] + best_added
            added = cost_from(problem, i, queue, 0, end + 1, problem.ready_s[i], problem.drain_s[i], limit) - costs[i]
            if added < best_added:
                best_added = added
                best_i = i
                best_position = position
        for k in range(first, end):
            queue[k] = queue[k + 1]
    _insert(sequence, length, best_i, best_position, g)
    costs[best_i] += best_added if best_added < math.inf else 0.0


@kernel
def _end_of_batch(problem: Problem, i: int, queue: Int, length: int, model: int) -> int:
    """The position behind the last group of a model in a queue, else the front where it is loaded, else the end."""
    for k in range(length - 1, -1, -1):
        if problem.model[queue[k]] == model:
            return k + 1
    return 0 if problem.start_model[i] == model else length


@compiled
def evaluate(problem: Problem, sequence: Int, length: Int, costs: Float) -> float:
    """Fill ``costs`` (I + 1,) with the cost of each queue of a plan, and of what is held; returns their sum."""
    num_instances = len(length) - 1
    total = 0.0
    for i in range(num_instances):
        costs[i] = queue_cost(problem, i, sequence[i], length[i])
        total += costs[i]
    costs[num_instances] = 0.0
    for k in range(length[num_instances]):
        costs[num_instances] += hold_cost(problem, sequence[num_instances, k])
    return total + costs[num_instances]


@compiled
def insert_all(problem: Problem, order: Int, at_end: bool, sequence: Int, length: Int, costs: Float) -> float:
    """Insert the groups of ``order`` into a plan, which may hold others already; returns the plan's cost."""
    evaluate(problem, sequence, length, costs)
    for g in order:
        _insert_cheapest(problem, sequence, length, costs, g, at_end)
    return evaluate(problem, sequence, length, costs)


@compiled
def insert_batched(problem: Problem, order: Int, sequence: Int, length: Int, costs: Float) -> float:
    """List scheduling that avoids swaps: a group joins the last batch of its model in a queue, else goes to the end.

    Of the queues, it takes the one where it adds least.

    Returns:
        the plan's cost.
    """
    num_instances = len(length) - 1
    evaluate(problem, sequence, length, costs)
    for g in order:
        best_added = math.inf
        best_i = num_instances
        best_position = length[num_instances]
        for i in range(num_instances):
            if problem.allowed[g, i]:
                position = _end_of_batch(problem, i, sequence[i], length[i], problem.model[g])
                _insert(sequence, length, i, position, g)
                added = queue_cost(problem, i, sequence[i], length[i]) - costs[i]
                _remove(sequence, length, i, position)
                if added < best_added:
                    best_added = added
                    best_i = i
                    best_position = position
        _insert(sequence, length, best_i, best_position, g)
        costs[best_i] += best_added if best_added < math.inf else 0.0
    return evaluate(problem, sequence, length, costs)


@compiled
def improve(problem: Problem, order: Int, sequence: Int, length: Int, costs: Float, rounds: int) -> float:
    """Take each group of ``order`` out and insert it again where it costs least, ``rounds`` times over.

    Returns:
        the plan's cost, never more than before.
    """
    num_rows = len(length)
    total = evaluate(problem, sequence, length, costs)
    for _ in range(rounds):
        before = total
        for g in order:
            for i in range(num_rows):
                for position in range(length[i]):
                    if sequence[i, position] == g:
                        _remove(sequence, length, i, position)
                        break
            evaluate(problem, sequence, length, costs)
            _insert_cheapest(problem, sequence, length, costs, g, False)
        total = evaluate(problem, sequence, length, costs)
        if total >= before - 1e-9:
            break
    return total
