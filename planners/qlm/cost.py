"""What a virtual queue costs: SLO misses or lateness, delay, and the service lost to swaps.

With ``c`` a request's expected completion, ``d`` its deadline and ``sigma`` the standard deviation of its completion,
from the spread of output lengths over its latency and a share of its waiting time, ``u = (c - d)/sigma`` and ``w`` its
weight, a request costs

- MISS: the probability to miss, ``w*Phi(u)``;
- LATENESS: the expected lateness, ``w*sigma*(phi(u) + u*Phi(u))`` for a normal completion;
- CHANCE: ``w`` unless it is met with the asked confidence, ``P(C <= d) >= confidence``, which is a deadline made
  earlier by a quantile: ``c + Phi^-1(confidence)*sigma <= d``;
- POINT: ``w`` if ``c > d``, as without a distribution.

Along a group, waiting and deadlines run linearly from the first request to the last, and three points stand for all.

Before a swap the running batch drains, or is evicted, whichever is cheaper: what is evicted goes on once the run that
took its place is done and its model is back, and may miss by then.
"""

from __future__ import annotations

import math

from planners.qlm.problem import CHANCE, LATENESS, POINT, Int, Problem
from qlm_env.compiled import compiled, inlined, kernel

WAIT_ERROR = 0.15
"""Standard deviation of a waiting time's estimate, relative."""
MIN_STD_S = 0.5
CERTAIN_STDS = 6.5
"""So many standard deviations from its deadline (a probability of 4e-11) a request is sure to meet or miss it."""
SQRT_2 = 1.4142135623730951
SQRT_2_PI = 2.5066282746310002


@inlined
def request_cost(form: int, confidence: float, late_s: float, variance_s2: float) -> float:
    """Cost, per unit of weight, of a request expected ``late_s`` after its deadline (negative: before)."""
    if form == POINT:
        return 1.0 if late_s > 0.0 else 0.0
    if late_s * late_s > CERTAIN_STDS * CERTAIN_STDS * variance_s2:
        if late_s < 0.0:
            return 0.0
        return late_s if form == LATENESS else 1.0
    std_s = math.sqrt(variance_s2)
    u = late_s / std_s
    missed = 0.5 * math.erfc(-u / SQRT_2)
    if form == LATENESS:
        return std_s * (math.exp(-0.5 * u * u) / SQRT_2_PI + u * missed)
    if form == CHANCE:
        return 1.0 if missed > 1.0 - confidence else 0.0
    return missed


@inlined
def group_cost(problem: Problem, g: int, first_wait_s: float, last_wait_s: float, latency_s: float) -> float:
    """Cost of a group whose requests wait from ``first_wait_s`` to ``last_wait_s``."""
    spread_s = latency_s * problem.output_cv[g]
    own_variance_s2 = spread_s * spread_s + MIN_STD_S * MIN_STD_S
    cost = 0.0
    for point in (1.0 / 6.0, 0.5, 5.0 / 6.0):
        wait_s = first_wait_s + point * (last_wait_s - first_wait_s)
        slack_s = (1.0 - point) * problem.first_slack_s[g] + point * problem.last_slack_s[g]
        error_s = WAIT_ERROR * wait_s
        cost += request_cost(
            problem.form, problem.confidence, wait_s + latency_s - slack_s, own_variance_s2 + error_s * error_s
        )
    delay_s = 0.5 * (first_wait_s + last_wait_s) + latency_s
    return problem.requests[g] * (problem.weight[g] * cost / 3.0 + problem.delay_cost[g] * delay_s)


