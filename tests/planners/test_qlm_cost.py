"""The cost of a virtual queue and the plans built on it, against plain and exhaustive versions."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from planners.qlm.construct import evaluate, improve, insert_all
from planners.qlm.cost import MIN_STD_S, WAIT_ERROR, cost_of_holding, cost_of_queue
from planners.qlm.heuristics import batched_edf_plan, by_deadline, edf_plan
from planners.qlm.plan import Plan
from planners.qlm.problem import CHANCE, LATENESS, MISS, POINT, Problem
from tests.planners.problems import random_problem


def normal_cdf(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def normal_density(x: float) -> float:
    return math.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi)


def plain_request_cost(problem: Problem, late_s: float, std_s: float) -> float:
    u = late_s / std_s
    if problem.form == MISS:
        return normal_cdf(u)
    if problem.form == LATENESS:
        return std_s * (normal_density(u) + u * normal_cdf(u))
    if problem.form == CHANCE:
        # An earlier deadline, by a quantile of the completion.
        return float(late_s + statistics.NormalDist().inv_cdf(problem.confidence) * std_s > 0)
    assert problem.form == POINT
    return float(late_s > 0)


def plain_group_cost(problem: Problem, g: int, first_s: float, last_s: float, latency_s: float) -> float:
    costs, delays = [], []
    for point in (1 / 6, 1 / 2, 5 / 6):
        wait_s = first_s + point * (last_s - first_s)
        deadline_s = problem.first_slack_s[g] + point * (problem.last_slack_s[g] - problem.first_slack_s[g])
        std_s = math.hypot(math.hypot(latency_s * problem.output_cv[g], WAIT_ERROR * wait_s), MIN_STD_S)
        costs.append(plain_request_cost(problem, wait_s + latency_s - deadline_s, std_s))
        delays.append(wait_s + latency_s)
    expected = problem.weight[g] * np.mean(costs) + problem.delay_cost[g] * np.mean(delays)
    return float(problem.requests[g] * expected)


def plain_queue_cost(problem: Problem, i: int, queue: list[int]) -> float:
    """The same cost, run of one model by run, with the batch drained or evicted before a first run of another model."""
    if not queue or problem.model[queue[0]] == problem.start_model[i] or problem.evict_s[i] >= problem.drain_s[i]:
        return plain_cost_after(problem, i, queue, problem.drain_s[i])[0]
    model, start_model, evict_s = problem.model[queue[0]], problem.start_model[i], problem.evict_s[i]
    back_s = problem.load_s[i, start_model] + problem.unload_s[i, model] + evict_s

    def besides(groups: list[int]) -> float:
        """What eviction costs, next to the queue behind it."""
        resumed_s = plain_cost_after(problem, i, groups, evict_s)[1] + back_s
        std_s = math.hypot(MIN_STD_S, WAIT_ERROR * resumed_s)
        missed = plain_request_cost(problem, resumed_s - problem.displaced_slack_s[i], std_s)
        displaced = problem.displaced_weight[i] * missed + problem.displaced_delay_cost[i] * resumed_s
        return float(displaced)

    head = list(itertools.takewhile(lambda g: problem.model[g] == model, queue))
    drained = plain_cost_after(problem, i, head, problem.drain_s[i])[0]
    if plain_cost_after(problem, i, head, evict_s)[0] + besides(head) < drained:
        return plain_cost_after(problem, i, queue, evict_s)[0] + besides(head)
    return plain_cost_after(problem, i, queue, problem.drain_s[i])[0]


def plain_cost_after(problem: Problem, i: int, queue: list[int], drain_s: float) -> tuple[float, float]:
    """What a queue costs if the present batch is gone after ``drain_s``, and when it is done."""
    time_s, model = problem.ready_s[i], problem.start_model[i]
    present, cost = problem.present[i], 0.0
    for run_model, run in itertools.groupby(queue, key=lambda g: problem.model[g]):
        groups = list(run)
        if run_model != model:
            swap_s = problem.load_s[i, run_model] + (problem.unload_s[i, model] if model >= 0 else 0.0)
            cost += problem.swap_cost[i] * (0.5 * drain_s + swap_s)
            time_s += drain_s + swap_s
            model, present = run_model, 0.0
        joins = model == problem.start_model[i] and groups[0] == queue[0]
        together = present + sum(problem.requests[g] for g in groups)
        waited_s = 0.0
        for g in groups:
            full, interval_s = problem.batch[g, i], problem.interval_s[g, i]
            latency_s = problem.latency_s[g, i] + problem.latency_growth_s[g, i] * (min(full, together) - 1)
            first_s = max(waited_s, interval_s * (present + 1 - full))
            places = max(0.0, full - present) if joins else 0.0
            cost += problem.crowding_cost[g, i] * min(problem.requests[g], places)
            present += problem.requests[g]
            waited_s = max(first_s, interval_s * (present - full))
            cost += plain_group_cost(problem, g, time_s + first_s, time_s + waited_s, latency_s)
            drain_s = waited_s + latency_s
    return cost, time_s + drain_s


@pytest.mark.parametrize("form", [MISS, LATENESS, CHANCE, POINT])
@pytest.mark.parametrize("seed", range(15))
def test_queue_cost_agrees_with_the_plain_version(form: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 8, 3)._replace(form=form)
    for i in range(3):
        queue = rng.permutation(8)[: rng.integers(0, 9)].astype(np.int32)
        expected = plain_queue_cost(problem, i, queue.tolist())
        assert cost_of_queue(problem, i, queue) == pytest.approx(expected, rel=1e-9, abs=1e-8)


def test_a_swap_delays_what_comes_after_it() -> None:
    problem = random_problem(np.random.default_rng(0), 2, 1, num_models=2)
    problem.model[:] = [0, 1]
    problem.start_model[:] = 0
    alone = cost_of_queue(problem, 0, np.array([1], np.int32))
    behind = cost_of_queue(problem, 0, np.array([0, 1], np.int32)) - cost_of_queue(problem, 0, np.array([0], np.int32))
    problem.model[:] = 0
    without = cost_of_queue(problem, 0, np.array([1], np.int32))
    assert without < alone
    assert behind >= 0


def build(problem: Problem, order: list[int], at_end: bool = False) -> Plan:
    plan = Plan.empty(problem.allowed.shape[1], problem.allowed.shape[0])
    plan.total = insert_all(problem, np.array(order, np.int32), at_end, plan.sequence, plan.length, plan.costs)
    return plan


@pytest.mark.parametrize("seed", range(20))
def test_plans_hold_every_group_once_where_it_may_run(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 12, 4)
    plan = build(problem, rng.permutation(12).tolist(), at_end=bool(seed % 2))
    improved = plan.copy()
    order = rng.permutation(12).astype(np.int32)
    improved.total = improve(problem, order, improved.sequence, improved.length, improved.costs, 3)
    for candidate in (plan, improved):
        assert sorted(g for i in range(5) for g in candidate.queue(i)) == list(range(12))
        assert all(problem.allowed[g, i] for i in range(4) for g in candidate.queue(i))
        costs = [plain_queue_cost(problem, i, candidate.queue(i)) for i in range(4)]
        held = sum(cost_of_holding(problem, g) for g in candidate.queue(4))
        assert candidate.total == pytest.approx(sum(costs) + held, rel=1e-9)
    assert improved.total <= plan.total + 1e-9
    assert evaluate(problem, plan.sequence, plan.length, plan.costs) == pytest.approx(plan.total)


def best_by_brute_force(problem: Problem) -> float:
    """Every assignment (or holding back) and every order."""
    num_groups, num_instances = problem.allowed.shape
    best = math.inf
    cheapest: dict[tuple[int, frozenset[int]], float] = {}
    for i in range(num_instances):
        for size in range(num_groups + 1):
            for chosen in itertools.combinations(range(num_groups), size):
                orders = itertools.permutations(chosen)
                cheapest[i, frozenset(chosen)] = min(plain_queue_cost(problem, i, list(o)) for o in orders)
    for assignment in itertools.product(range(num_instances + 1), repeat=num_groups):
        if all(i == num_instances or problem.allowed[g, i] for g, i in enumerate(assignment)):
            parts = [frozenset(g for g, a in enumerate(assignment) if a == i) for i in range(num_instances)]
            held = [g for g, a in enumerate(assignment) if a == num_instances]
            cost = sum(cheapest[i, part] for i, part in enumerate(parts))
            best = min(best, cost + sum(cost_of_holding(problem, g) for g in held))
    return best


def test_insertion_and_improvement_come_close_to_the_optimum() -> None:
    ratios = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, 5, 2)
        order = np.argsort(problem.first_slack_s, kind="stable").astype(np.int32)
        plan = build(problem, order.tolist())
        total = improve(problem, order, plan.sequence, plan.length, plan.costs, 3)
        best = best_by_brute_force(problem)
        assert total >= best - 1e-9
        ratios.append(total / best)
    assert np.median(ratios) < 1.01
    assert max(ratios) < 1.2


def one_request(form: int, **changes: object) -> Problem:
    """One request, alone on an idle instance, that takes 10 s with a deadline in 12 s."""
    problem = random_problem(np.random.default_rng(0), 1, 1, num_models=1)
    problem.start_model[:] = 0
    problem.requests[:] = problem.weight[:] = 1.0
    problem.ready_s[:] = problem.present[:] = problem.drain_s[:] = 0.0
    problem.latency_s[:] = 10.0
    problem.first_slack_s[:] = problem.last_slack_s[:] = 12.0
    problem.output_cv[:] = 0.2
    problem.crowding_cost[:] = 0.0
    return problem._replace(form=form, **changes)


def cost_without_delay(problem: Problem) -> float:
    return cost_of_queue(problem, 0, np.array([0], np.int32)) - 10.0 * problem.delay_cost[0]


def test_forms_value_one_request_as_their_definitions_say() -> None:
    std_s = math.hypot(2.0, MIN_STD_S)
    missed = normal_cdf(-2.0 / std_s)
    assert cost_without_delay(one_request(MISS)) == pytest.approx(missed)
    draws = np.random.default_rng(0).normal(10.0, std_s, 400_000)
    assert cost_without_delay(one_request(LATENESS)) == pytest.approx(np.maximum(0, draws - 12).mean(), rel=0.02)
    # It is met with probability 0.834.
    assert 1.0 - missed == pytest.approx(0.834, abs=1e-3)
    assert cost_without_delay(one_request(CHANCE, confidence=0.8)) == pytest.approx(0.0)
    assert cost_without_delay(one_request(CHANCE, confidence=0.9)) == pytest.approx(1.0)
    point = one_request(POINT)
    assert cost_without_delay(point) == pytest.approx(0.0)
    point.first_slack_s[:] = point.last_slack_s[:] = 9.9
    assert cost_without_delay(point) == pytest.approx(1.0)


@pytest.mark.parametrize("form", [MISS, LATENESS, CHANCE, POINT])
def test_deadlines_long_past_or_never_are_numbers(form: int) -> None:
    problem = one_request(form)
    for slack_s in (np.inf, 1e9):
        problem.first_slack_s[:] = problem.last_slack_s[:] = slack_s
        assert cost_without_delay(problem) == pytest.approx(0.0)
    problem.first_slack_s[:] = problem.last_slack_s[:] = -1e9
    assert cost_without_delay(problem) == pytest.approx(1e9 + 10 if form == LATENESS else 1.0)


def test_batched_edf_swaps_less_than_edf() -> None:
    problem = random_problem(np.random.default_rng(1), 30, 2, num_models=3)

    def swaps(plan: Plan) -> int:
        models = [[int(problem.model[g]) for g in plan.queue(i)] for i in range(2)]
        return sum(a != b for queue in models for a, b in itertools.pairwise(queue))

    batched = batched_edf_plan(problem)
    assert sorted(batched.queue(0) + batched.queue(1)) == list(range(30))
    # A queue holds one batch of each model.
    assert swaps(batched) <= 4
    assert swaps(edf_plan(problem)) > 4
    assert swaps(edf_plan(problem)) == swaps(build(problem, by_deadline(problem).tolist(), at_end=True))
