"""Assignment, order and accumulated time of the published programs in SCIP.

Binary ``x[g,i,j]``: group ``g`` stands at position ``j`` of instance ``i``'s queue. Every group stands somewhere, a
position holds at most one, and positions fill from the front. The time at which the service at a position ends is

``E[i,1] = release_i + sum_g (b_{i,m(g)} + s_{g,i}) x[g,i,1]``
``E[i,j] = E[i,j-1] + sum_{m,m'} swap_{i,m,m'} y[i,j,m,m'] + sum_g s_{g,i} x[g,i,j]``

``y[i,j,m,m']`` says that position ``j-1`` runs model ``m`` and ``j`` another, ``m'``: what runs ``m'`` comes either
from ``m'`` itself or from some ``m``, and from ``m`` only where ``j-1`` runs it. With binary ``x`` that leaves one
choice, so ``y`` may be continuous and no large constant is needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyscipopt
from pyscipopt import quicksum
from pyscipopt.scip import PY_SCIP_PARAMSETTING

from planners.qlm.problem import Flag, Float
from planners.qlm.published.slot_problem import (
    TOLERANCE_S,
    Goal,
    Queues,
    SlotProblem,
    cost,
    latest_end_s,
)

Status = Literal["optimal", "limit", "infeasible"]
Slot = tuple[int, int]
"""Instance and position."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a solve stops."""

    nodes: int
    """The reproducible limit."""
    time_s: float
    """Wall-clock guard behind it, building the model included."""


@dataclass(frozen=True, slots=True)
class Solution:
    """What a program returned."""

    status: Status
    """``optimal`` and ``infeasible`` are proven; ``limit``: a limit stopped the solve."""
    queues: Queues | None
    """None where nothing was found."""
    cost: float | None
    """Objective of ``queues``, computed from them."""
    bound: float | None
    """No solution costs less; None where nothing was proven."""
    nodes: int
    time_s: float


@dataclass(frozen=True, slots=True)
class SlotModel:
    """Variables that the objectives are built on."""

    scip: pyscipopt.Model
    slots: SlotProblem
    place: dict[tuple[int, int, int], pyscipopt.Variable]
    """x[g,i,j], only where it may be 1"""
    end_s: dict[Slot, pyscipopt.Variable]
    """E[i,j]"""
    latest_end_s: dict[Slot, float]
    began_at: float
    """``time.perf_counter()`` before anything was built"""

    def groups_at(self, i: int, j: int) -> list[int]:
        """Groups that may stand at a position."""
        return [g for g in range(len(self.slots.deadline_s)) if (g, i, j) in self.place]

    def used(self, i: int, j: int) -> pyscipopt.Expr:
        """1 where a group stands at the position, else 0."""
        used: pyscipopt.Expr = quicksum(self.place[g, i, j] for g in self.groups_at(i, j))
        return used


def earliest_completion_s(slots: SlotProblem, quantile: float) -> Float:
    """(G, I, G) before which a group at a position cannot be complete: behind the shortest others, with one swap.

    Args:
        quantile: this many standard deviations above the mean.
    """
    num_groups, num_instances = slots.allowed.shape
    earliest = np.full((num_groups, num_instances, num_groups), np.inf)
    for g, i in zip(*np.nonzero(slots.allowed), strict=True):
        others = slots.allowed[:, i] & (np.arange(num_groups) != g)
        ahead_s = np.concatenate([[0.0], np.cumsum(np.sort(slots.service_s[others, i]))])
        ahead_s2 = np.concatenate([[0.0], np.cumsum(np.sort(slots.service_std_s[others, i] ** 2))])
        swap_s = np.full(len(ahead_s), slots.begin_s[i, slots.model[others]].min() if others.any() else 0.0)
        swap_s[0] = slots.begin_s[i, slots.model[g]]
        own_s2 = slots.service_std_s[g, i] ** 2 + slots.latency_std_s[g, i] ** 2
        mean_s = slots.release_s[i] + swap_s + ahead_s + slots.service_s[g, i] + slots.latency_s[g, i]
        earliest[g, i, : len(ahead_s)] = mean_s + quantile * np.sqrt(ahead_s2 + own_s2)
    return earliest


def possible_places(slots: SlotProblem, goal: Goal, earliest_s: Float) -> Flag:
    """(G, I, G) where a group may stand: it is allowed there, in time if it must be, and behind others that are."""
    possible = np.isfinite(earliest_s)
    if goal is Goal.PENALTY:
        possible &= earliest_s <= slots.deadline_s[:, None, None] + TOLERANCE_S
    fillable: Flag = np.logical_and.accumulate(possible.any(axis=0), axis=1)
    return possible & fillable


