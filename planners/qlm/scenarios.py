"""Plans against sampled service times: what a plan comes to cost, and the plan that is best on average over a sample.

In a scenario every group has its own service times. Its requests leave the batch at the mean of their lengths, a Gamma
variable with the group's coefficient of variation over ``sqrt(requests)``; the one that its latency stands for has a
length of its own, a Gamma variable with the whole coefficient; and both carry an error of the estimate that the groups
of a model share, log-normal with the relative deviation ``WAIT_ERROR``. Along a queue these times add up as they come,
so completions are not the normal variables that :mod:`planners.qlm.cost` takes them for. A late request costs its
weight.

``S`` scenarios of a problem with K groups are one problem with ``S*K`` groups, scenario by scenario, of which a queue
runs those of one scenario. The plan with the least average over them (sample average approximation) is looked for by
ruin and recreate, the same for one scenario as for many, so that costs can be compared at equal time.
"""

from __future__ import annotations

import math
import time

import numpy as np

from planners.qlm.cost import WAIT_ERROR, hold_cost, queue_cost
from planners.qlm.plan import Plan
from planners.qlm.problem import POINT, Float, Int, Problem
from qlm_env.compiled import compiled, kernel

LEAST_CV = 1e-3
MOST_REMOVED = 8
"""Groups taken out in an iteration, at most."""
HOT, COLD = 0.02, 2e-5
"""First and last temperature of the annealing, relative to the start's cost."""


def sample_scenarios(problem: Problem, count: int, rng: np.random.Generator) -> Problem:
    """``count`` scenarios of a problem as one, with ``count * K`` groups; requests cost what they do with POINT."""
    num_groups, num_models = len(problem.requests), problem.load_s.shape[1]
    variance = np.maximum(LEAST_CV, problem.output_cv) ** 2
    size = (count, num_groups)
    group_length = rng.gamma(problem.requests / variance, variance / problem.requests, size)
    one_length = rng.gamma(1.0 / variance, variance, size)
    # Log-normal with mean 1.
    deviation = math.sqrt(math.log1p(WAIT_ERROR**2))
    error = np.exp(deviation * rng.standard_normal((count, num_models)) - 0.5 * deviation**2)[:, problem.model]

    def scaled(array: Float, factor: Float) -> Float:
        return np.ascontiguousarray((array[None] * factor[:, :, None]).reshape(count * num_groups, -1))

    return problem._replace(
        requests=np.tile(problem.requests, count),
        weight=np.tile(problem.weight, count),
        delay_cost=np.tile(problem.delay_cost, count),
        first_slack_s=np.tile(problem.first_slack_s, count),
        last_slack_s=np.tile(problem.last_slack_s, count),
        model=np.tile(problem.model, count),
        output_cv=np.tile(problem.output_cv, count),
        allowed=np.tile(problem.allowed, (count, 1)),
        interval_s=scaled(problem.interval_s, error * group_length),
        batch=np.tile(problem.batch, (count, 1)),
        latency_s=scaled(problem.latency_s, error * one_length),
        latency_growth_s=scaled(problem.latency_growth_s, error * one_length),
        crowding_cost=np.tile(problem.crowding_cost, (count, 1)),
        form=POINT,
    )


# --------------------------------------------------------------------------- averages over scenarios
@kernel
def _mean_cost(
    scenarios: Problem, num_groups: int, i: int, sequence: Int, length: int, limit: float, of_one: Int
) -> float:
    """Average cost of instance ``i`` working off ``sequence[:length]``; infinite once it is sure to exceed ``limit``.

    Args:
        of_one: (K,) scratch: the queue in one scenario.
    """
    count = len(scenarios.requests) // num_groups
    total = 0.0
    for s in range(count):
        for k in range(length):
            of_one[k] = sequence[k] + s * num_groups
        total += queue_cost(scenarios, i, of_one, length)
        if total > limit * count:
            return math.inf
    return total / count


@compiled
def _mean_holds(scenarios: Problem, holds: Float) -> None:
    """Average cost of holding each group back: fills ``holds`` (K,)."""
    num_groups = len(holds)
    count = len(scenarios.requests) // num_groups
    for g in range(num_groups):
        holds[g] = 0.0
        for s in range(count):
            holds[g] += hold_cost(scenarios, s * num_groups + g) / count


