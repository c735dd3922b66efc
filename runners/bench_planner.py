"""`qlm bench planner`: what plans cost, how long they take, and how far from the optimum they can be.

Families of problems: random ones of given sizes (:mod:`planners.qlm.synthetic`), and snapshots of episodes. Every
method plans the same problems: rules, the search at several time limits, and what SCIP makes of the queues that column
generation found. Column generation also gives the bound. On small problems brute force, SCIP and HiGHS give the
optimum, the last two from the same program over every possible queue.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_matrix

from planners import make_planner
from planners.qlm.brute_force import cheapest_plan, every_column
from planners.qlm.column_generation import BoundSettings, bound_plan
from planners.qlm.heuristics import batched_edf_plan, edf_plan, inserted_plan
from planners.qlm.master import Column, solve_master
from planners.qlm.plan import Plan
from planners.qlm.problem import Problem, make_problem
from planners.qlm.sequencing import search_plan
from planners.qlm.synthetic import random_problem
from planners.spec import EdfSpec, QlmSpec
from qlm_env.env import QLMEnv
from runners.bench import Figure
from runners.config import BenchPlannerOptions
from runners.peak_memory import peak_bytes
from runners.progress import CountedProgress
from runners.tables import console

SWAP_AWARE_EDF = "swap-aware EDF"
RULES: dict[str, Callable[[Problem], Plan]] = {
    "EDF": edf_plan,
    SWAP_AWARE_EDF: batched_edf_plan,
    "insertion": inserted_plan,
}
SMALL_GROUPS = 7
"""Families of at most so many groups are solved to optimality as well."""
SMALL_INSTANCES = 3
EXACT_TIME_LIMIT_S = 60.0
EXACT_NODE_LIMIT = 10**6
SAME = 1e-6
"""Relative difference below which two costs are the same."""

SNAPSHOT_SCENARIOS = {"w_a": "small", "w_b": "small_multi"}
"""Workload -> cluster of the episodes that snapshots are taken of."""
SNAPSHOT_REQUESTS = 1500
SNAPSHOT_LOAD = 1.3
"""Above capacity, so that groups wait."""
SNAPSHOT_LEAST_GROUPS = 6

LARGE_GROUPS, LARGE_INSTANCES, LARGE_MODELS = 2000, 1000, 10
LARGE_TIME_LIMIT_S = 2.0


@dataclass
class Trial:
    """One method on one problem."""

    cost: float
    time_s: float


@dataclass
class Family:
    """Problems of a kind and what came out."""

    name: str
    bounds: list[float] = field(default_factory=list)
    bound_times_s: list[float] = field(default_factory=list)
    trials: dict[str, list[Trial]] = field(default_factory=dict)

    def note(self, method: str, cost: float, time_s: float) -> None:
        self.trials.setdefault(method, []).append(Trial(cost, time_s))

    def gaps(self, method: str) -> list[float]:
        """``(cost - bound)/cost`` of each problem."""
        pairs = zip(self.trials[method], self.bounds, strict=True)
        return [1.0 - bound / trial.cost if trial.cost > 0.0 else 0.0 for trial, bound in pairs]

    def share_of_best(self, method: str) -> float:
        """Share of problems on which no method is better."""
        best = [min(trials) for trials in zip(*([t.cost for t in ts] for ts in self.trials.values()), strict=True)]
        return float(np.mean([t.cost <= b * (1.0 + SAME) for t, b in zip(self.trials[method], best, strict=True)]))

    def share_cheaper(self, method: str, rule: str) -> float:
        """Share of problems on which a method is better than another."""
        pairs = zip(self.trials[method], self.trials[rule], strict=True)
        return float(np.mean([trial.cost < other.cost * (1.0 - SAME) for trial, other in pairs]))


def measure(options: BenchPlannerOptions) -> list[Figure]:
    """All families; prints their table. With ``options.large`` also the memory of planning for 1,000 instances."""
    problems: dict[str, list[Problem]] = {}
    for seed, (groups, instances, models) in enumerate(options.families, options.seed):
        rng = np.random.default_rng(seed)
        name = f"{groups} groups, {instances} instances, {models} models"
        problems[name] = [
            random_problem(rng, groups, instances, models, options.backlog) for _ in range(options.problems)
        ]
    if options.snapshots:
        for workload, cluster in SNAPSHOT_SCENARIOS.items():
            problems[f"snapshots of {workload}"] = snapshots(workload, cluster, options.seed, options.problems)
    families = []
    with CountedProgress("problems", sum(map(len, problems.values()))) as progress:
        for name, of_family in problems.items():
            family = Family(name)
            exact = all(_is_small(problem) for problem in of_family)
            for problem in of_family:
                plan_all(family, problem, options, exact)
                progress.advance(f"{name}: bound {family.bounds[-1]:.4g} in {family.bound_times_s[-1]:.1f} s")
            families.append(family)
    console().print(comparison(families))
    figures = [figure for family in families for figure in figures_of(family)]
    if options.large:
        figures += measure_large(options.seed)
    return figures


def _is_small(problem: Problem) -> bool:
    num_groups, num_instances = problem.allowed.shape
    return bool(num_groups <= SMALL_GROUPS and num_instances <= SMALL_INSTANCES)


def plan_all(family: Family, problem: Problem, options: BenchPlannerOptions, exact: bool) -> None:
    """Every method on one problem, with ``exact`` those that find the optimum too; compilation is excluded."""
    _compile(problem)
    best: Plan | None = None
    for name, build in RULES.items():
        begin_s = time.perf_counter()
        plan = build(problem)
        family.note(name, plan.total, time.perf_counter() - begin_s)
        best = plan if best is None or plan.total < best.total else best
    assert best is not None
    start = best
    for limit_s in options.search_times_s:
        begin_s = time.perf_counter()
        plan = search_plan(problem, start, np.random.default_rng(options.seed), None, limit_s).plan
        family.note(f"search, {limit_s:g} s", plan.total, time.perf_counter() - begin_s)
        best = plan if plan.total < best.total else best
    result = bound_plan(problem, best, BoundSettings(time_limit_s=options.bound_time_limit_s))
    family.note("column generation", result.plan.total, result.time_s)
    family.bounds.append(result.bound)
    family.bound_times_s.append(result.time_s)
    if exact:
        _solve_exactly(family, problem, start)


def _compile(problem: Problem) -> None:
    for build in RULES.values():
        build(problem)
    search_plan(problem, edf_plan(problem), np.random.default_rng(0), 1, 1.0)
    bound_plan(problem, edf_plan(problem), BoundSettings(round_limit=1, time_steps=2, polish=False))


def _solve_exactly(family: Family, problem: Problem, start: Plan) -> None:
    begin_s = time.perf_counter()
    plan = cheapest_plan(problem)
    family.note("brute force", plan.total, time.perf_counter() - begin_s)
    begin_s = time.perf_counter()
    columns = every_column(problem)
    columns_s = time.perf_counter() - begin_s
    num_groups = problem.allowed.shape[0]
    # Holding everything back is always possible.
    held = columns[:num_groups]
    begin_s = time.perf_counter()
    result = solve_master(columns, num_groups, held, EXACT_TIME_LIMIT_S, EXACT_NODE_LIMIT)
    family.note("SCIP, every queue", result.cost, columns_s + time.perf_counter() - begin_s)
    begin_s = time.perf_counter()
    cost = solve_with_highs(columns, num_groups)
    family.note("HiGHS, every queue", cost, columns_s + time.perf_counter() - begin_s)


def solve_with_highs(columns: list[Column], num_groups: int) -> float:
    """The least cost of a choice of ``columns`` (the program of :mod:`planners.qlm.master`) by HiGHS."""
    instances = sorted({column.instance for column in columns if column.instance is not None})
    row = {i: num_groups + k for k, i in enumerate(instances)}
    entries = [(g, c) for c, column in enumerate(columns) for g in column.groups]
    entries += [(row[column.instance], c) for c, column in enumerate(columns) if column.instance is not None]
    rows, places = zip(*entries, strict=True)
    matrix = csr_matrix((np.ones(len(entries)), (rows, places)), (num_groups + len(instances), len(columns)))
    upper = np.ones(matrix.shape[0])
    lower = np.concatenate((np.ones(num_groups), np.zeros(len(instances))))
    result = milp(
        np.array([column.cost for column in columns]),
        integrality=np.ones(len(columns)),
        bounds=(0, 1),
        constraints=LinearConstraint(matrix, lower, upper),
        options={"time_limit": EXACT_TIME_LIMIT_S, "mip_rel_gap": 0.0},
    )
    if not result.success:
        raise RuntimeError(f"HiGHS stopped without an optimum: {result.message}")
    return float(result.fun)


def snapshots(workload: str, cluster: str, seed: int, count: int) -> list[Problem]:
    """Problems met in an episode that EDF runs above capacity, evenly spread over those with enough groups."""
    settings = {"preset": workload, "num_requests": SNAPSHOT_REQUESTS}
    env = QLMEnv(cluster, {**settings, "arrivals": {"kind": "poisson", "load": SNAPSHOT_LOAD}})
    policy = make_planner(EdfSpec())
    spec = QlmSpec()
    _, info = env.reset(seed=seed)
    policy.reset(env.view, np.random.default_rng(seed))
    met: list[Problem] = []
    while "metrics" not in info:
        groups = sorted(env.view.groups, key=lambda group: (group.deadline_s, group.id))
        if len(groups) >= SNAPSHOT_LEAST_GROUPS:
            idle_s = np.zeros(len(env.view.instances))
            met.append(make_problem(env.view, groups[: spec.window_groups], spec, idle_s))
        info = env.step_plan(policy.act(env.view))[-1]
    chosen = np.unique(np.linspace(0, len(met) - 1, min(count, len(met))).round().astype(int))
    return [met[k] for k in chosen]


def comparison(families: list[Family]) -> Table:
    """One line per family and method."""
    caption = (
        "gap: (cost - bound)/cost, with the bound of column generation; best: share of problems on which no method is"
        " better; medians over the problems"
    )
    table = Table("problems", "method", title="plans against time", caption=caption)
    for name in ("time s", "gap %", "largest gap %", "best %", f"beats {SWAP_AWARE_EDF} %"):
        table.add_column(name, justify="right")
    for family in families:
        for k, (method, trials) in enumerate(family.trials.items()):
            gaps = family.gaps(method)
            table.add_row(
                family.name if k == 0 else "",
                method,
                f"{np.median([trial.time_s for trial in trials]):.3g}",
                f"{100 * np.median(gaps):.1f}",
                f"{100 * max(gaps):.1f}",
                f"{100 * family.share_of_best(method):.0f}",
                f"{100 * family.share_cheaper(method, SWAP_AWARE_EDF):.0f}",
                end_section=k == len(family.trials) - 1,
            )
    return table


def figures_of(family: Family) -> list[Figure]:
    """Time, gap and share of best of every method."""
    figures: list[Figure] = []
    for method, trials in family.trials.items():
        where = f"{family.name}: {method}"
        figures += [
            Figure(name=f"{where}, time", value=float(np.median([trial.time_s for trial in trials])), unit="s"),
            Figure(name=f"{where}, gap", value=100.0 * float(np.median(family.gaps(method))), unit="%"),
            Figure(name=f"{where}, best", value=100.0 * family.share_of_best(method), unit="%"),
            Figure(
                name=f"{where}, better than {SWAP_AWARE_EDF}",
                value=100.0 * family.share_cheaper(method, SWAP_AWARE_EDF),
                unit="%",
            ),
        ]
    return figures


def measure_large(seed: int) -> list[Figure]:
    """Planning 2,000 groups on 1,000 instances in a fresh process: time and peak memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        rule_s, search_s, peak_bytes = pool.submit(_plan_large, seed).result()
    where = f"{LARGE_GROUPS:,} groups, {LARGE_INSTANCES:,} instances"
    return [
        Figure(name=f"{where}: swap-aware EDF", value=rule_s, unit="s"),
        Figure(name=f"{where}: search", value=search_s, unit="s"),
        Figure(name=f"{where}: peak memory", value=peak_bytes / 1e9, unit="GB"),
    ]


def _plan_large(seed: int) -> tuple[float, float, int]:
    """Seconds of the rule and of the search, and the peak resident bytes of this process."""
    rng = np.random.default_rng(seed)
    _compile(random_problem(rng, 5, 2, 2))
    problem = random_problem(rng, LARGE_GROUPS, LARGE_INSTANCES, LARGE_MODELS)
    begin_s = time.perf_counter()
    plan = batched_edf_plan(problem)
    rule_s = time.perf_counter() - begin_s
    begin_s = time.perf_counter()
    search_plan(problem, plan, rng, None, LARGE_TIME_LIMIT_S)
    search_s = time.perf_counter() - begin_s
    return rule_s, search_s, peak_bytes()
