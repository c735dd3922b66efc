"""Small episodes made by hand, for tests of single decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from planners.base import Planner
from qlm_env.env import QLMEnv
from qlm_env.requests import RequestTable, make_request_table

CLASSES = ({"name": "urgent", "target_s": 20.0}, {"name": "patient", "target_s": 600.0})
URGENT, PATIENT = 0, 1


def crafted_env(architectures: Sequence[str] = ("llama-2-7b",), count: int = 1, **engine: Any) -> QLMEnv:
    """``count`` A100 with models ``m0``, ``m1``, ...: the first on the GPU, the others warm; two SLO classes."""
    names = [f"m{k}" for k in range(len(architectures))]
    return QLMEnv(
        {
            "instances": [
                {"device": "A100", "count": count, "initial_model": "m0", "warm_models": names[1:], "host_kv_gb": 64}
            ],
            "engine": {"max_num_seqs": 16, **engine},
        },
        {
            "kind": "synthetic",
            "models": [{"name": n, "architecture": a} for n, a in zip(names, architectures, strict=True)],
            "mix": [{"model": n, "slo_class": c["name"]} for n in names for c in CLASSES],
            "arrivals": {"kind": "poisson", "rate_per_s": 1.0},
        },
        {"classes": list(CLASSES)},
        {"strict": True},
    )


def requests_of(*rows: tuple[float, int, int, int]) -> RequestTable:
    """Rows of (arrival_s, model, SLO class, output tokens), each with a prompt of 100 tokens."""
    arrival, model, slo_class, output = zip(*sorted(rows), strict=True)
    whole = np.ones(len(rows), np.int32)
    return make_request_table(np.array(arrival), 100 * whole, np.array(output), np.array(model), np.array(slo_class))


def begin(env: QLMEnv, planner: Planner, requests: RequestTable) -> None:
    """Start the episode and the planner."""
    env.start(requests)
    planner.reset(env.view, np.random.default_rng(0))


def serve(env: QLMEnv, planner: Planner, requests: RequestTable) -> dict[str, Any]:
    """The metrics of the whole episode."""
    begin(env, planner, requests)
    info: dict[str, Any] = {}
    while "metrics" not in info:
        info = env.step_plan(planner.act(env.view))[-1]
    metrics: dict[str, Any] = info["metrics"]
    return metrics


def advance_to(env: QLMEnv, planner: Planner, time_s: float) -> None:
    """Let the planner decide up to the first epoch at or after ``time_s``."""
    while env.now_s < time_s:
        env.step_plan(planner.act(env.view))
