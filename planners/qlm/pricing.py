"""Cheapest virtual queues under prices on the groups: what column generation asks of each instance, bounded from below.

With a price for each group, the *reduced cost* of a queue is its cost less the prices of its groups. The least over
all queues of an instance is found here by dynamic programming over the relaxed costs of
:mod:`planners.qlm.cost_tables`, so what is returned is never more than the true least, which is all that a lower bound
on plans needs:

1. A chain of groups remembers them, and takes none again. Chains meet in cells of time and count. One that is less in
   nothing than another there (cost, state, groups remembered) is dropped; where there are more than a cell has room
   for, two are merged into one that has the less of each and remembers what both do.
2. Prices are at most a group's cost from the horizon on, so nothing after the horizon lowers a reduced cost.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planners.qlm.cost_tables import LEVELS, ROWS, Tables, fewest_of, join_run, latency_of
from planners.qlm.problem import Float, Int, Problem
from qlm_env.compiled import compiled, inlined, kernel

Long = NDArray[np.int64]

WORD_BITS = 63
"""Groups remembered in one word."""
MOST_NODES = 1 << 22


class Workspace(NamedTuple):
    """Labels of the dynamic program, by cell. T cells of time, N of the requests in a run, M models, K groups.

    Cells: N of the run in progress; T * M for runs that wait to begin, by time and model; T * M for runs that have
    drained, by time and model; one for the beginning, and one spare.
    """

    cost: Float
    """(cells, L) reduced costs of chains, ascending"""
    start_s: Float
    """(cells, L) when the run began, is to begin, or has drained"""
    present: Float
    """(cells, L) requests in the run"""
    wait_s: Float
    """(cells, L) until when they wait"""
    memory: Long
    """(cells, L, W) groups the chain may not take again, as bits"""
    node: Int
    """(cells, L) the chain"""
    used: Int
    """(cells,) labels in use"""
    gain: Float
    """(T, K) what each group can lower a reduced cost by, at most, from a time on"""
    by_density: Int
    """(T, K) groups that can, by gain per second that they occupy the instance, falling; -1 behind them"""
    density: Float
    """(K,) of those in ``by_density``, of one time"""
    occupied_s: Float
    """(K,) time for which each group occupies the instance, at least"""
    seconds_each: Float
    """(M,) and one request of each model"""
    latest_s: Float
    """(1,) by when the instance has been occupied with all that gains anything"""
    scratch: Long
    """(W,)"""
    node_group: Int
    """(C,) last group of a chain"""
    node_parent: Int
    """(C,) the chain before it, -1 for none"""
    node_count: Int
    """(1,)"""
    last_cost: Float
    """(K,) least reduced cost of the queues that end with each group"""
    last_node: Int
    """(K,) and the chain before it"""
    time_cells: int
    count_cells: int


def make_workspace(problem: Problem, time_cells: int, count_cells: int, labels: int) -> Workspace:
    """Room for ``labels`` in each cell, on axes of ``time_cells`` and, within a run, of ``count_cells``."""
    num_models, num_groups = problem.load_s.shape[1], len(problem.requests)
    cells = count_cells + 2 * time_cells * num_models + 2
    words = (num_groups + WORD_BITS - 1) // WORD_BITS
    nodes = min(MOST_NODES, 4 * time_cells * num_models * count_cells * labels + 1024)
    return Workspace(
        cost=np.empty((cells, labels)),
        start_s=np.empty((cells, labels)),
        present=np.empty((cells, labels)),
        wait_s=np.empty((cells, labels)),
        memory=np.empty((cells, labels, words), np.int64),
        node=np.empty((cells, labels), np.int32),
        used=np.zeros(cells, np.int32),
        gain=np.empty((time_cells, num_groups)),
        by_density=np.empty((time_cells, num_groups), np.int32),
        density=np.empty(num_groups),
        occupied_s=np.empty(num_groups),
        seconds_each=np.empty(num_models),
        latest_s=np.empty(1),
        scratch=np.empty(words, np.int64),
        node_group=np.empty(nodes, np.int32),
        node_parent=np.empty(nodes, np.int32),
        node_count=np.zeros(1, np.int32),
        last_cost=np.empty(num_groups),
        last_node=np.empty(num_groups, np.int32),
        time_cells=time_cells,
        count_cells=count_cells,
    )


# --------------------------------------------------------------------------- labels
@inlined
def _remembers(work: Workspace, x: int, slot: int, g: int) -> bool:
    return work.memory[x, slot, g // WORD_BITS] >> (g % WORD_BITS) & 1 != 0


@inlined
def _copy_label(work: Workspace, x: int, source: int, target: int) -> None:
    work.cost[x, target] = work.cost[x, source]
    work.start_s[x, target] = work.start_s[x, source]
    work.present[x, target] = work.present[x, source]
    work.wait_s[x, target] = work.wait_s[x, source]
    work.node[x, target] = work.node[x, source]
    for w in range(len(work.scratch)):
        work.memory[x, target, w] = work.memory[x, source, w]


@inlined
def _longer_chain(work: Workspace, group: int, chain: int) -> int:
    """A chain one group longer; when there is no more room for chains, -2, of which nothing can be traced."""
    node = work.node_count[0]
    if chain == -2 or node >= len(work.node_group):
        return -2
    work.node_group[node] = group
    work.node_parent[node] = chain
    work.node_count[0] = node + 1
    return node


@inlined
def _offer(
    work: Workspace, x: int, cost: float, start_s: float, present: float, wait_s: float, y: int, source: int, g: int
) -> None:
    """A label for cell ``x``: the chain of cell ``y`` in slot ``source``, longer by group ``g`` (-1: none).

    One that is less in nothing than another, memory included, is superfluous. If there are too many, the two dearest
    become one that has the less of each and remembers what both do.
    """
    words = len(work.scratch)
    most = work.cost.shape[1]
    for w in range(words):
        work.scratch[w] = work.memory[y, source, w]
    if g >= 0:
        work.scratch[g // WORD_BITS] |= 1 << (g % WORD_BITS)
    count = work.used[x]
    place = 0
    superfluous = False
    while place < count and work.cost[x, place] <= cost:
        if work.start_s[x, place] <= start_s and work.present[x, place] <= present and work.wait_s[x, place] <= wait_s:
            more = 0
            for w in range(words):
                more |= work.memory[x, place, w] & ~work.scratch[w]
            if more == 0:
                superfluous = True
                break
        place += 1
    if not superfluous:
        kept = place
        for slot in range(place, count):
            more = 1
            if start_s <= work.start_s[x, slot] and present <= work.present[x, slot] and wait_s <= work.wait_s[x, slot]:
                more = 0
                for w in range(words):
                    more |= work.scratch[w] & ~work.memory[x, slot, w]
            if more != 0:
                if slot != kept:
                    _copy_label(work, x, slot, kept)
                kept += 1
        count = kept
        last = most - 1
        if count == most and place == most:
            work.start_s[x, last] = min(work.start_s[x, last], start_s)
            work.present[x, last] = min(work.present[x, last], present)
            work.wait_s[x, last] = min(work.wait_s[x, last], wait_s)
            for w in range(words):
                work.memory[x, last, w] &= work.scratch[w]
        else:
            node = work.node[y, source]
            if g >= 0:
                node = _longer_chain(work, g, node)
            if count == most:
                if place == last:
                    start_s = min(work.start_s[x, last], start_s)
                    present = min(work.present[x, last], present)
                    wait_s = min(work.wait_s[x, last], wait_s)
                    for w in range(words):
                        work.scratch[w] &= work.memory[x, last, w]
                else:
                    work.start_s[x, last - 1] = min(work.start_s[x, last], work.start_s[x, last - 1])
                    work.present[x, last - 1] = min(work.present[x, last], work.present[x, last - 1])
                    work.wait_s[x, last - 1] = min(work.wait_s[x, last], work.wait_s[x, last - 1])
                    for w in range(words):
                        work.memory[x, last - 1, w] &= work.memory[x, last, w]
                count -= 1
            for slot in range(count, place, -1):
                _copy_label(work, x, slot - 1, slot)
            work.cost[x, place] = cost
            work.start_s[x, place] = start_s
            work.present[x, place] = present
            work.wait_s[x, place] = wait_s
            work.node[x, place] = node
            for w in range(words):
                work.memory[x, place, w] = work.scratch[w]
            count += 1
        work.used[x] = count


@inlined
def _cannot_reach(work: Workspace, x: int, slot: int, k: int, room_s: float, goal: float) -> bool:
    """Whether no continuation from time cell ``k`` on, in ``room_s`` of the instance's time, costs less than ``goal``.

    What can still be gained is at most that of a knapsack whose items may be cut: the groups not remembered, at their
    gains from now on.
    """
    cost = work.cost[x, slot]
    for position in range(work.by_density.shape[1]):
        if cost < goal:
            return False
        g = work.by_density[k, position]
        if g < 0:
            return True
        if _remembers(work, x, slot, g):
            continue
        if work.occupied_s[g] >= room_s:
            return cost - work.gain[k, g] * room_s / work.occupied_s[g] >= goal
        cost -= work.gain[k, g]
        room_s -= work.occupied_s[g]
    return cost >= goal


# --------------------------------------------------------------------------- runs
@kernel
def _take_small(
    problem: Problem, tables: Tables, work: Workspace, i: int, model: int, level: int, prices: Float, c: int,
    first: float, width: float,
) -> None:  # fmt: skip
    """Groups too small to leave cell ``c`` of the run: every label takes those that pay, and does not remember it.

    That is at most the cost of any choice among them, in any order, as the label's state stays as it is.
    """
    spare = len(work.used) - 1
    for slot in range(work.used[c]):
        cost, present = work.cost[c, slot], work.present[c, slot]
        for position in range(tables.first_member[model], tables.first_member[model + 1]):
            g = tables.members[position]
            after = present + problem.requests[g]
            if not problem.allowed[g, i] or min(work.count_cells - 1, int((after - first) / width)) > c:
                continue
            if not _remembers(work, c, slot, g):
                start_s, wait_s = work.start_s[c, slot], work.wait_s[c, slot]
                added = join_run(problem, tables, tables.kind[i], g, level, start_s, present, wait_s)[0] - prices[g]
                if added < 0.0:
                    cost += added
                    work.node[c, slot] = _longer_chain(work, g, work.node[c, slot])
        _offer(work, spare, cost, work.start_s[c, slot], present, work.wait_s[c, slot], c, slot, -1)
    work.used[c] = work.used[spare]
    for slot in range(work.used[spare]):
        work.cost[c, slot] = work.cost[spare, slot]
        work.start_s[c, slot] = work.start_s[spare, slot]
        work.present[c, slot] = work.present[spare, slot]
        work.wait_s[c, slot] = work.wait_s[spare, slot]
        work.node[c, slot] = work.node[spare, slot]
        for w in range(len(work.scratch)):
            work.memory[c, slot, w] = work.memory[spare, slot, w]
    work.used[spare] = 0


@kernel
def _run(
    problem: Problem, tables: Tables, work: Workspace, i: int, model: int, prices: Float, cell_s: float, x: int,
    least: float,
) -> float:  # fmt: skip
    """All runs of ``model`` that begin with the labels of cell ``x``: note queues, and where the runs have drained.

    Args:
        least: least reduced cost so far; returned with what is found here.
    """
    y = tables.kind[i]
    begin, end = tables.first_member[model], tables.first_member[model + 1]
    horizon_s = tables.step_s * (tables.least.shape[3] - 1)
    cells = work.count_cells
    start_s = work.start_s[x, 0]
    first = work.present[x, 0]
    for slot in range(work.used[x]):
        start_s = min(start_s, work.start_s[x, slot])
        first = min(first, work.present[x, slot])
    most = 0.0
    reach = 1.0
    fewest = math.inf
    for position in range(begin, end):
        g = tables.members[position]
        if problem.allowed[g, i]:
            most += problem.requests[g]
            fewest = min(fewest, problem.requests[g])
            reach = max(reach, tables.batch[y, g] + (horizon_s - start_s) / max(1e-9, tables.interval_s[y, g]))
    width = max(1.0, min(most, reach - first)) / cells
    for level in range(LEVELS):
        fewest_in_run = fewest_of(level, tables.largest_batch[y, model])
        most_in_run = fewest_of(level + 1, tables.largest_batch[y, model]) if level < LEVELS - 1 else math.inf
        # There are more requests than that already, or not as many groups.
        if first >= most_in_run or first + most < fewest_in_run:
            continue
        for c in range(cells):
            work.used[c] = 0
        for slot in range(work.used[x]):
            _offer(work, 0, work.cost[x, slot], work.start_s[x, slot], work.present[x, slot], 0.0, x, slot, -1)
        for c in range(cells):
            if work.used[c] == 0:
                continue
            if fewest < width or c == cells - 1:
                _take_small(problem, tables, work, i, model, level, prices, c, first, width)
            for slot in range(work.used[c]):
                start_s, present, wait_s = work.start_s[c, slot], work.present[c, slot], work.wait_s[c, slot]
                k = int((start_s + wait_s) / cell_s)
                room_s = work.latest_s[0] - start_s - present * work.seconds_each[model]
                if k >= work.time_cells or _cannot_reach(work, c, slot, k, room_s, least):
                    continue
                for position in range(begin, end):
                    g = tables.members[position]
                    after = present + problem.requests[g]
                    if not problem.allowed[g, i] or after > most_in_run or _remembers(work, c, slot, g):
                        continue
                    added, first_wait_s, last_wait_s = join_run(problem, tables, y, g, level, start_s, present, wait_s)
                    if start_s + first_wait_s >= horizon_s:
                        continue
                    # Behind others of its run, a group that costs more than its price is better left out, unless it
                    # is the last before a swap: the run may drain earlier with it.
                    pays = c == 0 or added < prices[g]
                    total = work.cost[c, slot] + added - prices[g]
                    if pays and total < work.last_cost[g]:
                        work.last_cost[g] = total
                        work.last_node[g] = work.node[c, slot]
                        least = min(least, total)
                    drain_s = last_wait_s + latency_of(tables, y, g, max(after, fewest_in_run))
                    k = int((start_s + drain_s) / cell_s)
                    if k < work.time_cells:
                        closed = cells + (work.time_cells + k) * problem.load_s.shape[1] + model
                        closed_cost = total + 0.5 * problem.swap_cost[i] * drain_s
                        _offer(work, closed, closed_cost, start_s + drain_s, 0.0, 0.0, c, slot, g)
                    d = min(cells - 1, int((after - first) / width))
                    if pays and d > c:
                        _offer(work, d, total, start_s, after, last_wait_s, c, slot, g)
    work.used[x] = 0
    return least


@kernel
def _begin_next(problem: Problem, work: Workspace, i: int, cell_s: float, x: int, model: int, least: float) -> None:
    """Runs of ``model`` (-1: of none) that have drained, in cell ``x``, are followed by those of every other model."""
    num_models = problem.load_s.shape[1]
    for slot in range(work.used[x]):
        k = int(work.start_s[x, slot] / cell_s)
        room_s = work.latest_s[0] - work.start_s[x, slot]
        if k >= work.time_cells or _cannot_reach(work, x, slot, k, room_s, least):
            continue
        for next_model in range(num_models):
            if next_model == model:
                continue
            swap_s = problem.load_s[i, next_model]
            if model >= 0:
                swap_s += problem.unload_s[i, model]
            begin_s = work.start_s[x, slot] + swap_s
            k = int(begin_s / cell_s)
            if k < work.time_cells:
                pending = work.count_cells + k * num_models + next_model
                cost = work.cost[x, slot] + problem.swap_cost[i] * swap_s
                _offer(work, pending, cost, begin_s, 0.0, 0.0, x, slot, -1)
    work.used[x] = 0


@inlined
def _begin_chains(work: Workspace, x: int, cost: float, start_s: float, present: float) -> None:
    """One label in cell ``x``: the chain of no group."""
    work.used[x] = 1
    work.cost[x, 0] = cost
    work.start_s[x, 0] = start_s
    work.present[x, 0] = present
    work.wait_s[x, 0] = 0.0
    work.node[x, 0] = -1
    for w in range(len(work.scratch)):
        work.memory[x, 0, w] = 0


@inlined
def _fill_gains(problem: Problem, tables: Tables, work: Workspace, i: int, prices: Float) -> None:
    """What groups can gain on instance ``i``, from when on, and how long they occupy it at least.

    A run of ``n`` requests lasts at least ``n`` times the ``seconds_each`` of its model, or else it is the last: a full
    batch turns over in the time between admissions, and the latency of one that is not full grows with it from that of
    a single request. In the last run a batch more can be admitted in time, and the last group can go on beyond it.
    """
    y = tables.kind[i]
    work.seconds_each[:] = math.inf
    for g in range(len(prices)):
        if problem.allowed[g, i]:
            full = tables.batch[y, g]
            alone_s, full_s = latency_of(tables, y, g, 1.0), latency_of(tables, y, g, full)
            each_s = min(tables.interval_s[y, g], alone_s, full_s / max(1.0, full))
            work.seconds_each[problem.model[g]] = min(work.seconds_each[problem.model[g]], each_s)
    last_s, batch_s, longest_s = 0.0, 0.0, 0.0
    for g in range(len(prices)):
        if problem.allowed[g, i]:
            each_s = work.seconds_each[problem.model[g]]
            work.occupied_s[g] = max(1e-9, problem.requests[g] * each_s)
            batch_s = max(batch_s, tables.batch[y, g] * each_s)
            longest_s = max(longest_s, work.occupied_s[g])
    for k in range(work.time_cells):
        t = int(k / work.time_cells * (tables.least.shape[3] - 1))
        gaining = 0
        for g in range(len(prices)):
            gain = 0.0
            if problem.allowed[g, i]:
                for row in range(ROWS):
                    gain = max(gain, prices[g] - tables.least[y, g, row, t])
            work.gain[k, g] = gain
            if gain > 0.0:
                place = gaining
                density = gain / work.occupied_s[g]
                while place > 0 and density > work.density[place - 1]:
                    work.density[place] = work.density[place - 1]
                    work.by_density[k, place] = work.by_density[k, place - 1]
                    place -= 1
                work.density[place] = density
                work.by_density[k, place] = g
                gaining += 1
        if gaining < len(prices):
            work.by_density[k, gaining] = -1
        if gaining > 0:
            last_s = (k + 1) * tables.step_s * (tables.least.shape[3] - 1) / work.time_cells
    work.latest_s[0] = last_s + batch_s + longest_s


@compiled
def price(problem: Problem, tables: Tables, work: Workspace, i: int, prices: Float, goal: float) -> float:
    """At most the least reduced cost of all queues of instance ``i``, the empty one (0) among them.

    The queues found are in ``work``: the cheapest that ends with each group; see :func:`chain_of`. Chains that cannot
    lead to the least are not continued.

    Args:
        prices: (K,), none above :func:`largest_prices`.
        goal: a reduced cost that a queue is known to have, or 0; queues that cost more are not looked for.
    """
    num_models = problem.load_s.shape[1]
    cell_s = tables.step_s * (tables.least.shape[3] - 1) / work.time_cells
    _fill_gains(problem, tables, work, i, prices)
    work.used[:] = 0
    work.last_cost[:] = math.inf
    work.node_count[0] = 0
    root = len(work.used) - 2
    least = goal
    ready_s, loaded = problem.ready_s[i], problem.start_model[i]
    drain_s = min(problem.drain_s[i], problem.evict_s[i])
    _begin_chains(work, root, 0.5 * problem.swap_cost[i] * drain_s, ready_s + drain_s, 0.0)
    _begin_next(problem, work, i, cell_s, root, loaded, least)
    if loaded >= 0:
        # The present batch is that of this run alone, so its labels are kept apart from others of this time.
        _begin_chains(work, root, 0.0, ready_s, problem.present[i])
        least = _run(problem, tables, work, i, loaded, prices, cell_s, root, least)
    for k in range(work.time_cells):
        # A run may drain, and the next begin, within the cell. Each wave begins later than the one before it, so
        # that these end; merging them would let them go on for ever.
        waiting = True
        while waiting:
            waiting = False
            for model in range(num_models):
                closed = work.count_cells + (work.time_cells + k) * num_models + model
                _begin_next(problem, work, i, cell_s, closed, model, least)
            for model in range(num_models):
                pending = work.count_cells + k * num_models + model
                if work.used[pending] > 0:
                    waiting = True
                    least = _run(problem, tables, work, i, model, prices, cell_s, pending, least)
    return least


def chain_of(work: Workspace, g: int) -> list[int] | None:
    """The groups, in order, of the cheapest queue that ends with ``g``; ``None`` if there was no room to note it."""
    groups = [g]
    node = int(work.last_node[g])
    while node >= 0:
        groups.append(int(work.node_group[node]))
        node = int(work.node_parent[node])
    return groups[::-1] if node == -1 else None
