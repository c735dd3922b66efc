"""Stand-ins for the environment: an episode whose numbers are a plain function of planner and seed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from planners.spec import PlannerSpec
from qlm_env.spec import ScenarioSpec
from runners.episode import EpisodeResult

PLANNER_BONUS = {"fcfs": 0.0, "edf": 0.1, "qlm": 0.2}


class FakeTimeline:
    def to_chrome_trace(self) -> dict[str, Any]:
        return {"traceEvents": [{"name": "decode", "ph": "X", "ts": 0, "dur": 5, "pid": 0, "tid": 0}]}


def metrics(attainment: float) -> dict[str, Any]:
    """Metrics as the environment reports them, with the given SLO attainment."""
    percentiles = {
        f"{name}_{percentile}_s": value
        for name in ("ttft", "tpot", "e2e", "queueing")
        for percentile, value in (("p50", 0.5), ("p99", 4.0))
    }
    counts = ("swaps", "warm_hits", "cold_starts", "warm_starts", "evictions", "preemptions")
    return {
        "requests": 100,
        "finished": 98,
        "rejected": 1,
        "unfinished": 1,
        "slo_attainment": attainment,
        "slo_attainment_weighted": attainment,
        "slo_attainment_per_class": {
            "interactive": attainment - 0.1,
            "batch-2": attainment + 0.1,
            "empty": None,
        },
        "request_throughput_per_s": 10.0,
        "token_throughput_per_s": 2000.0,
        "goodput_per_s": 9.0,
        **percentiles,
        "hol_blocking_s": 1.5,
        "utilisation": 0.7,
        "kv_occupancy": 0.4,
        **dict.fromkeys(counts, 2),
        "recomputed_tokens": 10,
        "invalid_actions": 0,
        "decisions": 4,
        "emulated_s": 60.0,
        "episode_return": 2 * attainment - 1,
    }


def episode(scenario: ScenarioSpec, planner: PlannerSpec, seed: int, *, timeline: bool) -> EpisodeResult:
    """Attainment 0.5, more for better planners, and 0.01 per seed."""
    return EpisodeResult(
        metrics=metrics(0.5 + PLANNER_BONUS[planner.name] + 0.01 * seed),
        workload_hash=f"{scenario.workload.name}-{seed}",
        planner_statistics={"solves": 2},
        decision_ms=np.array([1.0, 2.0, 3.0, 4.0]),
        wall_s=0.25,
        timeline=FakeTimeline() if timeline else None,
        requests=requests(seed) if timeline else None,
    )


def requests(seed: int) -> pd.DataFrame:
    """Four requests of two classes, one of which never finished."""
    return pd.DataFrame(
        {
            "arrival_s": [0.0, 1.0, 2.0, 3.0],
            "model": "vicuna-7b",
            "slo_class": ["interactive", "batch-2", "interactive", "batch-2"],
            "met": [True, True, True, False],
            "queueing_s": [0.1, 0.2, 0.3 + seed, np.nan],
            "ttft_s": [0.5, 0.6, 0.7 + seed, np.nan],
            "e2e_s": [2.0, 3.0, 4.0 + seed, np.nan],
        }
    )


def check(scenario: ScenarioSpec, seed: int) -> None:
    """Every scenario is fine."""


def episode_of_planner_dependent_workload(
    scenario: ScenarioSpec, planner: PlannerSpec, seed: int, *, timeline: bool
) -> EpisodeResult:
    """What must never happen: the planner's choices change the requests."""
    result = episode(scenario, planner, seed, timeline=timeline)
    return EpisodeResult(
        result.metrics,
        f"{planner.name}-{seed}",
        result.planner_statistics,
        result.decision_ms,
        result.wall_s,
        result.timeline,
        result.requests,
    )


def failing_episode(scenario: ScenarioSpec, planner: PlannerSpec, seed: int, *, timeline: bool) -> EpisodeResult:
    """EDF raises under seed 1, QLM's process is killed under seed 0."""
    if (planner.name, seed) == ("edf", 1):
        raise ArithmeticError("lost\na request")
    if (planner.name, seed) == ("qlm", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return episode(scenario, planner, seed, timeline=timeline)


def logged_episode(scenario: ScenarioSpec, planner: PlannerSpec, seed: int, *, timeline: bool) -> EpisodeResult:
    """Leaves a line in the file EPISODE_LOG per call, and takes EPISODE_SECONDS."""
    with Path(os.environ["EPISODE_LOG"]).open("a", encoding="utf-8") as log:
        log.write(f"{planner.name} {seed}\n")
    time.sleep(float(os.environ.get("EPISODE_SECONDS", "0")))
    return episode(scenario, planner, seed, timeline=timeline)


def read_rows(out: Path) -> pd.DataFrame:
    """The merged results in ``out``."""
    return pd.read_parquet(out / "results.parquet")
