"""The program of the paper's first version: every group meets its deadline with a given probability.

Completions are normal, and mean and variance both accumulate along a queue, so for a group at position ``j`` of
instance ``i``

``P(C_g <= d_g) >= Delta``  is  ``E[i,j] + l_{g,i} + z sigma[i,j] <= d_g``,  ``z = Phi^-1(Delta)``,
``sigma[i,j]^2 = sum_h s_{h,i}^2 a[h,i,j] + sum_g tau_{g,i}^2 x[g,i,j]``

with ``a[h,i,j] = sum_{k<=j} x[h,i,k]`` (``h`` is ahead of position ``j`` or at it), ``s`` and ``tau`` the standard
deviations of service and latency. A binary is its own square, so the margin ``r = z sigma`` is the length of the
vector of all ``z s a`` and ``z tau x``, and ``r >= |...|`` is a second-order cone: exact, and convex for
``Delta >= 1/2``. The linear reading, one effective service time ``mu_g + z s_g`` a group, would add standard deviations
where variances add, and keep a margin up to ``sqrt(n)`` times too large behind ``n`` groups.

The objective is the second version's with these margins: the sum of expected penalties, or the weighted lateness of
the ``Delta`` quantile of the completion where the chances cannot all be kept.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pyscipopt
from pyscipopt import quicksum

from planners.qlm.published.slot_model import (
    Limits,
    Slot,
    SlotModel,
    Solution,
    build_slot_model,
    earliest_completion_s,
    optimise,
    possible_places,
)
from planners.qlm.published.slot_problem import Goal, SlotProblem
from planners.qlm.published.slot_program import INFEASIBLE, minimise_penalties, minimise_tardiness

ROOM = 1.01
"""A bound that a margin can reach exactly is cut off by rounding in SCIP's propagation."""


def normal_quantile(confidence: float) -> float:
    """``z``: standard deviations above the mean that keep a deadline with probability ``confidence``, 0.5 or more."""
    return NormalDist().inv_cdf(confidence)


def solve_chance_program(slots: SlotProblem, goal: Goal, limits: Limits, confidence: float) -> Solution:
    """Solve the first version's program.

    Args:
        confidence: probability with which each group must meet its deadline, in [0.5, 1).
    """
    quantile = normal_quantile(confidence)
    earliest_s = earliest_completion_s(slots, quantile)
    possible = possible_places(slots, goal, earliest_s)
    if not possible.any(axis=(1, 2)).all():
        return INFEASIBLE
    model = build_slot_model(slots, possible, "qlm-chance")
    margins = {slot: _margin(model, slot, quantile) for slot in model.end_s}
    earliest_mean_s = earliest_completion_s(slots, 0.0)
    if goal is Goal.PENALTY:
        minimise_penalties(model, margins, earliest_mean_s)
    else:
        minimise_tardiness(model, margins, earliest_s, earliest_mean_s)
    return optimise(model, goal, quantile, limits)


def _margin(model: SlotModel, slot: Slot, quantile: float) -> pyscipopt.Variable:
    """``r``: the margin of what stands at a position, above it at most what the largest variances add up to."""
    scip, slots = model.scip, model.slots
    i, j = slot
    ahead = {
        g: [model.place[g, i, k] for k in range(j + 1) if (g, i, k) in model.place] for g in range(len(slots.weight))
    }
    spread_s2 = np.sort([slots.service_std_s[g, i] ** 2 for g, places in ahead.items() if places])[::-1][: j + 1].sum()
    latency_s2 = max(slots.latency_std_s[g, i] ** 2 for g in model.groups_at(i, j))
    margin_s = scip.addVar(f"r_{i}_{j}", ub=ROOM * quantile * math.sqrt(spread_s2 + latency_s2))
    parts = []
    for g, places in ahead.items():
        if places:
            share = scip.addVar(f"a_{g}_{i}_{j}", ub=1.0)
            scip.addCons(share == quicksum(places))
            parts.append((quantile * float(slots.service_std_s[g, i])) ** 2 * share * share)
    for g in model.groups_at(i, j):
        x = model.place[g, i, j]
        parts.append((quantile * float(slots.latency_std_s[g, i])) ** 2 * x * x)
    scip.addCons(quicksum(parts) <= margin_s * margin_s)
    return margin_s