@inlined
def serve_run(
    problem: Problem, i: int, sequence: Int, k: int, length: int, time_s: float, drain_s: float
) -> tuple[int, float, float, float]:
    """Instance ``i`` serves the run of one model that starts at ``sequence[k]``, after a swap if it needs one.

    Of the two ways to make room for a first run of another model, to let the batch drain and to evict it, the cheaper
    one is taken.

    Args:
        time_s: when the run before it started.
        drain_s: how long after that its batch has drained.

    Returns:
        where the run ends, ``time_s`` and ``drain_s`` of this run, and its cost.
    """
    model = problem.start_model[i] if k == 0 else problem.model[sequence[k - 1]]
    run_model = problem.model[sequence[k]]
    swaps = run_model != model
    present = problem.present[i] if k == 0 and not swaps else 0.0
    end = k
    in_run = present
    while end < length and problem.model[sequence[end]] == run_model:
        in_run += problem.requests[sequence[end]]
        end += 1
    start_s = time_s
    cost = 0.0
    if swaps:
        swap_s = problem.load_s[i, run_model]
        if model >= 0:
            swap_s += problem.unload_s[i, model]
        cost = problem.swap_cost[i] * (0.5 * drain_s + swap_s)
        time_s += drain_s + swap_s
        if k == 0 and problem.evict_s[i] < drain_s:
            evicted_start_s = start_s + problem.evict_s[i] + swap_s
            back_s = problem.load_s[i, model] + problem.unload_s[i, run_model] + problem.evict_s[i]
            # The swap back is paid by what goes on then.
            evicted_cost = problem.swap_cost[i] * (0.5 * problem.evict_s[i] + swap_s)
            served, run_s = _serve(problem, i, sequence, k, end, evicted_start_s, in_run, present, False)
            resumed_s = evicted_start_s + run_s + back_s
            evicted_cost += served + displaced_cost(problem, i, resumed_s)
            served, run_s = _serve(problem, i, sequence, k, end, time_s, in_run, present, False)
            if evicted_cost < cost + served:
                return end, evicted_start_s, run_s, evicted_cost
            return end, time_s, run_s, cost + served
    served, run_s = _serve(problem, i, sequence, k, end, time_s, in_run, present, k == 0 and not swaps)
    return end, time_s, run_s, cost + served


@inlined
def displaced_cost(problem: Problem, i: int, resumed_s: float) -> float:
    """Cost of the batch that was evicted from instance ``i`` going on at ``resumed_s`` instead of now."""
    error_s = WAIT_ERROR * resumed_s
    missed = request_cost(
        problem.form,
        problem.confidence,
        resumed_s - problem.displaced_slack_s[i],
        MIN_STD_S * MIN_STD_S + error_s * error_s,
    )
    return problem.displaced_weight[i] * missed + problem.displaced_delay_cost[i] * resumed_s


@inlined
def _serve(
    problem: Problem,
    i: int,
    sequence: Int,
    k: int,
    end: int,
    time_s: float,
    in_run: float,
    present: float,
    joins: bool,
) -> tuple[float, float]:
    """Cost of ``sequence[k:end]``, all of the model on the GPU from ``time_s`` on, and when their batch has drained.

    Args:
        in_run: requests of the run together, those already running included.
        present: of those, the ones already running.
        joins: whether these join the present batch and crowd it.
    """
    cost = 0.0
    drain_s = 0.0
    wait_s = 0.0
    for position in range(k, end):
        g = sequence[position]
        full = problem.batch[g, i]
        # Every request of the run shares the batch, so those behind slow down those ahead.
        latency_s = problem.latency_s[g, i] + problem.latency_growth_s[g, i] * (min(full, in_run) - 1.0)
        first_wait_s = max(wait_s, (present + 1.0 - full) * problem.interval_s[g, i])
        if joins:
            joining = min(problem.requests[g], max(0.0, full - present))
            cost += problem.crowding_cost[g, i] * joining
        present += problem.requests[g]
        wait_s = max(first_wait_s, (present - full) * problem.interval_s[g, i])
        cost += group_cost(problem, g, time_s + first_wait_s, time_s + wait_s, latency_s)
        drain_s = wait_s + latency_s
    return cost, drain_s


@kernel
def cost_from(
    problem: Problem, i: int, sequence: Int, k: int, length: int, time_s: float, drain_s: float, limit: float
) -> float:
    """Cost of ``sequence[k:length]`` behind ``sequence[:k]``, of which a run ends at ``k``.

    Args:
        time_s, drain_s: as :func:`serve_run` takes and gives them.
        limit: a cost at which the rest is not looked at any more; costs only add up.
    """
    cost = 0.0
    while k < length and cost < limit:
        k, time_s, drain_s, added = serve_run(problem, i, sequence, k, length, time_s, drain_s)
        cost += added
    return cost


@kernel
def queue_cost(problem: Problem, i: int, sequence: Int, length: int) -> float:
    """Cost of instance ``i`` working off ``sequence[:length]`` in order, from its present model and batch."""
    return cost_from(problem, i, sequence, 0, length, problem.ready_s[i], problem.drain_s[i], math.inf)


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
