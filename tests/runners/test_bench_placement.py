"""`qlm bench placement` on sizes that take no time."""

from __future__ import annotations

import numpy as np

from planners.qlm.placement import keep_all
from runners.bench_placement import measure, random_placement
from runners.config import BenchPlacementOptions


def test_figures_of_every_size() -> None:
    options = BenchPlacementOptions(sizes=(4, 8), models=3, scenarios=4, problems=2)
    figures = measure(options)
    assert len({figure["name"] for figure in figures}) == len(figures) == 12
    gaps = [figure["value"] for figure in figures if "largest gap" in figure["name"]]
    assert all(0 <= gap <= 0.2 for gap in gaps)


def test_synthetic_clusters_hold_together() -> None:
    problem = random_placement(np.random.default_rng(0), 64, 10, 16)
    assert problem.instances.sum() == 64
    assert problem.demand.shape == (16, 10, 3)
    assert np.all(problem.option_limit[problem.keep] == problem.instances)
    assert keep_all(problem).sum() == 64
    fits = problem.speed[problem.device[problem.option_class], problem.option_model] > 0
    assert fits.all()
    again = random_placement(np.random.default_rng(0), 64, 10, 16)
    assert np.array_equal(again.demand, problem.demand)
