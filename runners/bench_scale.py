"""`qlm bench scale`: a day of a large cluster with a planner in the loop, its wall-clock time and memory.

The planner decides every ``interval_s`` of emulated time rather than at every event: at hundreds of instances something
happens every few milliseconds, and a controller that answered each event would be asked millions of times a day.
Between two decisions engines pull from their queues by themselves; a new group waits for the next decision.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from planners import make_planner
from planners.spec import parse_planner
from qlm_env.cluster import instance_names, make_world
from qlm_env.dynamics import World, advance, settle_rest_as_missed
from qlm_env.lso import apply_lso
from qlm_env.metrics import episode_metrics
from qlm_env.presets import make_scenario
from qlm_env.scenario import Episodes
from qlm_env.spec import ScenarioSpec
from qlm_env.view import ClusterView
from runners.bench import Figure
from runners.config import BenchScaleOptions
from runners.episode import PLANNER_STREAM
from runners.peak_memory import peak_bytes

DEVICES = {"A10": 0.4, "A100": 0.6}
"""Shares of the instances, those of the paper's cluster."""
COMPILED_REQUESTS = 200
"""Of a short episode before the clock starts."""


class ScaleRun(NamedTuple):
    """One long episode."""

    requests: int
    instances: int
    emulated_s: float
    decisions: int
    operations: int
    slo_attainment: float
    workload_s: float
    """Wall-clock time of drawing the requests."""
    episode_s: float
    """Wall-clock time of the episode."""
    planner_s: float
    """Of that, in the planner."""
    peak_bytes: int


def measure(options: BenchScaleOptions) -> list[Figure]:
    """The figures of one run in a process of its own."""
    run = run_apart(options)
    where = f"{run.requests:,} requests, {run.instances} instances, {options.planner}"
    return [
        Figure(name=f"{where}: wall time", value=run.workload_s + run.episode_s, unit="s"),
        Figure(name=f"{where}: drawing the requests", value=run.workload_s, unit="s"),
        Figure(name=f"{where}: in the planner", value=run.planner_s, unit="s"),
        Figure(name=f"{where}: decisions", value=run.decisions, unit=""),
        Figure(name=f"{where}: operations", value=run.operations, unit=""),
        Figure(name=f"{where}: emulated time", value=run.emulated_s, unit="s"),
        Figure(name=f"{where}: SLO attainment", value=100 * run.slo_attainment, unit="%"),
        Figure(name=f"{where}: peak memory", value=run.peak_bytes / 1e9, unit="GB"),
    ]


def run_apart(options: BenchScaleOptions) -> ScaleRun:
    """One run in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_scale, options).result()


def run_scale(options: BenchScaleOptions) -> ScaleRun:
    """One run in this process; compilation is excluded.

    Raises:
        ConfigError: there is no such planner.
    """
    _run(_scenario(options, COMPILED_REQUESTS), options)
    return _run(_scenario(options, options.num_requests), options)


def _scenario(options: BenchScaleOptions, num_requests: int) -> ScenarioSpec:
    counts = {device: round(share * options.instances) for device, share in DEVICES.items()}
    instances = [{"device": device, "count": count} for device, count in counts.items() if count]
    rate_per_s = options.num_requests / options.duration_s
    return make_scenario(
        {"name": "scale", "instances": instances, "engine": {"max_num_seqs": 48}},
        {
            "preset": options.preset,
            "num_requests": num_requests,
            "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
        },
        environment={"grouping": {"delta": options.delta}},
    )


def _run(scenario: ScenarioSpec, options: BenchScaleOptions) -> ScaleRun:
    begin_s = time.perf_counter()
    requests = Episodes(scenario).requests(options.seed)
    workload_s = time.perf_counter() - begin_s
    begin_s = time.perf_counter()
    world = make_world(scenario, requests, logging=False)
    view = ClusterView(world, scenario, instance_names(scenario.cluster))
    planner = make_planner(parse_planner(options.planner, {}))
    stream = np.random.SeedSequence(options.seed, spawn_key=(PLANNER_STREAM,))
    planner.reset(view, np.random.default_rng(stream))
    horizon_s = float(requests["arrival_s"][-1]) + scenario.environment.max_drain_s
    planner_s, decisions, operations = 0.0, 0, 0
    while not _over(world) and view.now_s < horizon_s:
        asked_s = time.perf_counter()
        lsos = planner.act(view)
        planner_s += time.perf_counter() - asked_s
        decisions += 1
        operations += len(lsos)
        for lso in lsos:
            apply_lso(world, *lso.code())
        advance(world, view.now_s + options.interval_s, False)
    settle_rest_as_missed(world)
    metrics = episode_metrics(world, [c.name for c in scenario.slo.classes])
    return ScaleRun(
        requests=len(requests),
        instances=scenario.cluster.num_instances,
        emulated_s=metrics["emulated_s"],
        decisions=decisions,
        operations=operations,
        slo_attainment=metrics["slo_attainment"],
        workload_s=workload_s,
        episode_s=time.perf_counter() - begin_s,
        planner_s=planner_s,
        peak_bytes=peak_bytes(),
    )


def _over(world: World) -> bool:
    clock = world.clock[0]
    return int(clock.finished + clock.rejected) == len(world.requests)
