"""Published facts about devices and model architectures, from which profiles derive bytes and bounds."""

from __future__ import annotations

from typing import NamedTuple

from qlm_env.profiles.schema import BLOCK_TOKENS

GIB = 2**30


PCIE_4 = 32e9
PCIE_5 = 64e9
"""Sixteen lanes, one direction."""


class Collective(NamedTuple):
    """An all-reduce over the GPUs of an instance: between two, ``latency + bytes / bandwidth``."""

    latency_s: float
    bytes_per_s: float
    source: str


def rated_collective(peer_link_bytes_per_s: float) -> Collective:
    """An estimate from the rating of a GPU's links to the others, one direction."""
    return Collective(
        8.6e-6,
        0.7 * peer_link_bytes_per_s,
        "estimated: 8.6 us, a small message in NCCL's cost model (ring, LL protocol: 6.6 us and 1.0 us for each of two "
        "steps), and 0.7 of the links' rating",
    )


class Device(NamedTuple):
    """One GPU. Rates are its maker's peaks, so a measured cost below them is an artefact of the data."""

    name: str
    memory_bytes: float
    """What CUDA reports as the device's total memory, which is what vLLM takes its share of."""
    bandwidth_bytes_per_s: float
    fp16_flops_per_s: float
    """Dense tensor-core peak with 32-bit accumulation."""
    host_link_bytes_per_s: float
    """PCIe rating, one direction."""
    collective: Collective
    """Over NVLink where the device has it, else over PCIe."""
    board_power_w: float
    """The maker's limit for the whole board."""


# Two of them, over PCIe 5.0. After the host's ACS and IOMMU were switched off, large messages went at 36 GB/s; the
# layer times that go with this device were measured before that.
RTXPRO6000_COLLECTIVE = Collective(
    13.2e-6,
    15.92e9,
    "measured: LLMServingSim 2.0 (MIT), profiler/perf/RTXPRO6000/hardware.yaml of 2026-09-08, NCCL replayed from a "
    "CUDA graph",
)

DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A10 datasheet; 22.18 GiB visible with ECC on.
        Device("A10", 22.18 * GIB, 600e9, 125e12, PCIE_4, rated_collective(PCIE_4), 150.0),
        # NVIDIA A100 80GB SXM datasheet; 79.25 GiB visible.
        Device("A100", 79.25 * GIB, 2039e9, 312e12, PCIE_4, rated_collective(300e9), 400.0),
        # NVIDIA H100 SXM datasheet; 79.11 GiB visible.
        Device("H100", 79.11 * GIB, 3350e9, 989e12, PCIE_5, rated_collective(450e9), 700.0),
        # NVIDIA H200 SXM datasheet; 139.8 GiB visible.
        Device("H200", 139.8 * GIB, 4800e9, 989e12, PCIE_5, rated_collective(450e9), 700.0),
        # An H100 SXM with 400 GB/s of NVLink.
        Device("H800", 79.11 * GIB, 3350e9, 989e12, PCIE_5, rated_collective(200e9), 700.0),
        # NVIDIA L40S datasheet; 44.4 GiB visible with ECC on.
        Device("L40S", 44.4 * GIB, 864e9, 362e12, PCIE_4, rated_collective(PCIE_4), 350.0),
        # NVIDIA Ada GPU architecture whitepaper; its peak is that of the rated boost clock, which cards exceed.
        Device("RTX4090", 25_250_627_584, 1008e9, 165.2e12, PCIE_4, rated_collective(PCIE_4), 450.0),
        # NVIDIA RTX PRO 6000 Blackwell Server Edition datasheet; 94.97 GiB visible.
        Device("RTXPRO6000", 94.97 * GIB, 1597.6e9, 480e12, PCIE_5, RTXPRO6000_COLLECTIVE, 600.0),
    )
}


