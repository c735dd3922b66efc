"""What groups cost an instance at least, tabulated: a relaxation of :mod:`planners.qlm.cost`.

A queue is a chain of runs of one model. While group ``g`` joins a run its cost depends on

- when the run began, how many requests are in it so far (``present``) and until when they wait (``wait_s``): carried;
- how many requests will be in it in the end, through the latency of a batch that is not full: only how many
  quarters of a batch, or more than a batch (the run's *level*), each of which is tried.

**Why the relaxed cost is never more than** :func:`planners.qlm.cost.queue_cost`:

1. For a fixed latency the cost of a request never falls as it waits longer. Its lateness in standard deviations,
   ``u(w) = (w + l - d)/sqrt(s^2 + (a*w)^2)``, has a derivative whose sign is that of ``s^2 + a^2*w*(d - l)``, so it
   rises everywhere or up to one peak, from which it falls towards ``1/a``; there the request is missed with certainty
   (``1/a > CERTAIN_STDS``). The other forms are steps in ``u``; expected lateness rises in mean and deviation.
2. For a fixed wait, ``u`` as a function of the latency has at most one peak by the same argument. So its least over an
   interval of latencies is at one of its ends, for each of the three points that stand for a group. The latency lies
   between that of the requests present, or the fewest of the level, and that of the most; in a full batch it is known.
3. Times, waits and counts only add to each other with positive factors, so by 1. and 2. a state that is smaller in
   each (start of the run, present, wait) leads to a cost that is no more, now and later. Tables are read at points
   rounded down.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planners.qlm.cost import MIN_STD_S, WAIT_ERROR, request_cost
from planners.qlm.problem import Float, Int, Problem
from qlm_env.compiled import compiled, inlined

LEVELS = 5
"""How full the batch of a run gets: one level for each equal part of it, and one for more than that."""
PARTIAL_ROWS = 4
"""Rows of a cost table for batches that are not full, for each level but the last, by how many requests are present."""
SPAN_ROWS = 16
"""Intervals of the rows for a full batch, by how far the group's first and last admission are apart."""
FULL_ROWS = (LEVELS - 1) * PARTIAL_ROWS
"""Where the rows for a full batch begin."""
ROWS = FULL_ROWS + SPAN_ROWS + 1
ROUNDING = 1e-9
"""Keeps a quotient that should be whole from being rounded down by one."""
SMALLEST_HORIZON_S = 60.0


class Tables(NamedTuple):
    """Least costs of groups by when they are admitted. Y kinds of instances, K groups, M models, F times."""

    least: Float
    """(Y, K, ROWS, F + 1); the last time stands for all from the horizon on"""
    kind: Int
    """(I,) kind of each instance"""
    interval_s: Float
    """(Y, K), and so on, as in :class:`Problem`"""
    batch: Float
    latency_s: Float
    latency_growth_s: Float
    largest_batch: Float
    """(Y, M) of any group of the model"""
    step_s: float
    members: Int
    """(K,) groups, sorted by model"""
    first_member: Int
    """(M + 1,) where each model's begin in ``members``"""


@inlined
def least_group_cost(
    problem: Problem, g: int, first_wait_s: float, last_wait_s: float, shortest_s: float, longest_s: float
) -> float:
    """At most :func:`planners.qlm.cost.group_cost` for every latency from ``shortest_s`` to ``longest_s``."""
    cost = 0.0
    cv = problem.output_cv[g]
    for point in (1.0 / 6.0, 0.5, 5.0 / 6.0):
        wait_s = first_wait_s + point * (last_wait_s - first_wait_s)
        late_s = wait_s - ((1.0 - point) * problem.first_slack_s[g] + point * problem.last_slack_s[g])
        other_s2 = MIN_STD_S * MIN_STD_S + (WAIT_ERROR * wait_s) ** 2
        cost += min(
            request_cost(problem.form, problem.confidence, late_s + shortest_s, other_s2 + (shortest_s * cv) ** 2),
            request_cost(problem.form, problem.confidence, late_s + longest_s, other_s2 + (longest_s * cv) ** 2),
        )
    delay_s = 0.5 * (first_wait_s + last_wait_s) + shortest_s
    return problem.requests[g] * (problem.weight[g] * cost / 3.0 + problem.delay_cost[g] * delay_s)


@inlined
def fewest_of(level: int, largest_batch: float) -> float:
    """Least number of requests in a run of this level; the most is the least of the next level."""
    return level / (LEVELS - 1) * largest_batch


@inlined
def latency_of(tables: Tables, y: int, g: int, in_run: float) -> float:
    return tables.latency_s[y, g] + tables.latency_growth_s[y, g] * (min(tables.batch[y, g], in_run) - 1.0)


@compiled
def _fill(problem: Problem, tables: Tables) -> None:
    for y in range(tables.least.shape[0]):
        for g in range(len(problem.requests)):
            full = tables.batch[y, g]
            requests = problem.requests[g]
            longest_s = latency_of(tables, y, g, full)
            span_s = (requests - 1.0) * tables.interval_s[y, g]
            largest_batch = tables.largest_batch[y, problem.model[g]]
            for t in range(tables.least.shape[3]):
                first_s = t * tables.step_s
                for level in range(LEVELS - 1):
                    most_s = latency_of(tables, y, g, fewest_of(level + 1, largest_batch))
                    for row in range(PARTIAL_ROWS):
                        in_run = requests + row / PARTIAL_ROWS * max(0.0, full - requests)
                        least_s = latency_of(tables, y, g, max(in_run, fewest_of(level, largest_batch)))
                        tables.least[y, g, level * PARTIAL_ROWS + row, t] = least_group_cost(
                            problem, g, first_s, first_s, least_s, max(least_s, most_s)
                        )
                for row in range(SPAN_ROWS + 1):
                    last_s = first_s + row / SPAN_ROWS * span_s
                    tables.least[y, g, FULL_ROWS + row, t] = least_group_cost(
                        problem, g, first_s, last_s, longest_s, longest_s
                    )


