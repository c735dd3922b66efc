"""Recorded runs for tests: made by hand, or by the step-by-step reference engine in place of a real one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlm_env.backends.emulator.reference import StepEngine, StepRequest, serve_by_steps
from qlm_env.profiles import Profile
from qlm_env.spec import EngineSpec

ENGINE_CLOCK_S = 5_000.0
"""What the engine's clock shows at the first arrival, which the client's has at ``CLIENT_CLOCK_S``."""
CLIENT_CLOCK_S = 1_700_000_000.0

META: dict[str, Any] = {
    "model": "toy/Toy-1B",
    "vllm_version": "0.19.0",
    "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 64, "tensor_parallel_size": 1},
    "kv_cache": {"num_gpu_blocks": 101, "block_size": 16, "enable_prefix_caching": True},
    "resolved_config": {
        "scheduler_config": {"async_scheduling": True, "enable_chunked_prefill": True, "policy": "fcfs"}
    },
}

ROW: dict[str, Any] = {
    "request_id": "r-0",
    "input_toks": 100,
    "output_toks": 5,
    "arrival_time": CLIENT_CLOCK_S,
    "queued_ts": ENGINE_CLOCK_S,
    "scheduled_ts": ENGINE_CLOCK_S,
    "first_token_ts": ENGINE_CLOCK_S + 1.0,
    "last_token_ts": ENGINE_CLOCK_S + 3.0,
}


def write_run(
    folder: Path, rows: Sequence[Mapping[str, Any]] = (ROW,), meta: Mapping[str, Any] = META, series: str | None = None
) -> Path:
    """A recorded run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if series is not None:
        (folder / "timeseries.csv").write_text(series, encoding="utf-8")
    return folder


def engine_meta(engine: EngineSpec) -> dict[str, Any]:
    """The ``meta.json`` of an engine with these settings."""
    return {
        "model": "toy/Toy-1B",
        "vllm_version": "0.32.0",
        "engine_kwargs": {"tensor_parallel_size": 1},
        "kv_cache": {
            "num_gpu_blocks": engine.num_gpu_blocks,
            "block_size": engine.block_size,
            "enable_prefix_caching": engine.enable_prefix_caching,
        },
        "resolved_config": {
            "scheduler_config": {
                "max_num_seqs": engine.max_num_seqs,
                "max_num_batched_tokens": engine.max_num_batched_tokens,
                "enable_chunked_prefill": engine.enable_chunked_prefill,
                "async_scheduling": engine.async_scheduling,
                "policy": engine.scheduling_policy,
            }
        },
    }


def random_requests(rng: np.random.Generator, num_requests: int, class_names: Sequence[str]) -> list[StepRequest]:
    """Requests of up to 400 tokens that arrive within a few seconds, with priorities as places in ``class_names``."""
    arrival_s = np.cumsum(rng.exponential(0.05, num_requests))
    prompt, output = rng.integers(1, 300, num_requests), rng.integers(1, 100, num_requests)
    priority = rng.integers(0, len(class_names), num_requests)
    return [
        StepRequest(row, float(arrival_s[row]), int(prompt[row]), int(output[row]), int(priority[row]))
        for row in range(num_requests)
    ]


def run_by_steps(
    folder: Path, profile: Profile, engine: EngineSpec, requests: list[StepRequest], class_names: Sequence[str]
) -> Path:
    """Serve ``requests`` with the reference engine and record it as a real run would be."""
    assert engine.num_gpu_blocks is not None
    reference = StepEngine(
        coefficients=tuple(profile.step_time),
        num_blocks=engine.num_gpu_blocks - 1,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
        chunked_prefill=engine.enable_chunked_prefill,
        priority=engine.scheduling_policy == "priority",
        async_scheduling=engine.async_scheduling,
        enable_prefix_caching=engine.enable_prefix_caching,
    )
    serve_by_steps(reference, requests)
    rows = [
        {
            "request_id": f"r-{request.row}",
            "input_toks": request.prompt,
            "output_toks": request.output,
            "arrival_time": CLIENT_CLOCK_S + request.arrival_s,
            # The engine takes requests in when a step ends; the least delayed one tells the clocks' distance.
            "queued_ts": ENGINE_CLOCK_S + (request.arrival_s if request.row == 0 else request.scheduled_s),
            "scheduled_ts": ENGINE_CLOCK_S + request.scheduled_s,
            "first_token_ts": ENGINE_CLOCK_S + request.first_token_s,
            "last_token_ts": ENGINE_CLOCK_S + request.finish_s,
            "slo_class": class_names[request.priority],
        }
        for request in requests
    ]
    return write_run(folder, rows, engine_meta(engine))
