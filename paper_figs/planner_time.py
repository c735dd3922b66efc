"""Figure 13: time of one solve against the queue and the cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style
from paper_figs.figure import Source
from planners.qlm.heuristics import batched_edf_plan
from planners.qlm.layers import Layers, prepare
from planners.qlm.synthetic import random_problem
from planners.spec import QlmSpec

EXPERIMENTS: tuple[str, ...] = ()
MODELS = 8
GROUPS_AT, INSTANCES_AT = 200, 64
QUEUE_SIZES, QUICK_QUEUE_SIZES = (25, 50, 100, 200, 400, 800, 1600), (25, 100, 400)
CLUSTER_SIZES, QUICK_CLUSTER_SIZES = (16, 64, 256, 1000), (16, 128, 1000)
PROBLEMS, QUICK_PROBLEMS = 10, 3
NO_LIMIT_S = 600.0
"""The search stops at its iterations instead."""


def measure(queues: Sequence[int], clusters: Sequence[int], problems: int) -> list[Mapping[str, Any]]:
    """One row per random problem: seconds of the rule, and of a solve with the search's default iterations."""
    prepare()
    sizes = [("queue", groups, INSTANCES_AT) for groups in queues]
    sizes += [("cluster", GROUPS_AT, instances) for instances in clusters]
    rows: list[Mapping[str, Any]] = []
    for varied, groups, instances in sizes:
        for seed in range(problems):
            rng = np.random.default_rng([seed, groups, instances])
            problem = random_problem(rng, groups, instances, MODELS)
            begin_s = time.perf_counter()
            start = batched_edf_plan(problem)
            rule_s = time.perf_counter() - begin_s
            layers = Layers(QlmSpec())
            begin_s = time.perf_counter()
            plan = layers.solve(problem, start, rng, begin_s + NO_LIMIT_S)
            solve_s = time.perf_counter() - begin_s
            common = {"varied": varied, "groups": groups, "instances": instances, "seed": seed}
            rows.append(common | {"method": "rule", "time_s": rule_s, "cost": start.total})
            rows.append(common | {"method": "solve", "time_s": solve_s, "cost": plan.total})
    return rows


def data(source: Source) -> pd.DataFrame:
    quick = source.options.quick
    return source.measured(
        measure,
        queues=list(QUICK_QUEUE_SIZES if quick else QUEUE_SIZES),
        clusters=list(QUICK_CLUSTER_SIZES if quick else CLUSTER_SIZES),
        problems=QUICK_PROBLEMS if quick else PROBLEMS,
    )


def plot(data: pd.DataFrame) -> Picture:
    picture, (queue, cluster) = style.panels(2)
    for axes, varied, x, what in (
        (queue, "queue", "groups", f"request groups ({INSTANCES_AT} instances)"),
        (cluster, "cluster", "instances", f"instances ({GROUPS_AT} request groups)"),
    ):
        of_size = data[data["varied"] == varied]
        for method, name, colour in (
            ("solve", f"solve: rules, then {QlmSpec().iterations} iterations", style.colour("qlm")),
            ("rule", "EDF, models in batches", style.colour("swap_aware_edf")),
        ):
            times = 1000 * of_size[of_size["method"] == method].groupby(x)["time_s"].quantile([0.0, 0.5, 1.0]).unstack()
            axes.plot(times.index, times[0.5], marker="o", markersize=4, color=colour, label=name)
            axes.fill_between(times.index, times[0.0], times[1.0], color=colour, alpha=0.15, linewidth=0)
        style.log_axis(axes, of_size[x])
        axes.set_yscale("log")
        axes.set_xlabel(what)
    queue.set_ylabel("time (ms)")
    style.legend_below(picture, queue)
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    window = QlmSpec().window_groups
    return (
        f"Wall-clock time of one solve on random problems of {MODELS} models: medians, and the range of n = "
        f"{data['seed'].nunique()} problems. In an episode the planner solves for the {window} most urgent groups "
        f"only. One core of: {data['processor'].iloc[0]}."
    )
