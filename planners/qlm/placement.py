"""Placement: how many instances of each kind should hold which model, by a two-stage stochastic program on SCIP.

Instances alike in device and loaded model are one *class* ``c`` of ``instances[c]``. What an instance of a class may do
is an *option* ``o``: to keep its model, or to load one from host memory or from storage, which costs ``lost_s[o]``
seconds of its time. The first stage chooses ``y[o]``, how many instances take each option. Then one of ``S`` equally
likely demands comes true, ``demand[s, m, k]`` requests for model ``m`` in SLO class ``k`` within the horizon ``H``,
each of ``work[m, k]`` units, and the second stage serves ``z[s, m, k]`` of them; what is left counts as missed:

```
min   sum_o cost[o] y[o] + (1 - v) mean_s Q_s + v CVaR_a(Q)
s.t.  sum_{o of c} y[o] = instances[c]                              for every class (<= where it holds nothing)
      w[m] = sum_{o to m} speed[d(o), m] (H - lost_s[o]) y[o]   work that can be done for a model
      sum_k work[m, k] z[s, m, k] <= w[m]                       for every scenario and model
      z[s, m, k] <= demand[s, m, k]                             for every scenario, model, SLO class
      Q_s = sum_{m, k} penalty[k] (demand[s, m, k] - z[s, m, k])
      0 <= y[o] <= limit[o] integer,  z >= 0
```

CVaR is the mean of the worst share ``1 - a`` of the scenarios, ``min_t t + mean_s max(0, Q_s - t)/(1 - a)``
(Rockafellar and Uryasev, 2000).

**The second stage of the mean has a closed form.** Given ``w[m]``, a scenario serves a model's classes in order of
penalty per work, so what it saves is a concave, piecewise linear function of ``w[m]``, and so is the mean over
scenarios: its pieces, steepest first, are bounded variables that fill up by themselves. ``S*M`` rows become ``M``; it
is the same program (the tests solve it as written above).

An instance that has two models in host memory counts as warm for both, though it can wake only one:
:func:`assign_instances` then loads the other from storage, or elsewhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyscipopt
from numpy.typing import NDArray
from pyscipopt.scip import PY_SCIP_PARAMSETTING as SCIP_PARAMSETTING
from scipy.optimize import linear_sum_assignment

Float = NDArray[np.float64]
Int = NDArray[np.int64]

NO_MODEL = -1


class PlacementProblem(NamedTuple):
    """C classes of instances, O options, D devices, S scenarios, M models, K SLO classes."""

    instances: Int
    """(C,) instances"""
    device: Int
    """(C,)"""
    keep: Int
    """(C,) the option of doing nothing, NO_MODEL for a class that holds no model"""
    option_class: Int
    """(O,)"""
    option_model: Int
    """(O,) the model held then"""
    option_limit: Int
    """(O,) instances that can take it"""
    option_lost_s: Float
    """(O,) time in which an instance that takes it serves nothing"""
    option_cost: Float
    """(O,) of one instance taking it, beside the time it loses"""
    speed: Float
    """(D, M) work a second of one instance; 0 where the model does not fit"""
    work: Float
    """(M, K) of one request"""
    demand: Float
    """(S, M, K) requests"""
    penalty: Float
    """(K,) of one missed request"""
    horizon_s: float


@dataclass(frozen=True, slots=True)
class PlacementLimits:
    """What stops SCIP, and how risk counts."""

    time_limit_s: float
    """Wall-clock guard; the reproducible limit is ``node_limit``."""
    node_limit: int
    relative_gap: float = 0.0
    """A placement within this of the bound is good enough."""
    cvar_weight: float = 0.0
    """Between 0, the mean alone, and 1, the CVaR alone."""
    cvar_level: float = 0.9


@dataclass(frozen=True, slots=True)
class Placement:
    """The options taken, and what they cost."""

    taken: Int
    """(O,) instances"""
    cost: float
    bound: float
    """No placement is cheaper, for these scenarios."""
    status: str
    """As SCIP has it; ``keep`` where it found nothing better than leaving every model where it is."""
    time_s: float
    """Wall clock, with building the program."""

    def holding(self, problem: PlacementProblem) -> Int:
        """(C, M) instances of each class that will hold each model."""
        holding = np.zeros((len(problem.instances), problem.speed.shape[1]), np.int64)
        np.add.at(holding, (problem.option_class, problem.option_model), self.taken)
        return holding


# --------------------------------------------------------------------------- the second stage
def option_work(problem: PlacementProblem) -> Float:
    """(O,) work that one instance does within the horizon when it takes an option."""
    usable_s = np.maximum(0.0, problem.horizon_s - problem.option_lost_s)
    speed = problem.speed[problem.device[problem.option_class], problem.option_model]
    work: Float = speed * usable_s
    return work


def served_requests(problem: PlacementProblem, taken: Int) -> Float:
    """(S, M, K) what each scenario is best served with, the first stage being fixed: highest penalty per work first."""
    able = np.zeros(problem.speed.shape[1])
    np.add.at(able, problem.option_model, option_work(problem) * taken)
    order = np.argsort(-(problem.penalty / problem.work), axis=1, kind="stable")
    wanted = np.take_along_axis(problem.demand * problem.work, order[None], axis=2)
    done = np.clip(able[None, :, None] - (np.cumsum(wanted, axis=2) - wanted), 0.0, wanted)
    served = np.zeros_like(problem.demand)
    np.put_along_axis(served, np.broadcast_to(order, served.shape), done, axis=2)
    return served / problem.work


def missed_penalty(problem: PlacementProblem, served: Float) -> Float:
    """(S,) penalty of what is not served."""
    penalty: Float = (problem.demand - served).sum(axis=1) @ problem.penalty
    return penalty


def placement_cost(problem: PlacementProblem, taken: Int, limits: PlacementLimits) -> float:
    """The objective of a first stage, with the best second one."""
    missed = missed_penalty(problem, served_requests(problem, taken))
    mean = float(problem.option_cost @ taken) + (1.0 - limits.cvar_weight) * float(missed.mean())
    if limits.cvar_weight == 0.0:
        return mean
    # The worst scenarios, the last of them in part.
    worst = (1.0 - limits.cvar_level) * len(missed)
    share = np.clip(worst - np.arange(len(missed)), 0.0, 1.0)
    return mean + limits.cvar_weight * float(share @ np.sort(missed)[::-1]) / worst


def keep_all(problem: PlacementProblem) -> Int:
    """(O,) every instance keeps what it holds."""
    taken = np.zeros(len(problem.option_class), np.int64)
    holds = problem.keep != NO_MODEL
    taken[problem.keep[holds]] = problem.instances[holds]
    return taken


def mean_savings(problem: PlacementProblem, model: int) -> tuple[Float, Float]:
    """What work for a model saves on average, as pieces of a concave function: (J,) widths and (J,) slopes, falling."""
    value = problem.penalty / problem.work[model]
    order = np.argsort(-value, kind="stable")
    ends = np.cumsum(problem.demand[:, model, order] * problem.work[model, order], axis=1)
    # Beyond the end of a class its slope gives way to that of the next, in this scenario.
    drop = value[order] - np.append(value[order][1:], 0.0)
    at, first = np.unique(ends.ravel(), return_inverse=True)
    drops = np.bincount(first.ravel(), np.tile(drop, len(ends))) / len(ends)
    slopes = drops[::-1].cumsum()[::-1]
    widths = np.diff(at, prepend=0.0)
    return widths[widths > 0], slopes[widths > 0]


# --------------------------------------------------------------------------- both stages
def solve_placement(problem: PlacementProblem, limits: PlacementLimits) -> Placement:
    """The cheapest placement found; never worse than keeping every model where it is, whatever stops SCIP."""
    start_s = time.perf_counter()
    keep = keep_all(problem)
    keep_cost = placement_cost(problem, keep, limits)
    model, options = _build(problem, limits, keep)
    # Does not hold the interpreter lock, so that the time limit cannot stall other threads.
    model.optimizeNogil()
    taken = keep
    if model.getNSols():
        best = model.getBestSol()
        taken = np.array([round(model.getSolVal(best, option)) for option in options], np.int64)
    cost = placement_cost(problem, taken, limits)
    status: str = model.getStatus()
    if cost >= keep_cost:
        taken, cost, status = keep, keep_cost, "keep"
    return Placement(taken, cost, min(model.getDualbound(), cost), status, time.perf_counter() - start_s)


def _build(
    problem: PlacementProblem, limits: PlacementLimits, keep: Int
) -> tuple[pyscipopt.Model, list[pyscipopt.Variable]]:
    """The program, with ``keep`` as its first solution."""
    model = pyscipopt.Model("placement")
    model.hideOutput()
    model.setParam("limits/time", limits.time_limit_s)
    model.setParam("limits/nodes", limits.node_limit)
    model.setParam("limits/gap", limits.relative_gap)
    model.setParam("parallel/maxnthreads", 1)
    # Without cuts the bound stays far off; the costlier ones take longer than they save.
    model.setSeparating(SCIP_PARAMSETTING.FAST)
    num_models = problem.speed.shape[1]
    # Every variable must be set in a starting solution: SCIP does not complete a partial one.
    start: list[tuple[pyscipopt.Variable, float]] = []
    options = []
    for limit, cost, kept in zip(problem.option_limit, problem.option_cost, keep, strict=True):
        options.append(model.addVar(vtype="I", ub=float(limit), obj=float(cost)))
        start.append((options[-1], float(kept)))
    for c, count in enumerate(problem.instances):
        total = pyscipopt.quicksum(options[o] for o in np.flatnonzero(problem.option_class == c))
        model.addCons(total <= float(count) if problem.keep[c] == NO_MODEL else total == float(count))

    each = option_work(problem)
    able: list[pyscipopt.Variable] = []
    for m in range(num_models):
        to_model = np.flatnonzero(problem.option_model == m)
        able.append(model.addVar())
        model.addCons(able[m] == pyscipopt.quicksum(float(each[o]) * options[o] for o in to_model))
        kept_work = float(each[to_model] @ keep[to_model])
        start.append((able[m], kept_work))
        widths, slopes = mean_savings(problem, m)
        filled = np.clip(kept_work - (np.cumsum(widths) - widths), 0.0, widths)
        pieces = []
        for width, slope, amount in zip(widths, slopes, filled, strict=True):
            pieces.append(model.addVar(ub=float(width), obj=-(1.0 - limits.cvar_weight) * float(slope)))
            start.append((pieces[-1], float(amount)))
        if pieces:
            model.addCons(pyscipopt.quicksum(pieces) <= able[m])
    nothing = missed_penalty(problem, np.zeros_like(problem.demand))
    model.addObjoffset((1.0 - limits.cvar_weight) * float(nothing.mean()))
    if limits.cvar_weight > 0.0:
        start += _add_cvar(model, problem, limits, able, keep)
    solution = model.createSol()
    for variable, value in start:
        model.setSolVal(solution, variable, value)
    model.addSol(solution)
    return model, options


def _add_cvar(
    model: pyscipopt.Model,
    problem: PlacementProblem,
    limits: PlacementLimits,
    able: list[pyscipopt.Variable],
    keep: Int,
) -> list[tuple[pyscipopt.Variable, float]]:
    """The CVaR's part of the objective, scenario by scenario; returns its part of the first solution."""
    kept = served_requests(problem, keep)
    kept_missed = missed_penalty(problem, kept)
    tail = (1.0 - limits.cvar_level) * len(problem.demand)
    threshold = model.addVar(lb=None, obj=limits.cvar_weight)
    kept_threshold = float(np.quantile(kept_missed, limits.cvar_level))
    start = [(threshold, kept_threshold)]
    for s, demand in enumerate(problem.demand):
        saved = []
        for m, wanted in enumerate(demand):
            served = {k: model.addVar(ub=float(wanted[k])) for k in np.flatnonzero(wanted)}
            start += [(z, float(kept[s, m, k])) for k, z in served.items()]
            if served:
                done = pyscipopt.quicksum(float(problem.work[m, k]) * z for k, z in served.items())
                model.addCons(done <= able[m])
            saved += [float(problem.penalty[k]) * z for k, z in served.items()]
        excess = model.addVar(obj=limits.cvar_weight / tail)
        missed = float(demand.sum(axis=0) @ problem.penalty) - pyscipopt.quicksum(saved)
        model.addCons(excess >= missed - threshold)
        start.append((excess, max(0.0, float(kept_missed[s]) - kept_threshold)))
    return start


# --------------------------------------------------------------------------- back to instances
def assign_instances(holding: Int, class_of: Int, swap_s: Float) -> Int:
    """Which instance holds which model, with the least time spent on swaps.

    Args:
        holding: (C, M) instances of each class that shall hold each model.
        class_of: (I,) class of each instance, negative for one that takes no part.
        swap_s: (I, M) seconds an instance needs to hold a model; 0 for the one it has.

    Returns:
        (I,) the model of each instance; NO_MODEL for one that nothing is asked of.
    """
    target = np.full(len(class_of), NO_MODEL, np.int64)
    for c in range(len(holding)):
        members = np.flatnonzero(class_of == c)
        wanted = np.repeat(np.arange(holding.shape[1]), holding[c])
        rows, columns = linear_sum_assignment(swap_s[np.ix_(members, wanted)])
        target[members[rows]] = wanted[columns]
    return target