@compiled
def _mean_costs(scenarios: Problem, holds: Float, sequence: Int, length: Int, costs: Float, of_one: Int) -> float:
    """Average cost of each queue of a plan and of what is held: fills ``costs`` (I + 1,); returns their sum."""
    num_instances = len(length) - 1
    total: float = 0.0
    for i in range(num_instances):
        costs[i] = _mean_cost(scenarios, len(holds), i, sequence[i], length[i], math.inf, of_one)
        total += costs[i]
    costs[num_instances] = 0.0
    for k in range(length[num_instances]):
        costs[num_instances] += holds[sequence[num_instances, k]]
    total += costs[num_instances]
    return total


@compiled
def _reinsert(
    scenarios: Problem, holds: Float, sequence: Int, length: Int, costs: Float, removed: Int, of_one: Int
) -> float:
    """Take the groups ``removed`` out of a plan and insert them, one after another, where each adds least."""
    num_groups = len(holds)
    num_instances = len(length) - 1
    for i in range(num_instances + 1):
        kept = 0
        for k in range(length[i]):
            taken = False
            for g in removed:
                taken = taken or sequence[i, k] == g
            if taken and i == num_instances:
                costs[i] -= holds[sequence[i, k]]
            if not taken:
                sequence[i, kept] = sequence[i, k]
                kept += 1
        if kept < length[i] and i < num_instances:
            costs[i] = _mean_cost(scenarios, num_groups, i, sequence[i], kept, math.inf, of_one)
        length[i] = kept
    for g in removed:
        best_added = holds[g]
        best_i, best_position = num_instances, length[num_instances]
        for i in range(num_instances):
            if not scenarios.allowed[g, i]:
                continue
            queue = sequence[i]
            end = length[i]
            queue[end] = g
            for position in range(end, -1, -1):
                if position < end:
                    queue[position + 1] = queue[position]
                    queue[position] = g
                limit = costs[i] + best_added
                added = _mean_cost(scenarios, num_groups, i, queue, end + 1, limit, of_one) - costs[i]
                if added < best_added:
                    best_added, best_i, best_position = added, i, position
            for k in range(end):
                queue[k] = queue[k + 1]
        for k in range(length[best_i], best_position, -1):
            sequence[best_i, k] = sequence[best_i, k - 1]
        sequence[best_i, best_position] = g
        length[best_i] += 1
        costs[best_i] += best_added
    total = 0.0
    for i in range(num_instances + 1):
        total += costs[i]
    return total


# --------------------------------------------------------------------------- from Python
def mean_cost(scenarios: Problem, plan: Plan) -> float:
    """What a plan costs on average over scenarios of its problem; a problem itself is one scenario."""
    num_groups = plan.sequence.shape[1]
    holds = np.empty(num_groups)
    _mean_holds(scenarios, holds)
    of_one = np.empty(num_groups, np.int32)
    return float(_mean_costs(scenarios, holds, plan.sequence, plan.length, np.empty(len(plan.length)), of_one))


def search_scenarios(scenarios: Problem, start: Plan, rng: np.random.Generator, time_limit_s: float) -> Plan:
    """Improve a plan's average cost over scenarios by ruin and recreate, cooling by the clock."""
    begin_s = time.perf_counter()
    num_groups = start.sequence.shape[1]
    holds, of_one = np.empty(num_groups), np.empty(num_groups, np.int32)
    _mean_holds(scenarios, holds)
    present = start.copy()
    present.total = float(_mean_costs(scenarios, holds, present.sequence, present.length, present.costs, of_one))
    best, first = present, present.total
    while (passed := (time.perf_counter() - begin_s) / time_limit_s) < 1.0:
        removed = rng.choice(num_groups, rng.integers(1, min(MOST_REMOVED, num_groups) + 1), replace=False)
        tried = present.copy()
        order = removed.astype(np.int32)
        tried.total = float(_reinsert(scenarios, holds, tried.sequence, tried.length, tried.costs, order, of_one))
        temperature = first * HOT * (COLD / HOT) ** passed
        if tried.total < present.total + temperature * rng.exponential():
            present = tried
            best = present if present.total < best.total else best
    return best