class Architecture(NamedTuple):
    """A dense decoder-only transformer in 16-bit weights; numbers from its published configuration."""

    name: str
    parameters: int
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
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

    @property
    def linear_parameters(self) -> dict[str, int]:
        """Weights of each linear layer by vLLM's name for it: four in every transformer layer, and the head."""
        return {
            "qkv_proj": self.hidden_size * (self.heads + 2 * self.kv_heads) * self.head_dim,
            "o_proj": self.hidden_size * self.heads * self.head_dim,
            "gate_up_proj": self.hidden_size * 2 * self.intermediate_size,
            "down_proj": self.hidden_size * self.intermediate_size,
            "lm_head": self.hidden_size * self.vocab_size,
        }

    @property
    def parameters_per_token(self) -> int:
        """Weights that every token is multiplied with: the transformer layers, not the embedding or the head."""
        return self.layers * sum(count for name, count in self.linear_parameters.items() if name != "lm_head")


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama-2-7b", 6_738_415_616, 32, 4096, 11_008, 32, 32, 128, 32_000, 4096),
        Architecture("llama-2-13b", 13_015_864_320, 40, 5120, 13_824, 40, 40, 128, 32_000, 4096),
        # Llama-2-13B, fine-tuned.
        Architecture("vicuna-13b", 13_015_864_320, 40, 5120, 13_824, 40, 40, 128, 32_000, 4096),
        Architecture("llama-3.1-8b", 8_030_261_248, 32, 4096, 14_336, 32, 8, 128, 128_256, 131_072),
        Architecture("llama-3.1-70b", 70_553_706_496, 80, 8192, 28_672, 64, 8, 128, 128_256, 131_072),
        Architecture("mistral-7b", 7_241_732_096, 32, 4096, 14_336, 32, 8, 128, 32_000, 32_768),
        Architecture("qwen-7b", 7_721_324_544, 32, 4096, 11_008, 32, 32, 128, 151_936, 8192),
        Architecture("qwen-14b", 14_167_290_880, 40, 5120, 13_696, 40, 40, 128, 152_064, 8192),
        Architecture("qwen1.5-14b", 14_167_290_880, 40, 5120, 13_696, 40, 40, 128, 152_064, 32_768),
        Architecture("qwen2.5-7b", 7_615_616_512, 28, 3584, 18_944, 28, 4, 128, 152_064, 131_072),
        Architecture("qwen3-8b", 8_190_735_360, 36, 4096, 12_288, 32, 8, 128, 151_936, 40_960),
        Architecture("qwen3-14b", 14_768_307_200, 40, 5120, 17_408, 40, 8, 128, 151_936, 40_960),
        Architecture("qwen3-32b", 32_762_123_264, 64, 5120, 25_600, 64, 8, 128, 151_936, 40_960),
        Architecture("yi-1.5-6b", 6_061_035_520, 32, 4096, 11_008, 32, 4, 128, 64_000, 4096),
        Architecture("yi-1.5-9b", 8_829_407_232, 48, 4096, 11_008, 32, 4, 128, 64_000, 4096),
        Architecture("internlm2.5-7b", 7_737_708_544, 32, 4096, 14_336, 32, 8, 128, 92_544, 32_768),
        Architecture("baichuan-7b", 7_000_559_616, 32, 4096, 11_008, 32, 32, 128, 64_000, 4096),
        Architecture("baichuan2-13b", 13_896_668_160, 40, 5120, 13_696, 40, 40, 128, 125_696, 4096),
    )
}

GPU_MEMORY_UTILIZATION = 0.9
"""vLLM's default share of device memory."""

RESERVE_BYTES_PER_GPU = 1.24e9
"""Activations and CUDA graphs, per GPU: what vLLM 0.19 kept back on an RTX 4090 with Llama-3.1-8B and a token
budget of 2,048 (2,588 KV blocks out of 0.9 x 25,250,627,584 bytes; LLMServingSim 2.0 bench/examples, MIT)."""


def kv_blocks(device: Device, weight_bytes: float, kv_bytes_per_token: float, tp: int) -> int:
    """KV blocks of 16 tokens that vLLM would allocate on ``tp`` GPUs; not positive where the weights do not fit.

    The rule gives 7,375 for Llama-2-7B on one A100; vLLM reported 7,351 (vllm-project/vllm#2031).
    """
    available = tp * (GPU_MEMORY_UTILIZATION * device.memory_bytes - RESERVE_BYTES_PER_GPU)
    return int((available - weight_bytes) // (BLOCK_TOKENS * kv_bytes_per_token))


def num_gpu_blocks(device: Device, architecture: Architecture, tp: int) -> int:
    """:func:`kv_blocks` of an architecture."""
    return kv_blocks(device, architecture.weight_bytes, architecture.kv_bytes_per_token, tp)
