"""The shipped profiles: what each is fitted to or estimated from, and the rules for its other numbers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlm_env.profiles.hardware import (
    ARCHITECTURES,
    DEVICES,
    GPU_MEMORY_UTILIZATION,
    RESERVE_BYTES_PER_GPU,
    Architecture,
    Device,
    num_gpu_blocks,
)
from qlm_env.profiles.least_squares import RegimeError, fit_step_time, held_out_predictions_s, regime_errors
from qlm_env.profiles.load import ProfileKey
from qlm_env.profiles.residency import ResidencyTimes
from qlm_env.profiles.scaling import PARALLEL_EFFICIENCY, roofline, scale_architecture, scale_tp
from qlm_env.profiles.schema import UNITS, Profile, Quantity, StepTimeCoefficients
from qlm_env.profiles.step_tables import StepTable, read_aegaeon, read_aiconfigurator


class Measurements(NamedTuple):
    """Where the steps of one profile come from: the table, and the names of model and device in it."""

    table: str
    model: str
    device: str


AEGAEON, AICONFIGURATOR = "Aegaeon", "AIConfigurator"

FITTED = {
    ProfileKey("A10", "llama-2-7b", 1): Measurements(AEGAEON, "llama2_7b", "A10"),
    ProfileKey("A100", "llama-2-7b", 1): Measurements(AEGAEON, "llama2_7b", "A100"),
    ProfileKey("A100", "llama-2-13b", 1): Measurements(AEGAEON, "llama2_13b_chat", "A100"),
    ProfileKey("A100", "llama-3.1-8b", 1): Measurements(AICONFIGURATOR, "meta-llama/Meta-Llama-3.1-8B", "a100_sxm"),
    ProfileKey("A100", "qwen3-32b", 2): Measurements(AICONFIGURATOR, "Qwen/Qwen3-32B", "a100_sxm"),
    ProfileKey("A100", "llama-3.1-70b", 4): Measurements(AICONFIGURATOR, "meta-llama/Meta-Llama-3.1-70B", "a100_sxm"),
}

ESTIMATED_FROM = {
    ProfileKey("A10", "llama-3.1-8b", 1): ProfileKey("A10", "llama-2-7b", 1),
    ProfileKey("A10", "llama-2-7b", 2): ProfileKey("A10", "llama-2-7b", 1),
    ProfileKey("A10", "llama-2-13b", 2): ProfileKey("A10", "llama-2-7b", 1),
    ProfileKey("A100", "llama-2-7b", 4): ProfileKey("A100", "llama-2-7b", 1),
    ProfileKey("A100", "llama-2-13b", 4): ProfileKey("A100", "llama-2-13b", 1),
}
"""Profiles without measurements, and the fitted neighbour each is scaled from."""

SPLIT_SEED = 0
"""Deals the rows of every table to folds."""

KV_SWAP_LINK_SHARE = 0.7
"""Of the PCIe rating, as KV cache transfers reach it."""

MEASURED_TRANSFER_TPS = (1, 4)
"""Where the sleep-mode measurements have an A100 instance."""


class Fit(NamedTuple):
    """Step-time coefficients of one profile and how well they predict steps they were not fitted to."""

    source: str
    table: StepTable
    coefficients: StepTimeCoefficients
    errors: dict[str, RegimeError]
    """Held out, by regime."""

    @property
    def mean_error(self) -> float:
        rows = sum(error.rows for error in self.errors.values())
        return sum(error.rows * error.mean for error in self.errors.values()) / rows


def fit_step_times(profiles_data: Path) -> dict[ProfileKey, Fit]:
    """Every fit of :data:`FITTED` from the tables in ``profiles_data``.

    Raises:
        ConfigError: a table is missing or lacks rows.
    """
    fits = {}
    for key, measurements in FITTED.items():
        if measurements.table == AEGAEON:
            table = read_aegaeon(profiles_data / "aegaeon_prefill_decode.csv", measurements.model, measurements.device)
            source = (
                f"fit to Aegaeon's measurements (SOSP 2025 artifact, Apache-2.0) of {measurements.model} on "
                f"{measurements.device}, fp16, eager"
            )
        else:
            table = read_aiconfigurator(
                profiles_data / "aiconfigurator_step_latency.csv",
                measurements.model,
                measurements.device,
                key.tp,
            )
            source = (
                f"fit to AIConfigurator 0.12.0 (Apache-2.0) predictions of vLLM steps of "
                f"{measurements.model} on {measurements.device}, tp={key.tp}"
            )
        at_least = roofline(DEVICES[key.device], ARCHITECTURES[key.architecture], key.tp)
        rng = np.random.default_rng(np.random.SeedSequence(SPLIT_SEED))
        predicted_s = held_out_predictions_s(table, at_least, rng)
        fits[key] = Fit(source, table, fit_step_time(table, at_least), regime_errors(table, predicted_s))
    return fits


def build_profiles(fits: dict[ProfileKey, Fit], residency: ResidencyTimes) -> dict[ProfileKey, Profile]:
    """Every shipped profile."""
    step_times = {key: _fitted_step_time(key, fit) for key, fit in fits.items()}
    step_times |= {key: _estimated_step_time(key, base, fits[base]) for key, base in ESTIMATED_FROM.items()}
    return {
        key: Profile(
            device=key.device,
            architecture=key.architecture,
            tp=key.tp,
            **(step_time | _memory(key) | _residency(key, residency)),
        )
        for key, step_time in step_times.items()
    }


def _fitted_step_time(key: ProfileKey, fit: Fit) -> dict[str, Quantity]:
    quantities = {
        name: _quantity(name, value, "fitted", fit.source, fit.mean_error)
        for name, value in fit.coefficients._asdict().items()
    }
    least = roofline(DEVICES[key.device], ARCHITECTURES[key.architecture], key.tp)
    for name, what in (("c3_s_per_kv_token", "memory bandwidth"), ("c4_s_per_token2", "fp16 compute")):
        value = getattr(least, name)
        if np.isclose(getattr(fit.coefficients, name), value, rtol=1e-6, atol=0.0):
            source = f"at the {key.device}'s peak {what}: the steps measured do not resolve this term"
            quantities[name] = _quantity(name, value, "estimated", source)
    return quantities


def _estimated_step_time(key: ProfileKey, base: ProfileKey, fit: Fit) -> dict[str, Quantity]:
    coefficients = fit.coefficients
    source = f"from the fit of {base.architecture} on {base.device} tp={base.tp}"
    if key.architecture != base.architecture:
        coefficients = scale_architecture(
            coefficients, ARCHITECTURES[base.architecture], ARCHITECTURES[key.architecture]
        )
        source += ": c0, c1 and c2 by parameters, c3 by KV bytes per token, c4 by attention work, n0 and c5 as is"
    if key.tp != base.tp:
        efficiency = PARALLEL_EFFICIENCY[key.device, key.tp]
        coefficients = scale_tp(coefficients, key.tp, efficiency)
        source += (
            f"; over {key.tp} GPUs at a parallel efficiency of {efficiency.memory:.2f} for c0 and c3 and "
            f"{efficiency.compute:.2f} for c1, c2 and c4 ({efficiency.source})"
        )
    return {name: _quantity(name, value, "estimated", source) for name, value in coefficients._asdict().items()}


def _memory(key: ProfileKey) -> dict[str, Quantity]:
    device, architecture = _hardware(key)
    configuration = f"from the published configuration of {architecture.name}: "
    numbers = {
        "weight_bytes": (architecture.weight_bytes, configuration + "2 bytes per parameter"),
        "kv_bytes_per_token": (
            architecture.kv_bytes_per_token,
            configuration + f"2 (K and V) x 2 bytes x {architecture.layers} layers x {architecture.kv_heads} KV heads "
            f"x {architecture.head_dim}",
        ),
        "num_gpu_blocks": (
            num_gpu_blocks(device, architecture, key.tp),
            f"({GPU_MEMORY_UTILIZATION} x {device.memory_bytes / 1e9:.2f}e9 B x tp - weight_bytes - "
            f"{RESERVE_BYTES_PER_GPU / 1e9:.2f}e9 B x tp for activations) / (16 x kv_bytes_per_token)",
        ),
        "context_tokens": (architecture.context_tokens, configuration + "max_position_embeddings"),
    }
    return {
        name: Quantity(value=value, unit=UNITS[name], kind="estimated", source=source)
        for name, (value, source) in numbers.items()
    }


def _residency(key: ProfileKey, times: ResidencyTimes) -> dict[str, Quantity]:
    device, architecture = _hardware(key)
    num_bytes = architecture.weight_bytes
    cold_start_s = times.cold_start.seconds(num_bytes)
    sleep_s = times.sleep.seconds(num_bytes, key.tp)
    borrowed = "" if key.device == "A100" else f"; taken over from A100: {key.device} has the same PCIe 4.0 x16 link"

    cold_start = _quantity(
        "cold_start_s",
        cold_start_s,
        "estimated" if borrowed else "fitted",
        f"{times.cold_start.base_s:.1f} s + weight_bytes / "
        f"{times.cold_start.storage_bytes_per_s / 1e9:.2f}e9 B/s, fit to vLLM 0.11 cold loads "
        f"(vLLM blog, 2025-10-26){borrowed}",
        None if borrowed else times.cold_start.fit_error,
    )
    transfers = {}
    for name, fit in (("wake_s", times.wake), ("sleep_s", times.sleep)):
        unmeasured = borrowed or (
            "" if key.tp in MEASURED_TRANSFER_TPS else f"; tp={key.tp} lies between those measured"
        )
        transfers[name] = _quantity(
            name,
            fit.seconds(num_bytes, key.tp),
            "estimated" if unmeasured else "fitted",
            f"{fit.base_s:.2f} s + weight_bytes / min(tp x {fit.link_bytes_per_s / 1e9:.1f}e9, "
            f"{fit.host_bytes_per_s / 1e9:.1f}e9) B/s, fit to vLLM 0.11 sleep mode, level 1 (vLLM blog, "
            f"2025-10-26){unmeasured}",
            None if unmeasured else fit.fit_error,
        )
    kv_swap = min(key.tp * KV_SWAP_LINK_SHARE * device.host_link_bytes_per_s, times.wake.host_bytes_per_s)
    return transfers | {
        "cold_start_s": cold_start,
        "stage_s": _quantity(
            "stage_s",
            cold_start_s + sleep_s,
            "estimated",
            "cold_start_s + sleep_s: vLLM warms a model by starting its process and putting it to sleep",
        ),
        "kv_swap_bytes_per_s": _quantity(
            "kv_swap_bytes_per_s",
            kv_swap,
            "estimated",
            f"min(tp x {KV_SWAP_LINK_SHARE} x {device.host_link_bytes_per_s / 1e9:.0f}e9, "
            f"{times.wake.host_bytes_per_s / 1e9:.1f}e9) B/s: a share of the PCIe rating per GPU, up to the "
            "rate at which four A100 woke from host memory",
        ),
    }


def _hardware(key: ProfileKey) -> tuple[Device, Architecture]:
    return DEVICES[key.device], ARCHITECTURES[key.architecture]


def _quantity(name: str, value: float, kind: str, source: str, fit_error: float | None = None) -> Quantity:
    """Rounded to four digits: beyond what any fit resolves, and so the same on every machine."""
    return Quantity.model_validate(
        {
            "value": float(f"{value:.4g}"),
            "unit": UNITS[name],
            "kind": kind,
            "source": source,
            "fit_error": None if fit_error is None else float(f"{fit_error:.2g}"),
        }
    )
