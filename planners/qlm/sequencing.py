"""Anytime search over all virtual queues: ruin and recreate.

An iteration takes strings of adjacent groups out of a few queues around a random group, and inserts each again where
it adds least, now and then passing over the best place ("adjacent string removal" and "greedy insertion with blinks"
of Christiaens and Vanden Berghe, "Slack Induction by String Removals for Vehicle Routing Problems", Transportation
Science 54(2), 2020). Related groups are those of one model, or those with close deadlines. A worse plan is accepted by
simulated annealing; the best one is kept.

What a group would add to a queue is remembered until that queue changes, so an iteration re-evaluates only the few
queues that it has touched.

For K groups and I instances, memory is 3*(I + 1)*K*4 + I*K*20 bytes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planners.qlm.construct import evaluate
from planners.qlm.cost import cost_from, hold_cost, queue_cost, serve_run
from planners.qlm.plan import Plan
from planners.qlm.problem import Float, Int, Problem
from qlm_env.compiled import compiled, inlined

Long = NDArray[np.int64]

MEAN_REMOVED = 10.0
"""Groups taken out in an iteration, about."""
MAX_STRING = 10.0
BLINK = 0.01
"""Chance that an insertion passes over a queue."""
HOT, COLD = 0.02, 2e-5
"""First and last temperature, relative to the start's cost."""
LEAST_TEMPERATURE = 1e-9
SAME = 1e-12
"""Costs that differ by less, relatively, are those of one plan."""
CHUNK_S = 0.005
"""The clock is read about so often."""

LAST_STAMP, NUM_TOUCHED, NUM_REMOVED, RANDOM = range(4)
"""Entries of :attr:`Search.counter`."""
TOTAL, BEST = range(2)
"""Entries of :attr:`Search.cost`."""


class Search(NamedTuple):
    """Working memory. Row I of the queues holds the groups that are in none; a stamp names one content of a queue."""

    sequence: Int
    """(I + 1, K)"""
    length: Int
    """(I + 1,)"""
    costs: Float
    """(I + 1,)"""
    stamp: Long
    """(I + 1,)"""
    row: Int
    """(K,) where each group is, -1 while it is taken out"""
    hold: Float
    """(K,) cost of leaving it in no queue"""
    added: Float
    """(K, I) least cost that the group adds to the queue with stamp ``added_stamp``"""
    position: Int
    """(K, I) where in the queue that is"""
    added_stamp: Long
    """(K, I)"""
    saved_sequence: Int
    """(I + 1, K) queues before this iteration, of those it has touched"""
    saved_length: Int
    """(I + 1,)"""
    saved_costs: Float
    """(I + 1,)"""
    saved_stamp: Long
    """(I + 1,)"""
    saved_at: Long
    """(I + 1,) iteration that last touched the queue"""
    touched: Int
    """(I + 1,) the queues it has touched"""
    best_sequence: Int
    """(I + 1, K)"""
    best_length: Int
    """(I + 1,)"""
    best_stamp: Long
    """(I + 1,)"""
    removed: Int
    """(K,) groups taken out, in the order in which they will be inserted"""
    removed_from: Int
    """(K,) by group"""
    key: Float
    """(K,) what they are ordered by, by group"""
    related: Int
    """(2, K) all groups by model and deadline, and by deadline alone"""
    rank: Int
    """(2, K) place of each group in ``related``"""
    prefix: Float
    """(K + 1, 3) of the queue being looked at: start, drain and cost before the run that starts there"""
    run_start: Int
    """(K,) of that queue: where the run of each position starts"""
    counter: Long
    """(4,)"""
    cost: Float
    """(2,)"""


# --------------------------------------------------------------------------- parts of an iteration
@inlined
def _draw(search: Search) -> float:
    """Uniform in (0, 1), by the Lehmer generator of Park and Miller."""
    state = search.counter[RANDOM] * 48271 % 2147483647
    search.counter[RANDOM] = state
    return state / 2147483647.0


@inlined
def _new_stamp(search: Search, i: int) -> None:
    search.counter[LAST_STAMP] += 1
    search.stamp[i] = search.counter[LAST_STAMP]


@inlined
def _save(search: Search, iteration: int, i: int) -> None:
    """Keep a queue as it is before this iteration changes it."""
    if search.saved_at[i] == iteration:
        return
    search.saved_at[i] = iteration
    search.touched[search.counter[NUM_TOUCHED]] = i
    search.counter[NUM_TOUCHED] += 1
    search.saved_length[i] = search.length[i]
    search.saved_costs[i] = search.costs[i]
    search.saved_stamp[i] = search.stamp[i]
    for k in range(search.length[i]):
        search.saved_sequence[i, k] = search.sequence[i, k]


