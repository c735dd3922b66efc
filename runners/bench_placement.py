"""`qlm bench placement`: how long the placement program takes on SCIP, and how good its placements are.

Synthetic clusters of two kinds of devices, every model on some instances and as many warm again, and a demand that
needs about all of them but differs from what is loaded.
"""

from __future__ import annotations

import time

import numpy as np

from planners.qlm.placement import PlacementLimits, PlacementProblem, solve_placement
from runners.bench import Figure
from runners.config import BenchPlacementOptions
from runners.progress import CountedProgress

HORIZON_S = 120.0
TARGETS_S = (20.0, 60.0, 3600.0)
RATE_PER_S = (2.0, 6.0)
"""Requests a second of an instance of each device, for a model of middling size."""


def measure(options: BenchPlacementOptions) -> list[Figure]:
    """Figures for every cluster size."""
    figures: list[Figure] = []
    with CountedProgress("placements", len(options.sizes) * options.problems) as progress:
        for size in options.sizes:
            figures += measure_placement(size, options, progress)
    return figures


def measure_placement(size: int, options: BenchPlacementOptions, progress: CountedProgress) -> list[Figure]:
    """Times, with building the program, and gaps over several problems of one size."""
    limits = PlacementLimits(options.time_limit_s, options.node_limit, options.relative_gap)
    times_s, cpu_s, gaps, kept = [], [], [], 0
    for number in range(options.problems):
        rng = np.random.default_rng([options.seed, size, number])
        problem = random_placement(rng, size, options.models, options.scenarios)
        begin_s = time.process_time()
        placement = solve_placement(problem, limits)
        cpu_s.append(time.process_time() - begin_s)
        times_s.append(placement.time_s)
        gaps.append((placement.cost - placement.bound) / max(abs(placement.cost), 1e-9))
        kept += placement.status == "keep"
        progress.advance(f"{size} instances: {placement.time_s:.2f} s, {placement.status}, gap {100 * gaps[-1]:.2f} %")
    where = f"{size} instances, {options.models} models, {options.scenarios} scenarios"
    return [
        Figure(name=f"{where}: median time", value=float(np.median(times_s)), unit="s"),
        Figure(name=f"{where}: longest time", value=max(times_s), unit="s"),
        Figure(name=f"{where}: longest processor time", value=max(cpu_s), unit="s"),
        Figure(name=f"{where}: median gap", value=100 * float(np.median(gaps)), unit="%"),
        Figure(name=f"{where}: largest gap", value=100 * max(gaps), unit="%"),
        Figure(name=f"{where}: nothing better found than to keep all", value=kept, unit="problems"),
    ]


def random_placement(rng: np.random.Generator, size: int, num_models: int, num_scenarios: int) -> PlacementProblem:
    """A cluster of ``size`` instances with magnitudes as the profiles have them."""
    speed = rng.uniform(0.2, 1.0, num_models)
    rate = np.array(RATE_PER_S)[:, None] * speed
    # The largest models do not fit the smaller device.
    rate[0, speed < np.quantile(speed, 0.2)] = 0.0
    device_of = rng.integers(0, 2, size)
    loaded_of = np.array([rng.choice(np.flatnonzero(rate[d] > 0)) for d in device_of])
    warm_of = rng.random((size, num_models)) < 0.1
    keys = sorted(set(zip(device_of.tolist(), loaded_of.tolist(), strict=True)))
    options: list[tuple[int, int, int, float]] = []
    keep = []
    count = []
    for c, (d, loaded) in enumerate(keys):
        members = np.flatnonzero((device_of == d) & (loaded_of == loaded))
        count.append(len(members))
        keep.append(len(options))
        options.append((c, loaded, len(members), 0.0))
        for model in np.flatnonzero(rate[d] > 0):
            if model != loaded:
                warm = int(warm_of[members, model].sum())
                times_s = ((warm, 4.0 / speed[model]), (len(members) - warm, 50.0 + 10.0 / speed[model]))
                options += [(c, int(model), limit, lost_s) for limit, lost_s in times_s if limit]
    lost_s = np.array([option[3] for option in options])
    share = rng.dirichlet(np.ones(num_models))
    # What the cluster would serve of these shares if every instance ran every model at its speed.
    capacity = HORIZON_S / float((share / np.maximum(rate.mean(axis=0), 1e-9)).sum()) * size
    mix = rng.dirichlet(np.ones(len(TARGETS_S)), num_models)
    mean = 0.9 * capacity * share[:, None] * mix
    return PlacementProblem(
        instances=np.array(count),
        device=np.array([d for d, _ in keys]),
        keep=np.array(keep),
        option_class=np.array([option[0] for option in options]),
        option_model=np.array([option[1] for option in options]),
        option_limit=np.array([option[2] for option in options]),
        option_lost_s=lost_s,
        option_cost=1e-3 * lost_s,
        speed=rate,
        work=rng.uniform(0.8, 1.2, mean.shape),
        demand=rng.poisson(rng.gamma(10.0, 0.1, (num_scenarios, *mean.shape)) * mean).astype(float),
        penalty=np.minimum(1.0, HORIZON_S / np.array(TARGETS_S)),
        horizon_s=HORIZON_S,
    )
