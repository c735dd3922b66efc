"""`qlm bench cost`: what the stochastic cost gains over the deterministic one, and over a sample of scenarios.

On random problems, plans are looked for in the same time by the same search under three costs: the expected misses of
the cost table, the misses at mean service times, and the average misses over sampled scenarios. What they come to cost
is then the average over fresh scenarios (:mod:`planners.qlm.scenarios`), which no search has seen. Beside them, the
planner's own faster search, which cannot use scenarios. Differences are paired by problem.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planners.qlm.heuristics import inserted_plan
from planners.qlm.plan import Plan
from planners.qlm.problem import MISS, POINT, Problem
from planners.qlm.scenarios import mean_cost, sample_scenarios, search_scenarios
from planners.qlm.sequencing import search_plan
from planners.qlm.synthetic import random_problem
from runners.bench import Figure
from runners.config import BenchCostOptions
from runners.progress import CountedProgress
from runners.stats import bootstrap_interval

STOCHASTIC = "stochastic"
FAST = "planner's search, "


def measure(options: BenchCostOptions) -> list[Figure]:
    """The true cost under every method beside that under the stochastic one, for every family and time limit."""
    figures: list[Figure] = []
    with CountedProgress("problems", len(options.families) * options.problems) as progress:
        for family, (groups, instances, models) in enumerate(options.families):
            where = f"{groups} groups, {instances} instances, {models} models"
            costs: dict[tuple[float, str], list[float]] = {}
            for number in range(options.problems):
                rng = np.random.default_rng([options.seed, family, number])
                problem = random_problem(rng, groups, instances, models, options.backlog)
                fresh = sample_scenarios(problem, options.fresh_scenarios, rng)
                for limit_s in options.search_times_s:
                    for name, search in methods(problem, options, rng).items():
                        if number == 0:
                            search(1e-3)  # compilation does not count
                        costs.setdefault((limit_s, name), []).append(mean_cost(fresh, search(limit_s)))
                progress.advance(where)
            figures += _figures(where, costs, np.random.default_rng(options.seed))
    return figures


def methods(
    problem: Problem, options: BenchCostOptions, rng: np.random.Generator
) -> dict[str, Callable[[float], Plan]]:
    """Searches by name, each from the plan that insertion makes under its own cost; they take a time limit."""
    expected, at_mean = problem._replace(form=MISS), problem._replace(form=POINT)
    sample = sample_scenarios(problem, options.scenarios, rng)
    seeds = rng.spawn(5)
    return {
        STOCHASTIC: lambda limit_s: search_scenarios(expected, inserted_plan(expected), seeds[0], limit_s),
        "deterministic": lambda limit_s: search_scenarios(at_mean, inserted_plan(at_mean), seeds[1], limit_s),
        f"{options.scenarios} scenarios": lambda limit_s: search_scenarios(
            sample, inserted_plan(at_mean), seeds[2], limit_s
        ),
        f"{FAST}stochastic": lambda limit_s: (
            search_plan(expected, inserted_plan(expected), seeds[3], None, limit_s).plan
        ),
        f"{FAST}deterministic": lambda limit_s: (
            search_plan(at_mean, inserted_plan(at_mean), seeds[4], None, limit_s).plan
        ),
    }


def _figures(where: str, costs: dict[tuple[float, str], list[float]], rng: np.random.Generator) -> list[Figure]:
    """Mean true costs, and by how much they exceed those of the stochastic cost in the same search and time."""
    figures: list[Figure] = []
    for (limit_s, name), of_method in costs.items():
        method = f"{where}, {limit_s:g} s: {name}"
        figures.append(Figure(name=f"{method}, cost", value=float(np.mean(of_method)), unit="misses"))
        reference = f"{FAST}{STOCHASTIC}" if name.startswith(FAST) else STOCHASTIC
        if name != reference:
            base = np.array(costs[limit_s, reference])
            more = bootstrap_interval([100.0 * (np.array(of_method) / np.maximum(base, 1e-9) - 1.0)], rng)
            figures += [
                Figure(name=f"{method}, {label}", value=value, unit="%")
                for label, value in zip(("more than stochastic", "from", "to"), more, strict=True)
            ]
    return figures