@inlined
def _take_out(search: Search, i: int, first: int, size: int) -> None:
    """Take the string of ``size`` groups at ``first`` out of a row."""
    row = search.sequence[i]
    for k in range(first, first + size):
        g = row[k]
        search.removed[search.counter[NUM_REMOVED]] = g
        search.counter[NUM_REMOVED] += 1
        search.removed_from[g] = i
        search.row[g] = -1
    search.length[i] -= size
    for k in range(first, search.length[i]):
        row[k] = row[k + size]


@inlined
def _ruin(problem: Problem, search: Search, iteration: int) -> None:
    """Take strings of groups out of the queues of a random group and of those related to it."""
    num_groups, num_instances = problem.allowed.shape
    in_use = 1
    for i in range(num_instances):
        in_use += search.length[i] > 0
    longest = max(1.0, min(MAX_STRING, num_groups / in_use))
    strings = 1 + int(_draw(search) * max(1.0, 4.0 * MEAN_REMOVED / (1.0 + longest) - 1.0))
    relation = int(2.0 * _draw(search))
    center = search.rank[relation, int(_draw(search) * num_groups)]
    for step in range(2 * num_groups):
        if strings == 0:
            break
        offset = (step + 1) // 2
        place = center + offset if step % 2 else center - offset
        if place < 0 or place >= num_groups:
            continue
        g = search.related[relation, place]
        i = search.row[g]
        # A queue is ruined once; what is held has no order, and goes one by one.
        if i < 0 or (i < num_instances and search.saved_at[i] == iteration):
            continue
        _save(search, iteration, i)
        size = 1
        if i < num_instances:
            size += int(_draw(search) * min(longest, search.length[i] * 1.0))
            size = min(size, search.length[i])
        at = 0
        while search.sequence[i, at] != g:
            at += 1
        lowest = max(0, at - size + 1)
        highest = min(at, search.length[i] - size)
        _take_out(search, i, lowest + int(_draw(search) * (highest - lowest + 1)), size)
        strings -= 1
    for k in range(search.counter[NUM_TOUCHED]):
        i = search.touched[k]
        _new_stamp(search, i)
        if i < num_instances:
            search.costs[i] = queue_cost(problem, i, search.sequence[i], search.length[i])
    for k in range(search.counter[NUM_REMOVED]):
        g = search.removed[k]
        if search.removed_from[g] == num_instances:
            search.costs[num_instances] -= search.hold[g]


@inlined
def _order_removed(problem: Problem, search: Search) -> None:
    """Put what was taken out in an order to insert it in: random, by deadline, by weight, or by model."""
    kind = _draw(search)
    for k in range(search.counter[NUM_REMOVED]):
        g = search.removed[k]
        if kind < 0.4:
            key = _draw(search)
        elif kind < 0.7:
            key = problem.first_slack_s[g]
        elif kind < 0.85:
            key = -problem.requests[g] * problem.weight[g]
        else:
            key = search.rank[0, g] * 1.0
        search.key[g] = key
        at = k
        while at > 0 and search.key[search.removed[at - 1]] > key:
            search.removed[at] = search.removed[at - 1]
            at -= 1
        search.removed[at] = g


@inlined
def _find_cheapest_place(problem: Problem, search: Search, g: int, i: int) -> None:
    """What ``g`` adds to a queue at least, and where: fills ``added``, ``position`` and ``added_stamp``."""
    queue = search.sequence[i]
    length = search.length[i]
    k = 0
    time_s = problem.ready_s[i]
    drain_s = problem.drain_s[i]
    cost = 0.0
    while k < length:
        search.prefix[k, 0] = time_s
        search.prefix[k, 1] = drain_s
        search.prefix[k, 2] = cost
        start = k
        k, time_s, drain_s, added = serve_run(problem, i, queue, k, length, time_s, drain_s)
        cost += added
        for position in range(start, k):
            search.run_start[position] = start
    search.prefix[length, 0] = time_s
    search.prefix[length, 1] = drain_s
    search.prefix[length, 2] = cost
    best_added = math.inf
    best_position = length
    queue[length] = g
    for position in range(length, -1, -1):
        if position < length:
            queue[position + 1] = queue[position]
            queue[position] = g
        # Only what comes after the runs that stay as they are is evaluated.
        start = 0
        if position > 0:
            start = search.run_start[position - 1]
            at_boundary = position == length or search.run_start[position] == position
            if at_boundary and problem.model[queue[position - 1]] != problem.model[g]:
                start = position
        before = search.prefix[start, 2]
        time_s = search.prefix[start, 0]
        drain_s = search.prefix[start, 1]
        limit = best_added + cost - before
        added = cost_from(problem, i, queue, start, length + 1, time_s, drain_s, limit) + before - cost
        if added < best_added:
            best_added = added
            best_position = position
    for k in range(length):
        queue[k] = queue[k + 1]
    search.added[g, i] = best_added
    search.position[g, i] = best_position
    search.added_stamp[g, i] = search.stamp[i]


