"""The program of the paper's second version: no penalty may be positive, and their sum is least.

On the variables of :mod:`slot_model`, with the penalty of what stands at a position

``p[i,j] = e[i,j] + sum_g (l_{g,i} - d_g) x[g,i,j]``,  ``e[i,j] >= E[i,j] - H[i,j] (1 - sum_g x[g,i,j])``,  ``e >= 0``

(``e`` is the end of service of a position in use, and 0 of an empty one; ``H`` bounds ``E``), the literal form is

``min sum p[i,j]``  subject to  ``p[i,j] <= 0``,

which has no solution when some deadline cannot be met. The relaxation offered for that case,

``min sum_g w_g t_g + epsilon sum_g C_g``,  ``t_g >= E[i,j] + l_{g,i} - d_g - M (1 - x[g,i,j])``,  ``t >= 0``,

always has one. Mean completions ``C`` decide between plans that are equally late: without them, a needless swap would
cost nothing as long as what waits for it is in time. ``t`` and ``e`` are also at least what the earliest completion at
each position makes them; these inequalities change no optimum, but without them the linear relaxation is next to
nothing.

Both objectives take a margin ``r[i,j]`` beside ``E[i,j]``: the standard deviations that the first version's program
(:mod:`chance_program`) keeps. Here there is none.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyscipopt
from pyscipopt import quicksum

from planners.qlm.problem import Float
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
from planners.qlm.published.slot_problem import COMPLETION_WEIGHT, Goal, SlotProblem

Margins = Mapping[Slot, pyscipopt.Variable]
"""Seconds kept between the mean completion of a position's group and its deadline, bounded; none where absent."""

INFEASIBLE = Solution("infeasible", None, None, None, 0, 0.0)


def solve_slot_program(slots: SlotProblem, goal: Goal, limits: Limits) -> Solution:
    """Solve the second version's program."""
    earliest_s = earliest_completion_s(slots, 0.0)
    possible = possible_places(slots, goal, earliest_s)
    if not possible.any(axis=(1, 2)).all():
        return INFEASIBLE
    model = build_slot_model(slots, possible, "qlm-slots")
    if goal is Goal.PENALTY:
        minimise_penalties(model, {}, earliest_s)
    else:
        minimise_tardiness(model, {}, earliest_s, earliest_s)
    return optimise(model, goal, 0.0, limits)


def minimise_penalties(model: SlotModel, margins: Margins, earliest_s: Float) -> None:
    """The literal objective: no penalty positive, margin included, and the sum of penalties, without it, least.

    Args:
        earliest_s: (G, I, G) mean completion that a group at a position cannot beat.
    """
    scip, slots = model.scip, model.slots
    penalties = []
    for (i, j), completion_s in _completions(model, earliest_s).items():
        due_s = quicksum(float(slots.deadline_s[g]) * model.place[g, i, j] for g in model.groups_at(i, j))
        penalty_s = scip.addVar(f"p_{i}_{j}", lb=None, ub=0.0)
        scip.addCons(penalty_s == completion_s - due_s)
        if (i, j) in margins:
            margin_s = margins[i, j]
            scip.addCons(penalty_s + margin_s <= margin_s.getUbOriginal() * (1 - model.used(i, j)))
        penalties.append(penalty_s)
    scip.setObjective(quicksum(penalties))


def minimise_tardiness(model: SlotModel, margins: Margins, earliest_s: Float, earliest_mean_s: Float) -> None:
    """The relaxation: weighted lateness, margin included, is least, and of equals the one that is complete soonest.

    Args:
        earliest_s: (G, I, G) completion, margin included, that a group at a position cannot beat.
        earliest_mean_s: the same without margin.
    """
    scip, slots = model.scip, model.slots
    late_s = [scip.addVar(f"t_{g}") for g in range(len(slots.deadline_s))]
    at_least_s: list[list[pyscipopt.Expr]] = [[] for _ in late_s]
    for (g, i, j), x in model.place.items():
        early_s = float(earliest_s[g, i, j] - slots.deadline_s[g])
        if early_s > 0:
            at_least_s[g].append(early_s * x)
        fixed_s = float(slots.latency_s[g, i] - slots.deadline_s[g])
        done_s = model.end_s[i, j] + fixed_s
        latest_s = model.latest_end_s[i, j] + fixed_s
        if (i, j) in margins:
            done_s = done_s + margins[i, j]
            latest_s += margins[i, j].getUbOriginal()
        if latest_s > 0:
            scip.addCons(late_s[g] >= done_s - latest_s * (1 - x))
    for t, terms in zip(late_s, at_least_s, strict=True):
        if terms:
            scip.addCons(t >= quicksum(terms))
    lateness = quicksum(float(w) * t for w, t in zip(slots.weight, late_s, strict=True))
    scip.setObjective(lateness + COMPLETION_WEIGHT * quicksum(_completions(model, earliest_mean_s).values()))


def _completions(model: SlotModel, earliest_s: Float) -> dict[Slot, pyscipopt.Expr]:
    """Mean completion of what stands at each position, 0 where nothing does, for an objective that wants it small."""
    scip, slots = model.scip, model.slots
    completions: dict[Slot, pyscipopt.Expr] = {}
    for (i, j), end_s in model.end_s.items():
        here = {g: model.place[g, i, j] for g in model.groups_at(i, j)}
        counted_s = scip.addVar(f"e_{i}_{j}")
        scip.addCons(counted_s >= end_s - model.latest_end_s[i, j] * (1 - model.used(i, j)))
        scip.addCons(
            counted_s >= quicksum(float(earliest_s[g, i, j] - slots.latency_s[g, i]) * x for g, x in here.items())
        )
        completions[i, j] = counted_s + quicksum(float(slots.latency_s[g, i]) * x for g, x in here.items())
    return completions