def make_tables(problem: Problem, time_steps: int) -> Tables:
    """The cost tables of a problem; ``time_steps`` to a horizon by which everything could have been done."""
    service = (problem.interval_s, problem.batch, problem.latency_s, problem.latency_growth_s)
    _, examples, kind = np.unique(
        np.concatenate(service).T, axis=0, return_index=True, return_inverse=True
    )  # instances of equal service share a table
    by_kind = [np.ascontiguousarray(array[:, examples].T) for array in service]
    horizon_s = max(SMALLEST_HORIZON_S, 1.2 * (problem.hold_s + float(problem.ready_s.max())))
    num_groups, num_models = len(problem.requests), problem.load_s.shape[1]
    largest_batch = np.ones((len(examples), num_models))
    for g, m in enumerate(problem.model):
        largest_batch[:, m] = np.maximum(largest_batch[:, m], by_kind[1][:, g])
    tables = Tables(
        least=np.zeros((len(examples), num_groups, ROWS, time_steps + 1)),
        kind=kind.reshape(-1).astype(np.int32),
        interval_s=by_kind[0],
        batch=by_kind[1],
        latency_s=by_kind[2],
        latency_growth_s=by_kind[3],
        largest_batch=largest_batch,
        step_s=horizon_s / time_steps,
        members=np.argsort(problem.model, kind="stable").astype(np.int32),
        first_member=np.searchsorted(np.sort(problem.model), np.arange(num_models + 1)).astype(np.int32),
    )
    _fill(problem, tables)
    return tables


def largest_prices(problem: Problem, tables: Tables) -> Float:
    """(K,) prices above which a group's cost after the horizon would be less than its price."""
    served = np.zeros((tables.least.shape[0], len(problem.requests)), bool)
    for i, y in enumerate(tables.kind):
        served[y] |= problem.allowed[:, i]
    late = np.where(served, tables.least[:, :, :, -1].min(axis=2), np.inf)
    return np.asarray(late.min(axis=0))


@inlined
def join_run(
    problem: Problem, tables: Tables, y: int, g: int, level: int, start_s: float, present: float, wait_s: float
) -> tuple[float, float, float]:
    """Group ``g`` joins a run: the least this costs, and how long its first and its last request wait."""
    full = tables.batch[y, g]
    interval_s = tables.interval_s[y, g]
    requests = problem.requests[g]
    first_wait_s = max(wait_s, (present + 1.0 - full) * interval_s)
    last_wait_s = max(first_wait_s, (present + requests - full) * interval_s)
    if present + requests <= full:
        # In the last level the batch will be full; these requests are all admitted at once.
        row = level * PARTIAL_ROWS
        room = full - requests
        if level < LEVELS - 1 and room > 0.0:
            row += min(PARTIAL_ROWS - 1, int(PARTIAL_ROWS * present / room))
    else:
        span_s = (requests - 1.0) * interval_s
        row = FULL_ROWS
        if span_s > 0.0:
            row += min(SPAN_ROWS, int(SPAN_ROWS * (last_wait_s - first_wait_s) / span_s + ROUNDING))
    t = min(int((start_s + first_wait_s) / tables.step_s), tables.least.shape[3] - 1)
    return tables.least[y, g, row, t], first_wait_s, last_wait_s


@compiled
def relaxed_cost(problem: Problem, tables: Tables, i: int, sequence: Int, shares: Float) -> float:
    """At most the cost of a queue: as the dynamic program counts it, without merging states.

    Args:
        shares: (len(sequence),) filled with what each group adds, with the swap before it.
    """
    y = tables.kind[i]
    start_s = problem.ready_s[i]
    model = problem.start_model[i]
    present = problem.present[i]
    # Evicting the batch is never slower than this, and what it costs besides is left out.
    drain_s = min(problem.drain_s[i], problem.evict_s[i])
    wait_s = 0.0
    total = 0.0
    level = -1
    for position in range(len(sequence)):
        g = sequence[position]
        shares[position] = 0.0
        if problem.model[g] != model:
            swap_s = problem.load_s[i, problem.model[g]]
            if model >= 0:
                swap_s += problem.unload_s[i, model]
            shares[position] = problem.swap_cost[i] * (0.5 * drain_s + swap_s)
            start_s += drain_s + swap_s
            model = problem.model[g]
            present = 0.0
            wait_s = 0.0
            level = -1
        if level < 0:
            in_run = present
            for other in range(position, len(sequence)):
                if problem.model[sequence[other]] != model:
                    break
                in_run += problem.requests[sequence[other]]
            level = 0
            while level < LEVELS - 1 and in_run > fewest_of(level + 1, tables.largest_batch[y, model]):
                level += 1
        cost, _, wait_s = join_run(problem, tables, y, g, level, start_s, present, wait_s)
        shares[position] += cost
        present += problem.requests[g]
        drain_s = wait_s + latency_of(tables, y, g, max(present, fewest_of(level, tables.largest_batch[y, model])))
        total += shares[position]
    return total
