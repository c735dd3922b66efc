"""The numbers of a profile beside step times: memory, residency costs, power, each with the rule behind it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qlm_env.profiles.fitting import StepTimeFit
from qlm_env.profiles.hardware import (
    GPU_MEMORY_UTILIZATION,
    RESERVE_BYTES_PER_GPU,
    Architecture,
    Device,
    kv_blocks,
)
from qlm_env.profiles.power import BusyPower
from qlm_env.profiles.residency import DEVICE as RESIDENCY_DEVICE
from qlm_env.profiles.residency import HOST_LINK_BYTES_PER_S, ResidencyTimes, TransferTime
from qlm_env.profiles.scaling import roofline
from qlm_env.profiles.schema import OPTIONAL_UNITS, UNITS, Quantity, StepTimeCoefficients
from qlm_env.profiles.token_curve import TokenCurve

KV_SWAP_LINK_SHARE = 0.7
"""Of the PCIe rating, as KV cache transfers reach it."""

MEASURED_TRANSFER_TPS = (1, 4)
"""Where the sleep-mode measurements have an A100 instance."""

Quantities = dict[str, Quantity]


def rounded(value: float) -> float:
    """To four digits: beyond what any fit resolves, and so the same on every machine."""
    return float(f"{value:.4g}")


def quantity(name: str, value: float, kind: str, source: str, fit_error: float | None = None) -> Quantity:
    """A number with its unit; the value :func:`rounded`."""
    return Quantity.model_validate(
        {
            "value": rounded(value),
            "unit": (UNITS | OPTIONAL_UNITS)[name],
            "kind": kind,
            "source": source,
            "fit_error": None if fit_error is None else float(f"{fit_error:.2g}"),
        }
    )


def step_time(
    fit: StepTimeFit,
    source: str,
    device: Device | None,
    architecture: Architecture | None,
    tp: int,
) -> Quantities:
    """Fitted coefficients; one that stands at the device's peak rate is marked as that, an estimate."""
    coefficients = fit.coefficients
    quantities = {
        name: quantity(name, value, "fitted", source, fit.mean_error) for name, value in coefficients._asdict().items()
    }
    if fit.curve is not None:
        error = float(np.mean(np.abs(_summary_s(coefficients, fit.curve.tokens) / fit.curve.seconds - 1.0)))
        for name in SUMMARY:
            quantities[name] = quantity(name, getattr(coefficients, name), "fitted", "sums up token_curve", error)
    if "mixed" not in fit.errors:
        c6 = "c6_s_per_mixed_kv_token"
        quantities[c6] = quantity(c6, coefficients.c6_s_per_mixed_kv_token, "estimated", "no mixed step was measured")
    if device is None or architecture is None:
        return quantities
    least = roofline(device, architecture, tp)
    for name, what in (("c3_s_per_kv_token", "memory bandwidth"), ("c4_s_per_token2", "fp16 compute")):
        value = getattr(least, name)
        if np.isclose(getattr(coefficients, name), value, rtol=1e-6, atol=0.0):
            reason = f"at the {device.name}'s peak {what}: the steps measured do not resolve this term"
            quantities[name] = quantity(name, value, "estimated", reason)
    return quantities


SUMMARY = ("c0_s", "c1_s_per_token", "n0_tokens", "c2_s_per_token")
"""What a token curve takes the place of."""


