"""Profiles with round numbers for tests."""

from __future__ import annotations

from pathlib import Path

from qlm_env.profiles import Profile, ProfileKey
from qlm_env.profiles.load import profile_yaml
from qlm_env.profiles.schema import OPTIONAL_UNITS, UNITS

ROUND_NUMBERS = {
    "c0_s": 0.01,
    "c1_s_per_token": 1e-5,
    "n0_tokens": 64.0,
    "c2_s_per_token": 1e-4,
    "c3_s_per_kv_token": 1e-6,
    "c4_s_per_token2": 1e-8,
    "c5_s_per_sequence": 1e-4,
    "c6_s_per_mixed_kv_token": 2e-7,
    "weight_bytes": 10e9,
    "kv_bytes_per_token": 1e5,
    "num_gpu_blocks": 1001.0,
    "context_tokens": 4096.0,
    "cold_start_s": 40.0,
    "stage_s": 41.0,
    "wake_s": 1.0,
    "sleep_s": 1.0,
    "kv_swap_bytes_per_s": 2e10,
}


def toy_profile(device: str = "TOY", architecture: str = "toy-1b", tp: int = 1, **numbers: float) -> Profile:
    """A profile of round numbers, some replaced."""
    quantities = {
        name: {"value": value, "unit": (UNITS | OPTIONAL_UNITS)[name], "kind": "estimated", "source": "a test"}
        for name, value in (ROUND_NUMBERS | numbers).items()
    }
    return Profile.model_validate({"device": device, "architecture": architecture, "tp": tp} | quantities)


def write_profile(folder: Path, profile: Profile) -> Path:
    path = folder / ProfileKey(profile.device, profile.architecture, profile.tp).file_name
    path.write_text(profile_yaml(profile, "Written by a test."), encoding="utf-8")
    return path
