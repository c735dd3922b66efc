"""What a running server tells about its engine: ``/v1/models``, ``/metrics``, ``/version`` and ``/server_info``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.errors import RequestRefused, ServerError
from qlm_env.spec import EngineSpec, Spec, parse

CACHE_INFO = "vllm:cache_config_info"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
PROMPT_TOKENS = "vllm:prompt_tokens_total"
GENERATED_TOKENS = "vllm:generation_tokens_total"
PREEMPTIONS = "vllm:num_preemptions_total"

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>[-+.\w]+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Sample(NamedTuple):
    """One line of Prometheus text."""

    labels: Mapping[str, str]
    value: float


def parse_metrics(text: str) -> dict[str, list[Sample]]:
    """The samples of Prometheus text by metric name; lines that are no samples are left out."""
    samples: dict[str, list[Sample]] = {}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        with contextlib.suppress(ValueError):
            if found is not None:
                labels = dict(_LABEL.findall(found["labels"] or ""))
                samples.setdefault(found["name"], []).append(Sample(labels, float(found["value"])))
    return samples


def metric_sum(samples: Mapping[str, list[Sample]], name: str) -> float:
    """The value of a metric, summed over its labels; 0 where the server does not have it."""
    return sum(sample.value for sample in samples.get(name, ()))


class EngineLimits(Spec):
    """Engine settings that a server tells only in its development mode, and a user may have to give."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


@dataclass(frozen=True)
class EngineFacts:
    """A served model and the settings of its engine."""

    model: str
    """The name requests have to use."""
    model_path: str
    max_model_len: int
    """Longest prompt + output, in tokens."""
    vllm_version: str
    engine: EngineSpec
    scheduler_config: Mapping[str, Any]
    """vLLM's own section, as far as it tells."""
    cache_config: Mapping[str, Any]

    @property
    def num_gpu_blocks(self) -> int:
        assert self.engine.num_gpu_blocks is not None
        return self.engine.num_gpu_blocks


async def read_facts(client: VllmClient, model: str | None, limits: EngineLimits | None = None) -> EngineFacts:
    """Ask a server what it serves and how.

    Args:
        model: the name it must serve; ``None`` takes the one it serves.
        limits: used where the server does not tell (it does with ``VLLM_SERVER_DEV_MODE=1``).

    Raises:
        ServerError: nothing answers, it is no vLLM server, serves another model, lacks an endpoint, or does not
            tell a setting that ``limits`` does not give either.
    """
    limits = EngineLimits() if limits is None else limits
    served = _served_model(client, await client.get_json("/v1/models"), model)
    cache = _cache_info(client, await client.get_text("/metrics"))
    config = await _resolved_config(client)
    scheduler = dict(config.get("scheduler_config", {}))
    for name, given in limits:
        if given is not None:
            scheduler[name] = given
        elif name not in scheduler:
            raise ServerError(
                f"{client.url} does not tell its {name} (it does with VLLM_SERVER_DEV_MODE=1); give {name}=..."
            )
    engine = parse(
        EngineSpec,
        {
            "max_num_seqs": scheduler["max_num_seqs"],
            "max_num_batched_tokens": scheduler["max_num_batched_tokens"],
            "block_size": int(cache["block_size"]),
            "num_gpu_blocks": int(cache["num_gpu_blocks"]),
            "enable_prefix_caching": cache.get("enable_prefix_caching") == "True",
            "enable_chunked_prefill": scheduler.get("enable_chunked_prefill", True),
            "async_scheduling": scheduler.get("async_scheduling", False),
            "scheduling_policy": scheduler.get("policy", "fcfs"),
        },
        prefix="engine",
    )
    return EngineFacts(
        model=served["id"],
        model_path=served.get("root") or served["id"],
        max_model_len=int(served["max_model_len"]),
        vllm_version=str((await client.get_json("/version")).get("version", "unknown")),
        engine=engine,
        scheduler_config=scheduler,
        cache_config=config.get("cache_config", {}),
    )


def _served_model(client: VllmClient, answer: Any, model: str | None) -> dict[str, Any]:
    try:
        served = {entry["id"]: entry for entry in answer["data"]}
        chosen = next(iter(served)) if model is None else model
        if chosen not in served:
            raise ServerError(f"'model': {client.url} does not serve {chosen}; it serves {', '.join(served)}")
        entry: dict[str, Any] = served[chosen]
        _ = entry["max_model_len"]
    except (KeyError, TypeError, StopIteration):
        raise ServerError(f"{client.url}/v1/models does not answer as vLLM does: is this a vLLM server?") from None
    return entry


def _cache_info(client: VllmClient, text: str) -> Mapping[str, str]:
    found = parse_metrics(text).get(CACHE_INFO)
    if not found:
        raise ServerError(f"{client.url}/metrics has no {CACHE_INFO}: is this a vLLM server?")
    labels = found[0].labels
    for name in ("block_size", "num_gpu_blocks"):
        if not labels.get(name, "").isdecimal():
            raise ServerError(f"{client.url}/metrics: {CACHE_INFO} tells no {name}")
    return labels


async def _resolved_config(client: VllmClient) -> dict[str, Any]:
    """vLLM's resolved configuration; empty without its development mode."""
    try:
        answer = await client.get_json("/server_info?config_format=json")
    except RequestRefused as error:
        if error.status == 404:
            return {}
        raise
    config = answer.get("vllm_config")
    return config if isinstance(config, dict) else {}
