"""``meta.json`` of a recorded run: the engine's settings, each with the place it was found in.

What vLLM resolved (``resolved_config``, ``kv_cache``) goes before what it was asked for (``engine_kwargs``), and that
before vLLM's defaults. Runs recorded by older tools have ``engine_kwargs`` alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlm_env.fidelity.run_error import RunError
from qlm_env.spec import ConfigError, EngineSpec, SloSpec, parse

PLACES: dict[str, tuple[tuple[str, ...], ...]] = {
    "max_num_seqs": (
        ("resolved_config", "scheduler_config", "max_num_seqs"),
        ("engine_kwargs", "max_num_seqs"),
    ),
    "max_num_batched_tokens": (
        ("resolved_config", "scheduler_config", "max_num_batched_tokens"),
        ("engine_kwargs", "max_num_batched_tokens"),
    ),
    "block_size": (
        ("kv_cache", "block_size"),
        ("resolved_config", "cache_config", "block_size"),
        ("engine_kwargs", "block_size"),
    ),
    "num_gpu_blocks": (
        ("kv_cache", "num_gpu_blocks"),
        ("resolved_config", "cache_config", "num_gpu_blocks"),
        ("engine_kwargs", "num_gpu_blocks_override"),
    ),
    "enable_chunked_prefill": (
        ("resolved_config", "scheduler_config", "enable_chunked_prefill"),
        ("engine_kwargs", "enable_chunked_prefill"),
    ),
    "enable_prefix_caching": (
        ("kv_cache", "enable_prefix_caching"),
        ("resolved_config", "cache_config", "enable_prefix_caching"),
        ("engine_kwargs", "enable_prefix_caching"),
    ),
    "async_scheduling": (
        ("resolved_config", "scheduler_config", "async_scheduling"),
        ("engine_kwargs", "async_scheduling"),
    ),
    "scheduling_policy": (
        ("resolved_config", "scheduler_config", "policy"),
        ("engine_kwargs", "scheduling_policy"),
    ),
}
"""Each setting of the emulated engine, and where in ``meta.json`` it may stand, the most telling place first."""

REQUIRED = ("max_num_seqs", "max_num_batched_tokens")
"""vLLM's defaults for these depend on the machine it ran on."""

ASYNC_BY_DEFAULT_SINCE = (0, 14)
"""The vLLM version since which each step is scheduled while the one before it runs."""


@dataclass(frozen=True)
class RecordedEngine:
    """A real engine: what it served and how it was set up."""

    model: str
    vllm_version: str
    device_name: str | None
    """As the driver names the GPU."""
    tp: int
    settings: EngineSpec
    origins: Mapping[str, str]
    """Where each setting was found: a dotted path into ``meta.json``, or a default."""
    slo: SloSpec | None
    """The SLO classes that its requests name; ``None`` where the run does not tell them."""


def read_engine(path: Path) -> RecordedEngine:
    """The engine that ``path``, a ``meta.json``, describes.

    Raises:
        ConfigError: the file cannot be read, is no JSON object, lacks a setting that has no default, or gives one that
            cannot be; one line with the file and the setting.
    """
    meta = _read(path)
    version = str(meta.get("vllm_version", "unknown"))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting, places in PLACES.items():
        for place in places:
            found = _at(meta, place)
            if found is not None:
                values[setting], origins[setting] = found, ".".join(place)
                break
        else:
            if setting in REQUIRED:
                looked_in = " or ".join(".".join(place) for place in places)
                raise RunError(path, f"lacks {setting} (looked in {looked_in})")
            values[setting], origins[setting] = _default(setting, version)
    try:
        settings = parse(EngineSpec, values)
        slo = parse(SloSpec, meta["slo"], "slo") if "slo" in meta else None
    except ConfigError as error:
        raise RunError(path, str(error)) from None
    tp = _at(meta, ("engine_kwargs", "tensor_parallel_size"))
    if tp is None:
        tp = 1
    if type(tp) is not int or tp < 1:
        raise RunError(path, f"{json.dumps(tp)} is not a count of GPUs", field="engine_kwargs.tensor_parallel_size")
    device = _at(meta, ("hardware", "device_name"))
    return RecordedEngine(
        model=str(meta.get("model", "unknown")),
        vllm_version=version,
        device_name=None if device is None else str(device),
        tp=tp,
        settings=settings,
        origins=origins,
        slo=slo,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(path, error.strerror or str(error)) from None
    except ValueError:
        raise RunError(path, "is not JSON") from None
    if not isinstance(meta, dict):
        raise RunError(path, "is not a JSON object")
    return meta


def _at(values: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        if not isinstance(values, dict):
            return None
        values = values.get(name)
    return values


def _default(setting: str, vllm_version: str) -> tuple[Any, str]:
    """vLLM's own default where it differs from that of :class:`EngineSpec`, and what to call it."""
    if setting == "num_gpu_blocks":
        return None, "the profile's own block count"
    if setting == "enable_prefix_caching":
        return True, "vLLM's default"
    if setting == "async_scheduling":
        numbers = re.match(r"(\d+)\.(\d+)", vllm_version)
        recent = numbers is not None and (int(numbers[1]), int(numbers[2])) >= ASYNC_BY_DEFAULT_SINCE
        return recent, f"the default of vLLM {vllm_version}"
    return EngineSpec.model_fields[setting].default, "vLLM's default"
