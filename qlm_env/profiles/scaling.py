"""Step times of what was not measured, from a fitted neighbour.

Each coefficient belongs to one resource, and scales with what it moves or computes there. c0, c3 and c6 read
memory: c0 the weights, c3 the KV cache. c1, c2 and c4 compute: c1 and c2 with every parameter per token, c4
attention per pair of tokens. c5 is the engine's own work per sequence, and n0 a ratio of the device's
rates; both stay.
"""

from __future__ import annotations

from typing import NamedTuple

from qlm_env.profiles.hardware import Architecture, Device
from qlm_env.profiles.schema import StepTimeCoefficients


class ParallelEfficiency(NamedTuple):
    """Share of ``tp`` times a single GPU's speed that remains, for memory-bound and compute-bound work."""

    memory: float
    compute: float
    source: str


PARALLEL_EFFICIENCY = {
    ("A10", 2): ParallelEfficiency(
        0.90,
        0.80,
        "assumed: two all-reduces a layer over PCIe at 22 GB/s take about a sixth of a 13B model's prefill",
    ),
    ("A100", 4): ParallelEfficiency(
        0.93,
        0.74,
        "AIConfigurator fits of Llama-3.1-70B at tp=4 against Llama-3.1-8B at tp=1, per byte and parameter",
    ),
}


def scale_architecture(
    fitted: StepTimeCoefficients, source: Architecture, target: Architecture
) -> StepTimeCoefficients:
    """Coefficients of ``target`` on the instance where ``source`` was fitted."""
    parameters = target.parameters / source.parameters
    return fitted._replace(
        c0_s=fitted.c0_s * parameters,
        c1_s_per_token=fitted.c1_s_per_token * parameters,
        c2_s_per_token=fitted.c2_s_per_token * parameters,
        c3_s_per_kv_token=fitted.c3_s_per_kv_token * target.kv_bytes_per_token / source.kv_bytes_per_token,
        c6_s_per_mixed_kv_token=fitted.c6_s_per_mixed_kv_token * target.kv_bytes_per_token / source.kv_bytes_per_token,
        c4_s_per_token2=fitted.c4_s_per_token2 * target.attention_flops_per_token2 / source.attention_flops_per_token2,
    )


def scale_tp(fitted: StepTimeCoefficients, tp: int, efficiency: ParallelEfficiency) -> StepTimeCoefficients:
    """Coefficients on ``tp`` GPUs of what was fitted on one."""
    memory = tp * efficiency.memory
    compute = tp * efficiency.compute
    return fitted._replace(
        c0_s=fitted.c0_s / memory,
        c1_s_per_token=fitted.c1_s_per_token / compute,
        c2_s_per_token=fitted.c2_s_per_token / compute,
        c3_s_per_kv_token=fitted.c3_s_per_kv_token / memory,
        c6_s_per_mixed_kv_token=fitted.c6_s_per_mixed_kv_token / memory,
        c4_s_per_token2=fitted.c4_s_per_token2 / compute,
    )


def roofline(device: Device, architecture: Architecture, tp: int) -> StepTimeCoefficients:
    """The least c3 and c4 that the device's peak bandwidth and compute allow; the rest is 0."""
    return StepTimeCoefficients(
        c0_s=0.0,
        c1_s_per_token=0.0,
        n0_tokens=0.0,
        c2_s_per_token=0.0,
        c3_s_per_kv_token=architecture.kv_bytes_per_token / (tp * device.bandwidth_bytes_per_s),
        c4_s_per_token2=architecture.attention_flops_per_token2 / (tp * device.fp16_flops_per_s),
        c5_s_per_sequence=0.0,
    )
