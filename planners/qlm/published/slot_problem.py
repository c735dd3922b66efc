"""The data of the published programs, and what an assignment and order of groups costs by them.

Time accumulates along a queue: a group occupies its instance for ``service_s``, and the model of the one behind it is
swapped in where it is another. Its last request is done ``latency_s`` after the group's service, which does not hold
up the next group. Service and latency are independent and normal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple, TypeAlias

import numpy as np

from planners.qlm.problem import Flag, Float, Int, Problem

TOLERANCE_S = 1e-3
"""Lateness that counts as none: more than SCIP's tolerances can add up to, less than anyone would notice."""
COMPLETION_WEIGHT = 1e-2
"""Lateness, in seconds of weight 1, that counts as much as a second until completion: it decides between equals."""
FARTHEST_QUANTILE = 8.0
"""Standard deviations above its mean beyond which no completion is looked for."""


class Goal(Enum):
    """What a program minimises."""

    PENALTY = "penalty"
    """Completion minus deadline, summed over groups, none of which may be positive."""
    TARDINESS = "tardiness"
    """Weighted lateness, and a little for time until completion; always feasible."""


class SlotProblem(NamedTuple):
    """G groups, I instances, K models; times in seconds from now."""

    service_s: Float
    """(G, I) mean time for which a group occupies an instance"""
    service_std_s: Float
    """(G, I)"""
    latency_s: Float
    """(G, I) mean time from the end of a group's service to its completion"""
    latency_std_s: Float
    """(G, I)"""
    deadline_s: Float
    """(G,)"""
    weight: Float
    """(G,) of a second of lateness"""
    model: Int
    """(G,) in 0..K-1"""
    allowed: Flag
    """(G, I)"""
    release_s: Float
    """(I,) when the model now coming, if any, is loaded"""
    begin_s: Float
    """(I, K) and how long after that a group of a model can begin: the running batch has room, or the swap is done"""
    swap_s: Float
    """(I, K, K) from a model to another; 0 on the diagonal"""


Queues: TypeAlias = Sequence[Sequence[int]]
"""The groups of each instance in order of execution."""


def slot_problem(problem: Problem) -> SlotProblem:
    """The published program's view of a planning problem.

    The paper's waiting time is tokens ahead over token throughput; here it is requests ahead times the time between
    admissions to a full batch. By the central limit theorem the service of ``n`` requests varies by ``sqrt(n)`` times
    as much as that of one. A group has one deadline, its first request's. A swap waits until the batch has drained, so
    its time includes that: the running batch's, or the mean latency of the leaving model's groups. A deadline beyond
    the end of the longest schedule cannot bind, and is drawn in to there.
    """
    num_instances = len(problem.ready_s)
    requests = problem.requests[:, None]
    models, model = np.unique(problem.model, return_inverse=True)
    latency_s = problem.latency_s + problem.latency_growth_s * (problem.batch - 1.0)
    swap_s = np.zeros((num_instances, len(models), len(models)))
    begin_s = np.zeros((num_instances, len(models)))
    for i in range(num_instances):
        resident = problem.start_model[i]
        unload_s = problem.unload_s[i, resident] if resident >= 0 else 0.0
        load_s = problem.load_s[i, models]
        for k, leaving in enumerate(models):
            those = problem.allowed[:, i] & (model == k)
            drain_s = float(latency_s[those, i].mean()) if those.any() else 0.0
            swap_s[i, k] = drain_s + problem.unload_s[i, leaving] + load_s
            swap_s[i, k, k] = 0.0
            if leaving == resident:
                begin_s[i, k] = _wait_for_room_s(problem, i, those)
            else:
                begin_s[i, k] = problem.drain_s[i] + unload_s + load_s[k]
    slots = SlotProblem(
        service_s=requests * problem.interval_s,
        service_std_s=np.sqrt(requests) * problem.interval_s * problem.output_cv[:, None],
        latency_s=latency_s,
        latency_std_s=latency_s * problem.output_cv[:, None],
        deadline_s=problem.first_slack_s,
        weight=problem.requests * problem.weight,
        model=model.astype(np.int32),
        allowed=problem.allowed,
        release_s=problem.ready_s,
        begin_s=begin_s,
        swap_s=swap_s,
    )
    return slots._replace(deadline_s=np.minimum(slots.deadline_s, _horizon_s(slots)))


def _wait_for_room_s(problem: Problem, i: int, resident: Flag) -> float:
    """Until the running batch has room for a request of one of the groups ``resident``, (G,)."""
    if not resident.any():
        return 0.0
    beyond = problem.present[i] + 1.0 - problem.batch[resident, i].mean()
    return max(0.0, float(beyond)) * float(problem.interval_s[resident, i].mean())


def latest_end_s(slots: SlotProblem, i: int) -> Float:
    """(G,) when the service at each position of instance ``i``'s queue can end at the latest."""
    longest_swap_s = np.maximum(slots.begin_s[i], slots.swap_s[i].max(axis=0))
    longest_s = np.where(slots.allowed[:, i], slots.service_s[:, i] + longest_swap_s[slots.model], 0.0)
    return np.asarray(slots.release_s[i] + np.cumsum(np.sort(longest_s)[::-1]))


def _horizon_s(slots: SlotProblem) -> float:
    """Before which every group is complete, wherever it stands."""
    ends_s = [latest_end_s(slots, i)[-1] for i in range(len(slots.release_s))]
    spread_s = np.sqrt((slots.service_std_s**2).sum(axis=0) + (slots.latency_std_s**2).max(axis=0))
    return float(np.max(ends_s + slots.latency_s.max(axis=0) + FARTHEST_QUANTILE * spread_s))


def completions(slots: SlotProblem, i: int, order: Sequence[int]) -> Iterator[tuple[float, float]]:
    """Mean and standard deviation of each group's completion when instance ``i`` runs ``order``."""
    end_s = slots.release_s[i]
    variance_s2 = 0.0
    previous: int | None = None
    for g in order:
        model = int(slots.model[g])
        end_s += slots.begin_s[i, model] if previous is None else slots.swap_s[i, previous, model]
        end_s += slots.service_s[g, i]
        variance_s2 += slots.service_std_s[g, i] ** 2
        yield float(end_s + slots.latency_s[g, i]), math.sqrt(variance_s2 + slots.latency_std_s[g, i] ** 2)
        previous = model


def group_cost(slots: SlotProblem, g: int, mean_s: float, std_s: float, goal: Goal, quantile: float) -> float:
    """What one completion adds to a program's objective; infinite where it is not allowed.

    Args:
        quantile: standard deviations kept between mean completion and deadline: 0 for the second version's program.
    """
    deadline_s = float(slots.deadline_s[g])
    late_s = mean_s + quantile * std_s - deadline_s
    if goal is Goal.TARDINESS:
        return float(slots.weight[g]) * max(0.0, late_s) + COMPLETION_WEIGHT * mean_s
    return mean_s - deadline_s if late_s <= TOLERANCE_S else math.inf


def cost(slots: SlotProblem, queues: Queues, goal: Goal, quantile: float) -> float:
    """Objective of an assignment and order; infinite where a deadline is not kept that must be."""
    return sum(
        group_cost(slots, g, mean_s, std_s, goal, quantile)
        for i, order in enumerate(queues)
        for g, (mean_s, std_s) in zip(order, completions(slots, i, order), strict=True)
    )