@inlined
def _recreate(problem: Problem, search: Search, iteration: int) -> None:
    """Insert what was taken out, each group where it adds least, or hold it back if that is cheaper."""
    num_instances = problem.allowed.shape[1]
    until_blink = int(math.log(_draw(search)) / math.log(1.0 - BLINK))
    for k in range(search.counter[NUM_REMOVED]):
        g = search.removed[k]
        best_added = search.hold[g]
        best_i = num_instances
        if until_blink == 0:
            best_added = math.inf
            until_blink = int(math.log(_draw(search)) / math.log(1.0 - BLINK))
        else:
            until_blink -= 1
        for i in range(num_instances):
            if not problem.allowed[g, i]:
                continue
            if until_blink == 0:
                until_blink = int(math.log(_draw(search)) / math.log(1.0 - BLINK))
                continue
            until_blink -= 1
            if search.added_stamp[g, i] != search.stamp[i]:
                _find_cheapest_place(problem, search, g, i)
            if search.added[g, i] < best_added:
                best_added = search.added[g, i]
                best_i = i
        _save(search, iteration, best_i)
        at = search.length[best_i]
        if best_i < num_instances:
            at = search.position[g, best_i]
            search.costs[best_i] += best_added
        else:
            search.costs[best_i] += search.hold[g]
        row = search.sequence[best_i]
        for position in range(search.length[best_i], at, -1):
            row[position] = row[position - 1]
        row[at] = g
        search.length[best_i] += 1
        search.row[g] = best_i
        _new_stamp(search, best_i)


@inlined
def _restore(search: Search) -> None:
    """Undo the iteration; what is remembered of the old queues holds again."""
    for k in range(search.counter[NUM_TOUCHED]):
        i = search.touched[k]
        search.length[i] = search.saved_length[i]
        search.costs[i] = search.saved_costs[i]
        search.stamp[i] = search.saved_stamp[i]
        for position in range(search.length[i]):
            search.sequence[i, position] = search.saved_sequence[i, position]
    for k in range(search.counter[NUM_REMOVED]):
        g = search.removed[k]
        search.row[g] = search.removed_from[g]


@inlined
def _keep_best(search: Search) -> None:
    """Remember the present plan as the best, copying the queues that differ from the best before."""
    search.cost[BEST] = search.cost[TOTAL]
    for i in range(len(search.length)):
        if search.best_stamp[i] != search.stamp[i]:
            search.best_stamp[i] = search.stamp[i]
            search.best_length[i] = search.length[i]
            for k in range(search.length[i]):
                search.best_sequence[i, k] = search.sequence[i, k]


@compiled
def _begin(problem: Problem, search: Search) -> None:
    """Fill what follows from the queues that the search starts from."""
    num_groups, num_instances = problem.allowed.shape
    for g in range(num_groups):
        search.hold[g] = hold_cost(problem, g)
    total = 0.0
    for i in range(num_instances + 1):
        _new_stamp(search, i)
        search.costs[i] = 0.0
        for k in range(search.length[i]):
            g = search.sequence[i, k]
            search.row[g] = i
            if i == num_instances:
                search.costs[i] += search.hold[g]
        if i < num_instances:
            search.costs[i] = queue_cost(problem, i, search.sequence[i], search.length[i])
        total += search.costs[i]
    search.cost[TOTAL] = total
    _keep_best(search)


@compiled
def _iterate(problem: Problem, search: Search, first: int, last: int, temperature: float, cooling: float) -> None:
    """Iterations ``first`` to ``last``, at the temperature ``temperature * exp(-cooling * iteration)``."""
    for iteration in range(first, last):
        search.counter[NUM_TOUCHED] = 0
        search.counter[NUM_REMOVED] = 0
        _ruin(problem, search, iteration)
        _order_removed(problem, search)
        _recreate(problem, search, iteration)
        total = search.cost[TOTAL]
        for k in range(search.counter[NUM_TOUCHED]):
            i = search.touched[k]
            total += search.costs[i] - search.saved_costs[i]
        tolerated = -temperature * math.exp(-cooling * iteration) * math.log(_draw(search))
        # Mostly everything went back where it was; then what is remembered of the queues stays valid.
        changed = abs(total - search.cost[TOTAL]) > SAME * search.cost[TOTAL]
        if changed and total < search.cost[TOTAL] + tolerated:
            search.cost[TOTAL] = total
            if total < search.cost[BEST] * (1.0 - SAME):
                _keep_best(search)
        else:
            _restore(search)


