"""How a vLLM server is started: engine settings as command line and environment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DUMMY_WEIGHTS = "dummy"
"""The load format that makes weights up, for a model folder without any."""


@dataclass(frozen=True)
class LaunchSettings:
    """Settings of one server; names are vLLM's, and what is ``None`` is left to it."""

    max_model_len: int
    """Longest prompt + output, in tokens."""
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int | None = None
    num_gpu_blocks: int | None = None
    """KV blocks, vLLM's null block included."""
    dtype: str = "auto"
    load_format: str | None = None
    scheduling_policy: str = "fcfs"
    enable_prefix_caching: bool | None = None
    enforce_eager: bool = True
    """Neither compile nor capture graphs: what a CPU, or a test, wants."""
    kv_cache_gib: int | None = None
    """Memory for the KV cache of a CPU engine."""
    cpus: tuple[int, ...] | None = None
    """Cores that a CPU engine computes on."""
    gpus: tuple[int, ...] | None = None
    """Devices of a GPU engine; it runs tensor-parallel on all of them."""
    gpu_memory_utilization: float | None = None
    kv_offloading_gib: float | None = None
    """Host memory into which a GPU engine offloads KV."""
    sleep_mode: bool = False
    """Let a GPU engine sleep; a CPU engine takes the calls without it and frees nothing."""
    kv_store: Path | None = None
    """Folder into which vLLM's ``ExampleConnector`` writes KV."""
    arguments: tuple[str, ...] = ()
    """Further arguments, which come last."""
    environment: tuple[tuple[str, str], ...] = ()
    """Further variables."""


def arguments(settings: LaunchSettings) -> tuple[str, ...]:
    """The command line of vLLM's API server, less model, name and address."""
    values = {
        "load-format": settings.load_format,
        "max-model-len": settings.max_model_len,
        "max-num-seqs": settings.max_num_seqs,
        "max-num-batched-tokens": settings.max_num_batched_tokens,
        "block-size": settings.block_size,
        "num-gpu-blocks-override": settings.num_gpu_blocks,
        "dtype": settings.dtype,
        "scheduling-policy": settings.scheduling_policy,
        "gpu-memory-utilization": settings.gpu_memory_utilization,
        "kv-offloading-size": settings.kv_offloading_gib,
        "tensor-parallel-size": None if settings.gpus is None else len(settings.gpus),
        "kv-transfer-config": None if settings.kv_store is None else _example_connector(settings.kv_store),
    }
    flags = {
        "enforce-eager": settings.enforce_eager or None,
        "enable-sleep-mode": settings.sleep_mode or None,
        "enable-prefix-caching": settings.enable_prefix_caching,
    }
    return (
        *(word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))),
        *(f"--{name}" if on else f"--no-{name}" for name, on in flags.items() if on is not None),
        *("--enable-prompt-tokens-details", "--enable-per-request-metrics"),
        *settings.arguments,
    )


def environment(settings: LaunchSettings) -> tuple[tuple[str, str], ...]:
    """The variables of the process."""
    values = {
        # Endpoints for sleep, wake and the prefix cache, and the configuration that measuring asks for.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": settings.kv_cache_gib,
        "VLLM_CPU_OMP_THREADS_BIND": None if settings.cpus is None else ",".join(map(str, settings.cpus)),
        "CUDA_VISIBLE_DEVICES": None if settings.gpus is None else ",".join(map(str, settings.gpus)),
    }
    return (
        *((name, str(value)) for name, value in values.items() if value is not None),
        *settings.environment,
    )


def _example_connector(folder: Path) -> str:
    return json.dumps(
        {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        }
    )
