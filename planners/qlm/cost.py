"""What a virtual queue costs: expected SLO misses, delay, and the service lost to swaps.

A request misses with probability ``Phi((c - d)/sigma)``: ``c`` its expected completion, ``d`` its deadline, ``sigma``
from the spread of output lengths over its latency and a share of its waiting time. Along a group, waiting and
deadlines run linearly from the first request to the last, and three points stand for all.
"""

from __future__ import annotations

import math

from planners.qlm.problem import DELAY_COST_PER_S, Int, Problem
from qlm_env.compiled import compiled, kernel

WAIT_ERROR = 0.15
"""Standard deviation of a waiting time's estimate, relative."""
MIN_STD_S = 0.5


@kernel
def miss_probability(completion_s: float, deadline_s: float, std_s: float) -> float:
    """Normal tail, ``P(C > d)``."""
    return 0.5 * math.erfc((deadline_s - completion_s) / (std_s * 1.4142135623730951))


@kernel
def group_cost(problem: Problem, g: int, first_wait_s: float, last_wait_s: float, latency_s: float) -> float:
    """Expected weighted misses and delay of a group whose requests wait from ``first_wait_s`` to ``last_wait_s``."""
    misses = 0.0
    delay_s = 0.0
    for point in (1.0 / 6.0, 0.5, 5.0 / 6.0):
        wait_s = first_wait_s + point * (last_wait_s - first_wait_s)
        slack_s = problem.first_slack_s[g] + point * (problem.last_slack_s[g] - problem.first_slack_s[g])
        spread_s = latency_s * problem.output_cv[g]
        std_s = math.sqrt(spread_s * spread_s + (WAIT_ERROR * wait_s) ** 2 + MIN_STD_S * MIN_STD_S)
        misses += miss_probability(wait_s + latency_s, slack_s, std_s) / 3.0
        delay_s += (wait_s + latency_s) / 3.0
    return problem.requests[g] * (problem.weight[g] * misses + DELAY_COST_PER_S * delay_s)


@kernel
def queue_cost(problem: Problem, i: int, sequence: Int, length: int) -> float:
    """Cost of instance ``i`` working off ``sequence[:length]`` in order, from its present model and batch."""
    time_s = problem.ready_s[i]
    model = problem.start_model[i]
    present = problem.present[i]
    drain_s = problem.drain_s[i]
    cost = 0.0
    k = 0
    while k < length:
        run_model = problem.model[sequence[k]]
        if run_model != model:
            swap_s = problem.load_s[i, run_model]
            if model >= 0:
                swap_s += problem.unload_s[i, model]
            time_s += drain_s + swap_s
            cost += problem.swap_cost[i] * (0.5 * drain_s + swap_s)
            model = run_model
            present = 0.0
        end = k
        in_run = present
        while end < length and problem.model[sequence[end]] == model:
            in_run += problem.requests[sequence[end]]
            end += 1
        wait_s = 0.0
        for position in range(k, end):
            g = sequence[position]
            full = problem.batch[g, i]
            # Every request of the run shares the batch, so those behind slow down those ahead.
            latency_s = problem.latency_s[g, i] + problem.latency_growth_s[g, i] * (min(full, in_run) - 1.0)
            first_wait_s = max(wait_s, (present + 1.0 - full) * problem.interval_s[g, i])
            present += problem.requests[g]
            wait_s = max(first_wait_s, (present - full) * problem.interval_s[g, i])
            cost += group_cost(problem, g, time_s + first_wait_s, time_s + wait_s, latency_s)
            drain_s = wait_s + latency_s
        k = end
    return cost


@kernel
def hold_cost(problem: Problem, g: int) -> float:
    """Cost of leaving a group in no queue for now; what no instance can take at all counts as missed."""
    best = math.inf
    for i in range(problem.allowed.shape[1]):
        if problem.allowed[g, i]:
            first_s = problem.hold_s + problem.ready_s[i]
            # The model may be loaded by then for other reasons. Once an instance has idled for as long as loading it
            # takes, that hope has cost as much as it can save.
            load_s = problem.load_s[i, problem.model[g]]
            if problem.start_model[i] != problem.model[g] and problem.idle_s[i] >= load_s:
                first_s += load_s
                if problem.start_model[i] >= 0:
                    first_s += problem.unload_s[i, problem.start_model[i]]
            last_s = first_s + problem.requests[g] * problem.interval_s[g, i]
            latency_s = problem.latency_s[g, i] + problem.latency_growth_s[g, i] * (problem.batch[g, i] - 1.0)
            best = min(best, group_cost(problem, g, first_s, last_s, latency_s))
    return best if best < math.inf else problem.requests[g] * problem.weight[g]


@compiled
def cost_of_queue(problem: Problem, i: int, sequence: Int) -> float:
    """:func:`queue_cost` of a whole array, for Python."""
    return queue_cost(problem, i, sequence, len(sequence))


@compiled
def cost_of_holding(problem: Problem, g: int) -> float:
    """:func:`hold_cost`, for Python."""
    return hold_cost(problem, g)