# --------------------------------------------------------------------------- from Python
@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best plan of a search, never worse than the one it started from."""

    plan: Plan
    iterations: int
    timed_out: bool
    """The clock stopped it before its iterations were done."""


def _make_search(problem: Problem, start: Plan, rng: np.random.Generator) -> Search:
    num_groups, num_instances = problem.allowed.shape
    rows = num_instances + 1
    related = np.stack(
        [np.lexsort((problem.first_slack_s, problem.model)), np.argsort(problem.first_slack_s, kind="stable")]
    ).astype(np.int32)
    rank = np.empty_like(related)
    rank[np.arange(2)[:, None], related] = np.arange(num_groups, dtype=np.int32)
    search = Search(
        sequence=start.sequence.copy(),
        length=start.length.copy(),
        costs=np.zeros(rows),
        stamp=np.zeros(rows, np.int64),
        row=np.full(num_groups, -1, np.int32),
        hold=np.zeros(num_groups),
        added=np.zeros((num_groups, num_instances)),
        position=np.zeros((num_groups, num_instances), np.int32),
        added_stamp=np.zeros((num_groups, num_instances), np.int64),
        saved_sequence=np.zeros((rows, num_groups), np.int32),
        saved_length=np.zeros(rows, np.int32),
        saved_costs=np.zeros(rows),
        saved_stamp=np.zeros(rows, np.int64),
        saved_at=np.full(rows, -1, np.int64),
        touched=np.zeros(rows, np.int32),
        best_sequence=np.zeros((rows, num_groups), np.int32),
        best_length=np.zeros(rows, np.int32),
        best_stamp=np.zeros(rows, np.int64),
        removed=np.zeros(num_groups, np.int32),
        removed_from=np.zeros(num_groups, np.int32),
        key=np.zeros(num_groups),
        related=related,
        rank=rank,
        prefix=np.zeros((num_groups + 1, 3)),
        run_start=np.zeros(num_groups, np.int32),
        counter=np.zeros(4, np.int64),
        cost=np.zeros(2),
    )
    search.counter[RANDOM] = rng.integers(1, 2147483647)
    _begin(problem, search)
    return search


def search_plan(
    problem: Problem, start: Plan, rng: np.random.Generator, iterations: int | None, time_limit_s: float
) -> SearchResult:
    """Improve a plan.

    Args:
        start: a plan of every group, once each.
        iterations: the reproducible limit: with the same ``rng`` the result is the same, unless the clock stops the
            search first. None: as many as the time allows, cooling by the clock.
        time_limit_s: wall-clock guard.
    """
    deadline = time.perf_counter() + time_limit_s
    if problem.allowed.size == 0:
        return SearchResult(start.copy(), 0, False)
    search = _make_search(problem, start, rng)
    hot = max(LEAST_TEMPERATURE, HOT * search.cost[TOTAL])
    cooling = math.log(HOT / COLD)
    done, chunk = 0, 1
    while iterations is None or done < iterations:
        begin = time.perf_counter()
        if begin >= deadline:
            break
        last = done + chunk if iterations is None else min(iterations, done + chunk)
        if iterations is None:
            passed = 1.0 - (deadline - begin) / time_limit_s
            _iterate(problem, search, done, last, hot * math.exp(-cooling * passed), 0.0)
        else:
            _iterate(problem, search, done, last, hot, cooling / iterations)
        now = time.perf_counter()
        # As many iterations as took less than a chunk's time, or half of what is left; never many more than before.
        fitting = (last - done) * min(CHUNK_S, 0.5 * (deadline - now)) / max(1e-9, now - begin)
        chunk = max(1, min(4 * chunk, int(fitting)))
        done = last
    plan = Plan(search.best_sequence, search.best_length, np.zeros(len(start.costs)), 0.0)
    plan.total = evaluate(problem, plan.sequence, plan.length, plan.costs)
    if plan.total > start.total:
        plan = start.copy()
    return SearchResult(plan, done, iterations is not None and done < iterations)
