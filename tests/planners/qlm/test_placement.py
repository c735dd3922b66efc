"""The placement program against brute force and against HiGHS on the same program, and what it does on clusters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from planners import make_planner
from planners.qlm.placement import (
    NO_MODEL,
    PlacementLimits,
    PlacementProblem,
    assign_instances,
    keep_all,
    missed_penalty,
    placement_cost,
    served_requests,
    solve_placement,
)
from planners.qlm.placement_demand import RecentArrivals, arrived_requests, backlog_requests, draw_demand
from planners.qlm.placement_view import cluster_placement
from planners.spec import parse_planner
from qlm_env.env import QLMEnv

EXACT = PlacementLimits(time_limit_s=60.0, node_limit=100_000)


def random_problem(rng: np.random.Generator, scenarios: int = 3) -> PlacementProblem:
    """Two devices, up to three classes with a few instances, three models, two SLO classes."""
    num_models, num_classes = 3, 2
    speed = rng.uniform(0.5, 3.0, (2, num_models))
    speed[0, 2] = 0.0
    device = np.array([0, 1, 1])
    loaded = np.array([0, 1, NO_MODEL if rng.random() < 0.3 else 2])
    count = rng.integers(1, 4, 3)
    options = []
    keep = np.full(3, NO_MODEL)
    for c in range(3):
        for model in range(num_models):
            if not speed[device[c], model] > 0:
                continue
            if model == loaded[c]:
                keep[c] = len(options)
                options.append((c, model, int(count[c]), 0.0))
            else:
                warm = int(rng.integers(0, count[c] + 1))
                options += [(c, model, warm, 5.0)] if warm else []
                options += [(c, model, int(count[c]) - warm, 40.0)] if warm < count[c] else []
    lost_s = np.array([option[3] for option in options])
    return PlacementProblem(
        instances=count,
        device=device,
        keep=keep,
        option_class=np.array([option[0] for option in options]),
        option_model=np.array([option[1] for option in options]),
        option_limit=np.array([option[2] for option in options]),
        option_lost_s=lost_s,
        option_cost=0.01 * lost_s,
        speed=speed,
        work=rng.uniform(0.5, 2.0, (num_models, num_classes)),
        demand=rng.poisson(
            rng.uniform(0, 250, (1, num_models, num_classes)), (scenarios, num_models, num_classes)
        ).astype(float),
        penalty=np.array([1.0, 0.3]),
        horizon_s=60.0,
    )


def cost_of(problem: PlacementProblem, taken: np.ndarray, limits: PlacementLimits) -> float:
    return placement_cost(problem, taken, limits)


def best_by_brute_force(problem: PlacementProblem, limits: PlacementLimits) -> float:
    """Every feasible first stage, the second by one linear program per choice."""
    per_class = []
    for c, count in enumerate(problem.instances):
        options = np.flatnonzero(problem.option_class == c)
        choices = itertools.product(*(range(problem.option_limit[o] + 1) for o in options))
        most_only = problem.keep[c] != NO_MODEL
        per_class.append(
            [(options, np.array(t)) for t in choices if (sum(t) == count if most_only else sum(t) <= count)]
        )
    best = np.inf
    for choice in itertools.product(*per_class):
        taken = np.zeros(len(problem.option_class), np.int64)
        for options, numbers in choice:
            taken[options] = numbers
        best = min(best, cost_of(problem, taken, limits))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_brute_force(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), scenarios=2)
    placement = solve_placement(problem, EXACT)
    assert placement.cost == pytest.approx(best_by_brute_force(problem, EXACT), rel=1e-6, abs=1e-6)
    assert cost_of(problem, placement.taken, EXACT) == pytest.approx(placement.cost, rel=1e-6, abs=1e-6)
    assert placement.bound == pytest.approx(placement.cost, rel=1e-6, abs=1e-6)


def test_it_equals_brute_force_with_cvar() -> None:
    limits = PlacementLimits(60.0, 100_000, cvar_weight=0.5, cvar_level=0.6)
    problem = random_problem(np.random.default_rng(7), scenarios=4)
    placement = solve_placement(problem, limits)
    assert placement.cost == pytest.approx(best_by_brute_force(problem, limits), rel=1e-6, abs=1e-6)


def solve_on_highs(problem: PlacementProblem) -> float:
    """The extensive form, scenario by scenario and device by device, on another solver."""
    num_scenarios, num_models, num_classes = problem.demand.shape
    num_devices, num_options = len(problem.speed), len(problem.option_class)
    index = {
        key: num_options + n
        for n, key in enumerate(
            itertools.product(range(num_scenarios), range(num_devices), range(num_models), range(num_classes))
        )
    }
    size = num_options + len(index)
    cost = np.zeros(size)
    cost[:num_options] = problem.option_cost
    upper = np.full(size, np.inf)
    upper[:num_options] = problem.option_limit
    rows, low, high = [], [], []

    def add(entries: dict[int, float], at_least: float, at_most: float) -> None:
        row = np.zeros(size)
        for column, value in entries.items():
            row[column] = value
        rows.append(row)
        low.append(at_least)
        high.append(at_most)

    for c, count in enumerate(problem.instances):
        of_class = {int(o): 1.0 for o in np.flatnonzero(problem.option_class == c)}
        add(of_class, 0.0 if problem.keep[c] == NO_MODEL else count, count)
    for (_, _, _, k), column in index.items():
        cost[column] = -problem.penalty[k] / num_scenarios
    for s, d, m in itertools.product(range(num_scenarios), range(num_devices), range(num_models)):
        entries = {}
        for k in range(num_classes):
            if problem.speed[d, m] > 0:
                entries[index[s, d, m, k]] = problem.work[m, k] / problem.speed[d, m]
            else:
                upper[index[s, d, m, k]] = 0.0
        for o in range(num_options):
            if problem.device[problem.option_class[o]] == d and problem.option_model[o] == m:
                entries[o] = -max(0.0, problem.horizon_s - problem.option_lost_s[o])
        add(entries, -np.inf, 0.0)
    for s, m, k in itertools.product(range(num_scenarios), range(num_models), range(num_classes)):
        add({index[s, d, m, k]: 1.0 for d in range(num_devices)}, 0.0, problem.demand[s, m, k])
    result = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), low, high),
        bounds=Bounds(np.zeros(size), upper),
        integrality=np.arange(size) < num_options,
        options={"mip_rel_gap": 0.0},
    )
    assert result.success
    return float(result.fun + np.einsum("smk,k->", problem.demand, problem.penalty) / num_scenarios)


@pytest.mark.parametrize("seed", range(10, 22))
def test_it_equals_the_same_program_on_highs(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), scenarios=6)
    placement = solve_placement(problem, EXACT)
    assert placement.cost == pytest.approx(solve_on_highs(problem), rel=1e-6, abs=1e-6)


def test_limits_stop_it_at_something_no_worse_than_keeping_everything() -> None:
    problem = random_problem(np.random.default_rng(3), scenarios=40)
    limits = PlacementLimits(time_limit_s=1e-3, node_limit=1)
    placement = solve_placement(problem, limits)
    assert placement.bound <= placement.cost <= cost_of(problem, keep_all(problem), limits) + 1e-9


def test_nothing_is_swapped_without_a_reason() -> None:
    problem = random_problem(np.random.default_rng(5))
    quiet = problem._replace(demand=np.zeros_like(problem.demand))
    placement = solve_placement(quiet, EXACT)
    assert placement.cost == 0.0
    assert placement.status == "keep"


def test_a_model_nobody_holds_is_loaded_when_it_is_asked_for() -> None:
    problem = random_problem(np.random.default_rng(6))
    demand = np.zeros_like(problem.demand)
    demand[:, 0] = 40.0
    demand[:, 2] = 40.0
    problem = problem._replace(demand=demand, keep=problem.keep.copy())
    placement = solve_placement(problem, EXACT)
    served = served_requests(problem, placement.taken)
    assert served[:, 2].sum() > 0
    assert missed_penalty(problem, served).mean() < missed_penalty(problem, np.zeros_like(served)).mean()


def test_instances_that_are_warm_or_hold_the_model_take_it() -> None:
    holding = np.array([[1, 2, 0], [0, 0, 1]])
    class_of = np.array([0, 0, 0, 1, -1])
    swap_s = np.array([[0.0, 50.0, 50.0], [0.0, 5.0, 50.0], [0.0, 9.0, 50.0], [40.0, 40.0, 0.0], [0.0, 0.0, 0.0]])
    assert assign_instances(holding, class_of, swap_s).tolist() == [0, 1, 1, 2, NO_MODEL]


# --------------------------------------------------------------------------- demand and clusters
def test_demand_is_the_backlog_and_arrivals_as_lately() -> None:
    backlog = np.array([[5.0, 0.0]])
    counts = np.array([[30.0, 0.0]])
    demand = draw_demand(np.random.default_rng(0), backlog, counts, 60.0, 120.0, 4000)
    assert demand.shape == (4000, 1, 2)
    assert np.all(demand[:, 0, 1] == 0)
    assert demand[:, 0, 0].mean() == pytest.approx(5 + 60, rel=0.02)
    # Poisson, and a rate known from 30 arrivals only.
    assert demand[:, 0, 0].var() == pytest.approx(60 + 60**2 / 30, rel=0.08)
    again = draw_demand(np.random.default_rng(0), backlog, counts, 60.0, 120.0, 4000)
    assert np.array_equal(again, demand)
    assert np.array_equal(
        draw_demand(np.random.default_rng(0), backlog, counts, 0.0, 120.0, 2), np.stack([backlog] * 2)
    )


def test_a_cluster_becomes_a_problem_that_can_be_carried_out() -> None:
    env = QLMEnv(
        {"instances": [{"device": "A100", "count": 3}, {"device": "A10", "tp": 2, "count": 2}]},
        {"preset": "smoke", "num_requests": 300, "arrivals": {"kind": "poisson", "load": 1.5}},
    )
    _, info = env.reset(seed=0)
    planner = make_planner(parse_planner("fcfs", {}))
    planner.reset(env.view, np.random.default_rng(0))
    recent = RecentArrivals(window_s=20.0)
    while env.now_s < 45.0:
        recent.observe(env.view)
        info = env.step_plan(planner.act(env.view))[-1]
    view = env.view
    recent.observe(view)
    assert "metrics" not in info
    assert arrived_requests(view).sum(axis=1) == pytest.approx(view.arrivals_per_model())
    assert 20.0 <= recent.span_s < 40.0
    demand = draw_demand(np.random.default_rng(1), backlog_requests(view), recent.counts, recent.span_s, 60.0, 16)
    cluster = cluster_placement(view, demand, 60.0, 1e-3)
    problem = cluster.problem
    assert problem.instances.sum() == 5
    assert problem.speed.shape == (2, 2)
    assert np.all(problem.option_limit > 0)
    placement = solve_placement(problem, PlacementLimits(5.0, 1000))
    holding = placement.holding(problem)
    assert holding.sum() == 5
    target = assign_instances(holding, cluster.class_of, cluster.swap_s)
    for instance, model in zip(view.instances, target, strict=True):
        assert instance.fits(int(model))
    assert np.array_equal(np.bincount(target, minlength=2), holding.sum(axis=0))
