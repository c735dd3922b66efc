"""`qlm profile record`: one workload on a live vLLM server, written as a recorded run."""

from __future__ import annotations

import asyncio
import itertools
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from qlm_env.backends.vllm.client import Completion, VllmClient
from qlm_env.backends.vllm.facts import EngineFacts, EngineLimits, read_facts
from qlm_env.backends.vllm.replay import Replay, check_lengths, replay
from qlm_env.backends.vllm.step_times import unseen_prompts
from qlm_env.profiles import saturated_rate_per_s
from qlm_env.profiles.load import read_profile
from qlm_env.requests import RequestTable, workload_hash
from qlm_env.spec import ConfigError, SyntheticWorkload
from qlm_env.workload import build_requests, expected_lengths, resolve_load
from runners.files import write_text
from runners.live_config import RecordConfig
from runners.progress import CountedProgress

LATE_SEND_S = 0.05
"""A request sent later than this after its arrival time is worth a word."""


def record(config: RecordConfig) -> None:
    """Send the workload to the server and write ``requests.jsonl``, ``timeseries.csv`` and ``meta.json``.

    Raises:
        ConfigError: the server cannot be used, the workload does not suit it, or ``out`` holds a recorded run.
    """
    out = Path(config.options.out)
    if (out / "requests.jsonl").exists():
        raise ConfigError(f"'out': {out} holds a recorded run already; name another folder")
    asyncio.run(_record(config, out))


async def _record(config: RecordConfig, out: Path) -> None:
    options = config.options
    limits = EngineLimits(max_num_seqs=options.max_num_seqs, max_num_batched_tokens=options.max_num_batched_tokens)
    async with VllmClient(options.url, options.api_key()) as client:
        facts = await read_facts(client, options.model, limits)
        requests = _requests(config, facts)
        check_lengths(client, facts, requests)
        with CountedProgress("requests", len(requests)) as progress:
            recorded = await replay(client, facts, requests, unseen_prompts(), options.tick_s, progress.advance)
    files = {
        "meta.json": json.dumps(_meta(config, facts, requests, recorded), indent=2) + "\n",
        "timeseries.csv": _timeseries_csv(recorded),
        "requests.jsonl": _requests_jsonl(config, requests, recorded),
    }
    for name, text in files.items():
        write_text(out / name, text)
    print(f"{len(requests):,} requests in {recorded.ticks[-1].t_s:.0f} s: {out}")
    if recorded.latest_send_s > LATE_SEND_S:
        print(
            f"the latest request was sent {recorded.latest_send_s:.3f} s after its arrival time: this machine is busy"
        )


def _requests(config: RecordConfig, facts: EngineFacts) -> RequestTable:
    workload = config.workload
    if len(workload.models) > 1:
        names = ", ".join(model.name for model in workload.models)
        raise ConfigError(f"'workload.models': one server serves one model (got {names})")
    if isinstance(workload, SyntheticWorkload) and getattr(workload.arrivals, "load", None) is not None:
        if config.options.profile is None:
            raise ConfigError(
                "'workload.arrivals.load' is a share of the server's capacity, which takes a profile=FILE of it; "
                "or give workload.arrivals.rate_per_s and ~workload.arrivals.load"
            )
        profile = read_profile(Path(config.options.profile))
        means = expected_lengths(workload)
        weights = np.array([entry.weight for entry in workload.mix])
        prompt, output, resident = np.average(np.array(means), axis=0, weights=weights)
        workload = resolve_load(workload, saturated_rate_per_s(profile, facts.engine, prompt, output, resident))
    return build_requests(workload, config.slo, config.options.seed)


def _requests_jsonl(config: RecordConfig, requests: RequestTable, recorded: Replay) -> str:
    names = [slo_class.name for slo_class in config.slo.classes]
    lines = []
    for index, (row, completion) in enumerate(zip(requests, recorded.completions, strict=True)):
        times = _times(completion)
        values = {
            "request_id": f"{config.workload.name}-{index}",
            "input_toks": int(row.prompt_tokens),
            "output_toks": len(completion.token_ids),
            "arrival_time": recorded.started_at_s + (completion.sent_s - recorded.start_s),
            **times,
            "cached_toks": completion.cached_prompt_tokens,
            "slo_class": names[int(row.slo_class)],
        }
        lines.append(json.dumps(values))
    return "\n".join(lines) + "\n"


def _times(completion: Completion) -> dict[str, float | None]:
    """The stamps of a request by this machine's monotonic clock.

    A server tells its engine's view only as durations, so the time of scheduling is counted back from the first
    token; without them it is not known.
    """
    first_token_s = completion.token_received_s[0]
    timings = completion.timings
    return {
        "queued_ts": completion.sent_s,
        "scheduled_ts": None if timings is None else max(completion.sent_s, first_token_s - timings.prefill_s),
        "first_token_ts": first_token_s,
        "last_token_ts": completion.token_received_s[-1],
    }


def _timeseries_csv(recorded: Replay) -> str:
    lines = ["t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct"]
    ticks = [tick for tick in recorded.ticks if tick.t_s >= 0]
    for before, tick in itertools.pairwise(ticks):
        elapsed_s = tick.t_s - before.t_s
        prompt_rate = (tick.prompt_tokens - before.prompt_tokens) / elapsed_s
        generation_rate = (tick.generated_tokens - before.generated_tokens) / elapsed_s
        lines.append(
            f"{tick.t_s:.3f},{prompt_rate:.1f},{generation_rate:.1f},{tick.running:.0f},{tick.waiting:.0f},"
            f"{100 * tick.kv_usage:.2f}"
        )
    return "\n".join(lines) + "\n"


def _meta(config: RecordConfig, facts: EngineFacts, requests: RequestTable, recorded: Replay) -> dict[str, Any]:
    engine = facts.engine
    return {
        "schema_version": 1,
        "model": facts.model,
        "vllm_version": facts.vllm_version,
        "engine_kwargs": {
            "model": facts.model,
            "max_num_seqs": engine.max_num_seqs,
            "max_num_batched_tokens": engine.max_num_batched_tokens,
            "max_model_len": facts.max_model_len,
        },
        "workload": config.workload.name,
        "workload_hash": workload_hash(requests),
        "seed": config.options.seed,
        "slo": config.slo.model_dump(mode="json"),
        "num_requests": len(requests),
        "num_preemptions": round(recorded.ticks[-1].preemptions - recorded.ticks[0].preemptions),
        "started_at": _utc(recorded.started_at_s),
        "finished_at": _utc(recorded.started_at_s + recorded.ticks[-1].t_s),
        "clock": "client",
        "latest_send_s": recorded.latest_send_s,
        "tick_seconds": config.options.tick_s,
        "kv_cache": {
            "num_gpu_blocks": engine.num_gpu_blocks,
            "block_size": engine.block_size,
            "enable_prefix_caching": engine.enable_prefix_caching,
            "num_kv_tokens": facts.num_gpu_blocks * engine.block_size,
        },
        "resolved_config": {
            "scheduler_config": dict(facts.scheduler_config),
            "cache_config": dict(facts.cache_config),
        },
    }


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
