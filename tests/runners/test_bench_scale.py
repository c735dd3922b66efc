"""The day at scale, small."""

from __future__ import annotations

import pytest

from runners.bench_scale import run_scale
from runners.config import BenchScaleOptions


@pytest.mark.parametrize("planner", ["qlm", "least_loaded"])
def test_a_short_day_is_served_whole(planner: str) -> None:
    options = BenchScaleOptions(num_requests=300, instances=5, duration_s=60.0, planner=planner, interval_s=2.0)
    run = run_scale(options)
    assert (run.requests, run.instances) == (300, 5)
    assert run.slo_attainment > 0.5
    assert run.emulated_s > 55.0
    # It decides at its interval, and only then.
    assert run.decisions == pytest.approx(run.emulated_s / 2.0, abs=2)
    assert 0 < run.planner_s < run.episode_s
    again = run_scale(options)
    assert (again.slo_attainment, again.operations) == (run.slo_attainment, run.operations)
