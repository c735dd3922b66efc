"""The shipped profiles: what each is fitted to or estimated from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlm_env.profiles import quantities
from qlm_env.profiles.fitting import SPLIT_SEED, StepTimeFit, fit_table
from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES, num_gpu_blocks
from qlm_env.profiles.layerwise import compose_steps, measured_token_curve, read_layer_times
from qlm_env.profiles.load import ProfileKey
from qlm_env.profiles.power import BusyPower
from qlm_env.profiles.quantities import Quantities, quantity, rounded
from qlm_env.profiles.residency import ResidencyTimes
from qlm_env.profiles.scaling import PARALLEL_EFFICIENCY, roofline, scale_architecture, scale_tp
from qlm_env.profiles.schema import BLOCK_TOKENS, Profile
from qlm_env.profiles.step_tables import StepTable, read_step_table
from qlm_env.profiles.token_curve import Knots, TokenCurve

AEGAEON, AICONFIGURATOR, LAYERWISE = "Aegaeon", "AIConfigurator", "vLLM layers"


class Measurements(NamedTuple):
    """Where the steps of one profile come from: the table, and the names of model and device in it."""

    table: str
    model: str
    device: str


def _aegaeon(device: str, models: Mapping[str, str]) -> dict[ProfileKey, Measurements]:
    return {
        ProfileKey(device, architecture, 1): Measurements(AEGAEON, model, device)
        for architecture, model in models.items()
    }


def _aiconfigurator(device: str, system: str) -> dict[ProfileKey, Measurements]:
    return {
        ProfileKey(device, "llama-3.1-8b", 1): Measurements(AICONFIGURATOR, "meta-llama/Meta-Llama-3.1-8B", system),
        ProfileKey(device, "qwen3-8b", 1): Measurements(AICONFIGURATOR, "Qwen/Qwen3-8B", system),
        ProfileKey(device, "qwen3-32b", 2): Measurements(AICONFIGURATOR, "Qwen/Qwen3-32B", system),
        ProfileKey(device, "llama-3.1-70b", 4): Measurements(AICONFIGURATOR, "meta-llama/Meta-Llama-3.1-70B", system),
    }


# Aegaeon's other models are no text-only dense ones, or (qwen_7b) share their architecture with one listed. Yi-1.5-6B
# on H800 is left out: its repeats differ by a fifth, and a token costs more the more of them a prefill has.
FITTED = (
    _aegaeon(
        "A10",
        {
            "llama-2-7b": "llama2_7b",
            "qwen2.5-7b": "qwen2_5_7b",
            "qwen-7b": "qwen_7b_chat",
            "yi-1.5-6b": "yi1_5_6b_chat",
        },
    )
    | _aegaeon(
        "A100",
        {
            "llama-2-7b": "llama2_7b",
            "llama-2-13b": "llama2_13b_chat",
            "qwen2.5-7b": "qwen2_5_7b",
            "qwen-7b": "qwen_7b_chat",
            "yi-1.5-6b": "yi1_5_6b_chat",
            "yi-1.5-9b": "yi1_5_9b_chat",
            "internlm2.5-7b": "internlm2_5_7b_chat",
        },
    )
    | _aegaeon(
        "H100",
        {"llama-2-13b": "llama2_13b_chat", "qwen2.5-7b": "qwen2_5_7b", "yi-1.5-9b": "yi1_5_9b_chat"},
    )
    | _aegaeon(
        "H800",
        {
            "llama-2-7b": "llama2_7b",
            "llama-2-13b": "llama2_13b_chat",
            "qwen2.5-7b": "qwen2_5_7b",
            "qwen-7b": "qwen_7b_chat",
            "qwen-14b": "qwen_14b_chat",
            "qwen1.5-14b": "qwen1_5_14b_chat",
            "yi-1.5-9b": "yi1_5_9b_chat",
            "internlm2.5-7b": "internlm2_5_7b_chat",
            "baichuan-7b": "baichuan_7b",
            "baichuan2-13b": "baichuan2_13b_chat",
        },
    )
    | _aiconfigurator("A100", "a100_sxm")
    | _aiconfigurator("H100", "h100_sxm")
    | _aiconfigurator("H200", "h200_sxm")
    | _aiconfigurator("L40S", "l40s")
    | {
        ProfileKey("RTX4090", "llama-3.1-8b", 1): Measurements(LAYERWISE, "meta-llama/Llama-3.1-8B", "RTX4090"),
        ProfileKey("RTXPRO6000", "qwen3-32b", 1): Measurements(LAYERWISE, "Qwen/Qwen3-32B", "RTXPRO6000"),
        ProfileKey("RTXPRO6000", "qwen3-32b", 2): Measurements(LAYERWISE, "Qwen/Qwen3-32B", "RTXPRO6000"),
    }
)


def _from(device: str, tp: int, base: str, *architectures: str, base_tp: int = 1) -> dict[ProfileKey, ProfileKey]:
    return {ProfileKey(device, architecture, tp): ProfileKey(device, base, base_tp) for architecture in architectures}


ESTIMATED_FROM = (
    _from("A10", 1, "llama-2-7b", "llama-3.1-8b", "mistral-7b")
    | _from("A10", 2, "llama-2-7b", "llama-2-7b", "llama-2-13b", "vicuna-13b")
    | _from("A100", 1, "llama-2-13b", "vicuna-13b")
    | _from("A100", 1, "llama-3.1-8b", "mistral-7b")
    | _from("A100", 1, "qwen3-8b", "qwen3-14b")
    | _from("A100", 4, "llama-2-7b", "llama-2-7b")
    | _from("A100", 4, "llama-2-13b", "llama-2-13b", "vicuna-13b")
    | _from("H100", 1, "llama-2-13b", "llama-2-7b", "vicuna-13b")
    | _from("H100", 1, "llama-3.1-8b", "mistral-7b")
    | _from("H100", 1, "qwen3-8b", "qwen3-14b")
    | _from("H200", 1, "llama-3.1-8b", "mistral-7b", "llama-2-7b", "llama-2-13b", "vicuna-13b")
    | _from("H200", 1, "qwen3-8b", "qwen3-14b")
    | _from("H800", 1, "llama-2-13b", "vicuna-13b")
    | _from("H800", 1, "internlm2.5-7b", "llama-3.1-8b", "mistral-7b")
    | _from("L40S", 1, "llama-3.1-8b", "mistral-7b", "llama-2-7b", "llama-2-13b", "vicuna-13b")
    | _from("L40S", 1, "qwen3-8b", "qwen3-14b")
    | _from("RTX4090", 1, "llama-3.1-8b", "mistral-7b", "llama-2-7b", "qwen3-8b")
    | _from(
        "RTXPRO6000",
        1,
        "qwen3-32b",
        "qwen3-8b",
        "qwen3-14b",
        "llama-3.1-8b",
        "mistral-7b",
        "llama-2-7b",
        "llama-2-13b",
        "vicuna-13b",
    )
    | _from("RTXPRO6000", 2, "qwen3-32b", "llama-3.1-70b", base_tp=2)
)
"""Profiles without measurements, and the fitted neighbour each is scaled from."""


class Fit(NamedTuple):
    """The fit of one profile, what it was made from, and where that comes from."""

    source: str
    table: StepTable
    fit: StepTimeFit


def read_steps(profiles_data: Path, key: ProfileKey, measurements: Measurements) -> tuple[StepTable, Knots | None]:
    """The steps that a profile is fitted to, and what their new tokens cost if that was measured by itself.

    Raises:
        ConfigError: a table is missing or lacks rows.
    """
    if measurements.table == AEGAEON:
        path = profiles_data / "aegaeon_prefill_decode.csv"
        return read_step_table(path, {"model": measurements.model, "device": measurements.device}), None
    if measurements.table == AICONFIGURATOR:
        path = profiles_data / "aiconfigurator_step_latency.csv"
        return read_step_table(path, {"model": measurements.model, "system": measurements.device, "tp": key.tp}), None
    folder = profiles_data / "vllm_layerwise" / measurements.device / measurements.model / "bf16"
    device, architecture = DEVICES[key.device], ARCHITECTURES[key.architecture]
    kv_tokens = BLOCK_TOKENS * num_gpu_blocks(device, architecture, key.tp)
    times = read_layer_times(folder, key.tp)
    table = compose_steps(times, architecture, device, kv_tokens)
    return table, measured_token_curve(times, architecture, device)


def fit_step_times(profiles_data: Path) -> dict[ProfileKey, Fit]:
    """Every fit of :data:`FITTED` from the tables in ``profiles_data``.

    Raises:
        ConfigError: a table is missing or lacks rows.
    """
    fits = {}
    for key, measurements in FITTED.items():
        table, curve = read_steps(profiles_data, key, measurements)
        at_least = roofline(DEVICES[key.device], ARCHITECTURES[key.architecture], key.tp)
        rng = np.random.default_rng(SPLIT_SEED)
        fits[key] = Fit(_source(key, measurements), table, fit_table(table, rng, at_least, curve))
    return fits


def _source(key: ProfileKey, measurements: Measurements) -> str:
    model, device = measurements.model, measurements.device
    if measurements.table == AEGAEON:
        return f"fit to Aegaeon's measurements (SOSP 2025 artifact, Apache-2.0) of {model} on {device}, fp16, eager"
    if measurements.table == AICONFIGURATOR:
        return (
            f"fit to AIConfigurator 0.12.0 (Apache-2.0) predictions of vLLM steps of {model} on {device}, tp={key.tp}"
        )
    source = (
        f"fit to whole steps composed from the layer times of vLLM 0.19 (LLMServingSim 2.0, MIT) of {model} on {device}"
    )
    return source if key.tp == 1 else f"{source}, tp={key.tp}; all-reduces {DEVICES[key.device].collective.source}"


def build_profiles(
    fits: Mapping[ProfileKey, Fit], residency: ResidencyTimes, busy: BusyPower
) -> dict[ProfileKey, Profile]:
    """Every shipped profile."""
    step_times = {key: _fitted_step_time(key, fit) for key, fit in fits.items()}
    step_times |= {key: _estimated_step_time(key, base, fits[base].fit) for key, base in ESTIMATED_FROM.items()}
    curves = {key: quantities.token_curve(fit.fit, fit.source) for key, fit in fits.items()}
    curves |= {key: _estimated_curve(key, base, curves[base]) for key, base in ESTIMATED_FROM.items()}
    return {
        key: Profile(
            device=key.device,
            architecture=key.architecture,
            tp=key.tp,
            token_curve=curves[key],
            **(step_time | _hardware_quantities(key, residency, busy)),
        )
        for key, step_time in step_times.items()
    }


def _fitted_step_time(key: ProfileKey, fit: Fit) -> Quantities:
    device, architecture = DEVICES[key.device], ARCHITECTURES[key.architecture]
    return quantities.step_time(fit.fit, fit.source, device, architecture, key.tp)


def _estimated_step_time(key: ProfileKey, base: ProfileKey, fit: StepTimeFit) -> Quantities:
    coefficients = fit.coefficients
    source = f"from the fit of {base.architecture} on {base.device} tp={base.tp}"
    if key.architecture != base.architecture:
        coefficients = scale_architecture(
            coefficients, ARCHITECTURES[base.architecture], ARCHITECTURES[key.architecture]
        )
        source += ": c0, c1 and c2 by parameters, c3 and c6 by KV bytes per token, c4 by attention work, "
        source += "n0 and c5 as is"
    if key.tp != base.tp:
        efficiency = PARALLEL_EFFICIENCY[key.device, key.tp]
        coefficients = scale_tp(coefficients, key.tp, efficiency)
        source += (
            f"; over {key.tp} GPUs at a parallel efficiency of {efficiency.memory:.2f} for c0, c3 and c6 and "
            f"{efficiency.compute:.2f} for c1, c2 and c4 ({efficiency.source})"
        )
    return {name: quantity(name, value, "estimated", source) for name, value in coefficients._asdict().items()}


def _estimated_curve(key: ProfileKey, base: ProfileKey, curve: TokenCurve | None) -> TokenCurve | None:
    """The curve of the same number of GPUs, whose tiles fill at the same tokens, scaled as c0, c1 and c2 are."""
    if curve is None or key.tp != base.tp:
        return None
    scale = ARCHITECTURES[key.architecture].parameters / ARCHITECTURES[base.architecture].parameters
    return TokenCurve(
        tokens=curve.tokens,
        seconds=tuple(rounded(seconds * scale) for seconds in curve.seconds),
        chunk_s=rounded(curve.chunk_s * scale),
        kind="estimated",
        source=f"that of {base.architecture} on {base.device} tp={base.tp}, by parameters",
    )


def _hardware_quantities(key: ProfileKey, times: ResidencyTimes, busy: BusyPower) -> Quantities:
    device, architecture = DEVICES[key.device], ARCHITECTURES[key.architecture]
    num_bytes = architecture.weight_bytes
    return {
        **quantities.architecture_bytes(architecture),
        "num_gpu_blocks": quantities.blocks(device, num_bytes, architecture.kv_bytes_per_token, key.tp),
        **quantities.residency(device, num_bytes, key.tp, times),
        **quantities.power(device, key.tp, busy),
    }
