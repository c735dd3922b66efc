"""A small real cluster: two instances, four models with random weights of their own."""

from __future__ import annotations

import os
from pathlib import Path

from qlm_env.backends.vllm.backend import VllmBackend
from qlm_env.backends.vllm.instance import Patience
from qlm_env.backends.vllm.launch import LaunchSettings
from qlm_env.backends.vllm.local_servers import LocalModel, LocalServers
from qlm_env.backends.vllm.models import LlamaShape, write_random_llama
from qlm_env.cluster import make_cluster
from tests.backends.toy_cluster import KV_BYTES_PER_TOKEN, WEIGHT_BYTES, toy_scenario
from tests.profiles.toy import toy_profile, write_profile

NUM_MODELS = 4
BLOCK_SIZE = 32
NUM_BLOCKS = 46
"""For three requests of the longest kind, and vLLM's null block."""
SHAPE = LlamaShape(hidden_size=768, num_layers=16, num_heads=12, num_kv_heads=4, intermediate_size=2304)
"""Large enough that 200 tokens take seconds, so that a test can interrupt an answer: on two cores vLLM's processes,
which wait by spinning, keep each other from telling of tokens for a second at a time."""
KV_STORE_INSTANCE = 1
"""The one whose servers have a KV connector; the other keeps KV in its prefix cache."""


def real_backend(
    folder: Path, python: Path, patience: Patience | None = None, kv_store: Path | None = None
) -> VllmBackend:
    """The cluster that the conformance suite wants, on real servers.

    Host memory is counted by a profile of round numbers, and everything else is what the servers do.

    Args:
        kv_store: takes the folders of the KV connectors of KV_STORE_INSTANCE.
    """
    models = [LocalModel(f"m{m}", folder / f"m{m}") for m in range(NUM_MODELS)]
    for seed, model in enumerate(models):
        write_random_llama(model.folder, SHAPE, seed=seed)
    write_profile(folder, toy_profile(num_gpu_blocks=NUM_BLOCKS * BLOCK_SIZE / 16))
    engine = {"max_num_batched_tokens": 64, "block_size": BLOCK_SIZE, "num_gpu_blocks": NUM_BLOCKS}
    instance = {
        "host_memory_gb": 2.5 * WEIGHT_BYTES / 1e9,
        "host_kv_gb": 119.5 * KV_BYTES_PER_TOKEN / 1e9,
    }
    scenario = toy_scenario(num_models=NUM_MODELS, instances=[instance, instance], engine=engine)

    def settings(i: int, m: int) -> LaunchSettings:
        return LaunchSettings(
            max_model_len=512,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            block_size=BLOCK_SIZE,
            num_gpu_blocks=NUM_BLOCKS,
            dtype="float32",
            enable_prefix_caching=True,
            kv_cache_gib=1,
            cpus=(i % (os.cpu_count() or 1),),
            kv_store=None if kv_store is None or i != KV_STORE_INSTANCE else kv_store / f"{i}-{m}",
        )

    provider = LocalServers(models, python, folder / "logs", settings)
    return VllmBackend(
        provider, lambda: make_cluster(scenario.cluster, scenario.workload.models, folder), patience=patience
    )
