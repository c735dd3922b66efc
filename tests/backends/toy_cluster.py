"""Clusters on profiles of round numbers, for tests that compute times by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlm_env.cluster import make_world
from qlm_env.dynamics import World
from qlm_env.requests import RequestTable, make_request_table
from qlm_env.spec import ScenarioSpec, parse
from tests.profiles.toy import ROUND_NUMBERS, toy_profile, write_profile

STEP_S = 0.01
"""Every step takes so long, whatever is in it."""

VARIABLE_TIMES = (
    "c1_s_per_token",
    "c2_s_per_token",
    "c3_s_per_kv_token",
    "c4_s_per_token2",
    "c5_s_per_sequence",
    "c6_s_per_mixed_kv_token",
)

WEIGHT_BYTES = ROUND_NUMBERS["weight_bytes"]
KV_BYTES_PER_TOKEN = ROUND_NUMBERS["kv_bytes_per_token"]
COLD_START_S, STAGE_S = ROUND_NUMBERS["cold_start_s"], ROUND_NUMBERS["stage_s"]
WAKE_S, SLEEP_S = ROUND_NUMBERS["wake_s"], ROUND_NUMBERS["sleep_s"]


def write_toy_profile(folder: Path, **numbers: float) -> None:
    """The profile of a step that takes STEP_S whatever is in it, where ``numbers`` do not say otherwise."""
    constant = dict.fromkeys(VARIABLE_TIMES, 0.0)
    write_profile(folder, toy_profile("TOY", "toy-1b", 1, **{"c0_s": STEP_S, **constant, **numbers}))


def toy_scenario(
    *,
    num_models: int = 1,
    instances: Sequence[dict[str, Any]] = ({},),
    engine: dict[str, Any] | None = None,
    slo: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    failures: Sequence[dict[str, Any]] = (),
    context_tokens: int = 512,
) -> ScenarioSpec:
    """Instances of the toy profile; every model fits each of them."""
    models = [{"name": f"m{m}", "architecture": "toy-1b", "context_tokens": context_tokens} for m in range(num_models)]
    return parse(
        ScenarioSpec,
        {
            "cluster": {
                "instances": [{"device": "TOY", "initial_model": "m0", **instance} for instance in instances],
                "engine": {"max_num_seqs": 4, **(engine or {})},
                "failures": list(failures),
            },
            "workload": {
                "kind": "synthetic",
                "models": models,
                "mix": [{"model": "m0", "slo_class": "urgent"}],
                "arrivals": {"kind": "batch"},
            },
            "slo": slo
            or {
                "classes": [
                    {"name": "urgent", "target_s": 10.0},
                    {"name": "patient", "target_s": 1000.0},
                ]
            },
            "environment": environment or {},
        },
    )


def request_table(
    *rows: tuple[float, int, int] | tuple[float, int, int, int] | tuple[float, int, int, int, int],
) -> RequestTable:
    """Requests of (arrival_s, prompt tokens, output tokens, model = 0, SLO class = 0)."""
    full = [(*row, 0, 0)[:5] for row in rows]
    arrival_s, prompt, output, model, slo_class = (list(column) for column in zip(*full, strict=True))
    return make_request_table(
        np.array(arrival_s, float), np.array(prompt), np.array(output), np.array(model), np.array(slo_class)
    )


def toy_world(folder: Path, requests: RequestTable, scenario: ScenarioSpec) -> World:
    """An episode on the toy profile in ``folder``."""
    return make_world(scenario, requests, logging=False, profile_folder=folder)