def build_slot_model(slots: SlotProblem, possible: Flag, name: str) -> SlotModel:
    """The part that both programs share, without an objective.

    Args:
        possible: (G, I, G) as from :func:`possible_places`, every group somewhere.
    """
    began_at = time.perf_counter()
    num_groups, num_instances, _ = possible.shape
    scip = pyscipopt.Model(name)
    scip.hideOutput()
    scip.setParam("parallel/maxnthreads", 1)
    # At this size the default cut rounds and sub-SCIPs take up to thirty times as long as the search itself.
    scip.setSeparating(PY_SCIP_PARAMSETTING.OFF)
    scip.setHeuristics(PY_SCIP_PARAMSETTING.FAST)
    place = {
        (g, i, j): scip.addVar(f"x_{g}_{i}_{j}", vtype="B")
        for g, i, j in zip(*(axis.tolist() for axis in np.nonzero(possible)), strict=True)
    }
    model = SlotModel(scip, slots, place, {}, {}, began_at)
    for g in range(num_groups):
        scip.addCons(quicksum(x for (h, _, _), x in place.items() if h == g) == 1)
    for i in range(num_instances):
        latest = latest_end_s(slots, i)
        for j in range(int(possible[:, i].any(axis=0).sum())):
            scip.addCons(model.used(i, j) <= (model.used(i, j - 1) if j else 1))
            end_s = scip.addVar(f"E_{i}_{j}", lb=float(slots.release_s[i]), ub=float(latest[j]))
            scip.addCons(end_s == _end_of_service(model, i, j))
            model.end_s[i, j] = end_s
            model.latest_end_s[i, j] = float(latest[j])
    return model


def _end_of_service(model: SlotModel, i: int, j: int) -> pyscipopt.Expr:
    slots = model.slots
    here = {g: model.place[g, i, j] for g in model.groups_at(i, j)}
    end_s: pyscipopt.Expr = quicksum(float(slots.service_s[g, i]) * x for g, x in here.items())
    if j == 0:
        end_s += float(slots.release_s[i])
        end_s += quicksum(float(slots.begin_s[i, slots.model[g]]) * x for g, x in here.items())
    else:
        end_s += model.end_s[i, j - 1] + _swap_between(model, i, j)
    return end_s


def _swap_between(model: SlotModel, i: int, j: int) -> pyscipopt.Expr:
    """Seconds swapped between positions ``j - 1`` and ``j``."""
    slots = model.slots
    runs: list[dict[int, list[pyscipopt.Variable]]] = [{}, {}]
    for position, by_model in zip((j - 1, j), runs, strict=True):
        for g in model.groups_at(i, position):
            by_model.setdefault(int(slots.model[g]), []).append(model.place[g, i, position])
    before, after = runs
    change = {(m, n): model.scip.addVar(f"y_{i}_{j}_{m}_{n}", ub=1.0) for m in before for n in after if m != n}
    for n, here in after.items():
        same = quicksum(before.get(n, []))
        model.scip.addCons(quicksum(y for (_, k), y in change.items() if k == n) + same >= quicksum(here))
    for m, there in before.items():
        model.scip.addCons(quicksum(y for (k, _), y in change.items() if k == m) <= quicksum(there))
    swap_s: pyscipopt.Expr = quicksum(float(slots.swap_s[i, m, n]) * y for (m, n), y in change.items())
    return swap_s


def optimise(model: SlotModel, goal: Goal, quantile: float, limits: Limits) -> Solution:
    """Solve a finished model."""
    scip = model.scip
    left_s = limits.time_s - (time.perf_counter() - model.began_at)
    if left_s <= 0:
        return Solution("limit", None, None, None, 0, time.perf_counter() - model.began_at)
    scip.setParam("limits/nodes", limits.nodes)
    scip.setParam("limits/time", left_s)
    # Unlike optimize() it does not hold the interpreter lock, so the limit stalls no other thread.
    scip.optimizeNogil()
    found = scip.getStatus()
    status: Status = "optimal" if found == "optimal" else "infeasible" if found == "infeasible" else "limit"
    best = scip.getBestSol() if scip.getNSols() else None
    queues = None if best is None else _queues(model, {key for key, x in model.place.items() if best[x] > 0.5})
    bound = scip.getDualbound()
    return Solution(
        status=status,
        queues=queues,
        cost=None if queues is None else cost(model.slots, queues, goal, quantile),
        bound=bound if status != "infeasible" and abs(bound) < scip.infinity() else None,
        nodes=scip.getNTotalNodes(),
        time_s=time.perf_counter() - model.began_at,
    )


def _queues(model: SlotModel, chosen: set[tuple[int, int, int]]) -> list[list[int]]:
    num_instances = model.slots.allowed.shape[1]
    standing = sorted((i, j, g) for g, i, j in chosen)
    return [[g for k, _, g in standing if k == i] for i in range(num_instances)]