def _summary_s(coefficients: StepTimeCoefficients, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    below, above = np.minimum(tokens, coefficients.n0_tokens), np.maximum(0.0, tokens - coefficients.n0_tokens)
    seconds: NDArray[np.float64] = (
        coefficients.c0_s + coefficients.c1_s_per_token * below + coefficients.c2_s_per_token * above
    )
    return seconds


def token_curve(fit: StepTimeFit, source: str) -> TokenCurve | None:
    """The curve of a fit that has one."""
    if fit.curve is None:
        return None
    return TokenCurve(
        tokens=tuple(int(tokens) for tokens in fit.curve.tokens),
        seconds=tuple(rounded(seconds) for seconds in fit.curve.seconds),
        chunk_s=rounded(fit.curve.chunk_s),
        kind="fitted",
        source=f"time outside attention as measured, raised by constants: {source}",
    )


def architecture_bytes(architecture: Architecture) -> Quantities:
    """Weights, KV cache per token, and context."""
    configuration = f"from the published configuration of {architecture.name}: "
    numbers = {
        "weight_bytes": (architecture.weight_bytes, configuration + "2 bytes per parameter"),
        "kv_bytes_per_token": (
            architecture.kv_bytes_per_token,
            configuration + f"2 (K and V) x 2 bytes x {architecture.layers} layers x {architecture.kv_heads} KV heads "
            f"x {architecture.head_dim}",
        ),
        "context_tokens": (architecture.context_tokens, configuration + "max_position_embeddings"),
    }
    return {
        name: Quantity(value=value, unit=UNITS[name], kind="estimated", source=source)
        for name, (value, source) in numbers.items()
    }


def blocks(device: Device, weight_bytes: float, kv_bytes_per_token: float, tp: int) -> Quantity:
    """KV blocks by vLLM's accounting; of value 0 where the weights leave no room for any."""
    return Quantity(
        value=max(0, kv_blocks(device, weight_bytes, kv_bytes_per_token, tp)),
        unit=UNITS["num_gpu_blocks"],
        kind="estimated",
        source=f"({GPU_MEMORY_UTILIZATION} x {device.memory_bytes / 1e9:.2f}e9 B x tp - weight_bytes - "
        f"{RESERVE_BYTES_PER_GPU / 1e9:.2f}e9 B x tp for activations) / (16 x kv_bytes_per_token)",
    )


def residency(device: Device, weight_bytes: float, tp: int, times: ResidencyTimes) -> Quantities:
    """Cold start, staging, wake, sleep and KV swap.

    Measured on A100. Another device takes the same rules over, with transfers between host and GPU faster by
    the ratio of its PCIe rating to the A100's.
    """
    faster = device.host_link_bytes_per_s / HOST_LINK_BYTES_PER_S
    wake, sleep = times.wake.faster(faster), times.sleep.faster(faster)
    cold_start_s, sleep_s = times.cold_start.seconds(weight_bytes), sleep.seconds(weight_bytes, tp)
    borrowed = ""
    if device.name != RESIDENCY_DEVICE:
        borrowed = f"; taken over from A100: {device.name} has the same PCIe 4.0 x16 link"
        if faster != 1.0:
            borrowed = f"; taken over from A100, bandwidths x {faster:g} for the PCIe 5.0 x16 link of {device.name}"

    kv_swap = min(tp * KV_SWAP_LINK_SHARE * device.host_link_bytes_per_s, wake.host_bytes_per_s)
    return {
        "wake_s": _transfer("wake_s", wake, weight_bytes, tp, borrowed),
        "sleep_s": _transfer("sleep_s", sleep, weight_bytes, tp, borrowed),
        "cold_start_s": quantity(
            "cold_start_s",
            cold_start_s,
            "estimated" if borrowed else "fitted",
            f"{times.cold_start.base_s:.1f} s + weight_bytes / "
            f"{times.cold_start.storage_bytes_per_s / 1e9:.2f}e9 B/s, fit to vLLM 0.11 cold loads "
            f"(vLLM blog, 2025-10-26){'; taken over from A100' if faster != 1.0 else borrowed}",
            None if borrowed else times.cold_start.fit_error,
        ),
        "stage_s": quantity(
            "stage_s",
            cold_start_s + sleep_s,
            "estimated",
            "cold_start_s + sleep_s: vLLM warms a model by starting its process and putting it to sleep",
        ),
        "kv_swap_bytes_per_s": quantity(
            "kv_swap_bytes_per_s",
            kv_swap,
            "estimated",
            f"min(tp x {KV_SWAP_LINK_SHARE} x {device.host_link_bytes_per_s / 1e9:.0f}e9, "
            f"{wake.host_bytes_per_s / 1e9:.1f}e9) B/s: a share of the PCIe rating per GPU, up to the "
            f"rate at which four A100 woke from host memory{f', x {faster:g}' if faster != 1.0 else ''}",
        ),
    }


def power(device: Device, tp: int, busy: BusyPower) -> Quantities:
    """The board's limit, and what serving takes of it."""
    share, measured_tp = busy.share(tp)
    return {
        "peak_power_w": quantity(
            "peak_power_w",
            tp * device.board_power_w,
            "estimated",
            f"tp x {device.board_power_w:g} W, the board's power limit by its maker's datasheet",
        ),
        "busy_power_w": quantity(
            "busy_power_w",
            tp * share * device.board_power_w,
            "estimated",
            f"tp x {share:.2f} x {device.board_power_w:g} W; {busy.source} at tp={measured_tp}",
        ),
    }


def _transfer(name: str, fit: TransferTime, weight_bytes: float, tp: int, borrowed: str) -> Quantity:
    unmeasured = borrowed or ("" if tp in MEASURED_TRANSFER_TPS else f"; tp={tp} lies between those measured")
    return quantity(
        name,
        fit.seconds(weight_bytes, tp),
        "estimated" if unmeasured else "fitted",
        f"{fit.base_s:.2f} s + weight_bytes / min(tp x {fit.link_bytes_per_s / 1e9:.1f}e9, "
        f"{fit.host_bytes_per_s / 1e9:.1f}e9) B/s, fit to vLLM 0.11 sleep mode, level 1 (vLLM blog, "
        f"2025-10-26){unmeasured}",
        None if unmeasured else fit.fit_error,
    )
