"""Published facts about devices and model architectures, from which profiles derive bytes and bounds."""

from __future__ import annotations

from typing import NamedTuple

from qlm_env.profiles.schema import BLOCK_TOKENS

GIB = 2**30


class Device(NamedTuple):
    """One GPU. Rates are its maker's peaks, so a measured cost below them is an artefact of the data."""

    name: str
    memory_bytes: float
    """What CUDA reports as the device's total memory, which is what vLLM takes its share of."""
    bandwidth_bytes_per_s: float
    fp16_flops_per_s: float
    """Dense tensor-core peak."""
    host_link_bytes_per_s: float
    """PCIe rating, one direction."""


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A10 datasheet; 22.18 GiB visible with ECC on.
        Device("A10", 22.18 * GIB, 600e9, 125e12, 32e9),
        # NVIDIA A100 80GB SXM datasheet; 79.25 GiB visible.
        Device("A100", 79.25 * GIB, 2039e9, 312e12, 32e9),
    )
}


class Architecture(NamedTuple):
    """A decoder-only transformer in 16-bit weights; numbers from its published configuration."""

    name: str
    parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int

    @property
    def weight_bytes(self) -> int:
        return 2 * self.parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """A 16-bit key and value per layer and KV head."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def attention_flops_per_token2(self) -> int:
        """Of one query against one key: a multiply-add for the score and one for the value, per dimension."""
        return 4 * self.layers * self.heads * self.head_dim


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama-2-7b", 6_738_415_616, 32, 32, 32, 128, 4096),
        Architecture("llama-2-13b", 13_015_864_320, 40, 40, 40, 128, 4096),
        Architecture("llama-3.1-8b", 8_030_261_248, 32, 32, 8, 128, 131_072),
        Architecture("qwen3-32b", 32_762_123_264, 64, 64, 8, 128, 40_960),
        Architecture("llama-3.1-70b", 70_553_706_496, 80, 64, 8, 128, 131_072),
    )
}

GPU_MEMORY_UTILIZATION = 0.9
"""vLLM's default share of device memory."""

RESERVE_BYTES_PER_GPU = 1.24e9
"""Activations and CUDA graphs, per GPU: what vLLM 0.19 kept back on an RTX 4090 with Llama-3.1-8B and a token
budget of 2,048 (2,588 KV blocks out of 0.9 x 25,250,627,584 bytes; LLMServingSim 2.0 bench/examples, MIT)."""


def num_gpu_blocks(device: Device, architecture: Architecture, tp: int) -> int:
    """KV blocks of 16 tokens that vLLM would allocate; not positive where the model does not fit.

    The rule gives 7,375 for Llama-2-7B on one A100; vLLM reported 7,351 (vllm-project/vllm#2031).
    """
    available = tp * (GPU_MEMORY_UTILIZATION * device.memory_bytes - RESERVE_BYTES_PER_GPU)
    return int((available - architecture.weight_bytes) // (BLOCK_TOKENS * architecture.kv_bytes_per_token))
