"""What an episode leaves behind beside its metrics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from runners.config import CompareConfig
from runners.episode import run_episode


def test_outcomes_of_requests_add_up_to_the_metrics(configure: Callable[..., CompareConfig]) -> None:
    config = configure("planner=[edf]", "workload.num_requests=60")
    result = run_episode(config.scenario, config.planners["edf"], 0, timeline=True)
    requests = result.requests
    assert requests is not None
    assert len(requests) == 60
    assert requests["arrival_s"].is_monotonic_increasing
    assert requests["met"].mean() == pytest.approx(result.metrics["slo_attainment"])
    for name, attained in result.metrics["slo_attainment_per_class"].items():
        assert requests[requests["slo_class"] == name]["met"].mean() == pytest.approx(attained)
    for latency in ("queueing", "ttft", "e2e"):
        assert np.nanmedian(requests[f"{latency}_s"]) == pytest.approx(result.metrics[f"{latency}_p50_s"])
    assert (requests["queueing_s"] <= requests["ttft_s"]).all()
    assert set(requests["model"]) == {"vicuna-7b", "vicuna-13b"}


def test_without_a_timeline_no_outcomes_are_kept(configure: Callable[..., CompareConfig]) -> None:
    config = configure("planner=[edf]", "workload.num_requests=20")
    assert run_episode(config.scenario, config.planners["edf"], 0, timeline=False).requests is None
