"""Profiles made from a fit of one's own."""

from __future__ import annotations

import pytest

from qlm_env.profiles import ProfileKey, load_profile
from qlm_env.profiles.custom import OTHER_NUMBERS, complete_profile, physical_bounds
from qlm_env.profiles.fitting import StepTimeFit
from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES
from qlm_env.profiles.least_squares import NO_BOUNDS, RegimeError
from qlm_env.profiles.scaling import roofline
from qlm_env.profiles.schema import UNITS, Quantity, StepTimeCoefficients
from qlm_env.spec import ConfigError
from tests.profiles.toy import ROUND_NUMBERS, toy_profile

FIT = StepTimeFit(
    StepTimeCoefficients(0.01, 1e-5, 64.0, 1e-4, 1e-6, 1e-8, 1e-4),
    {"prefill": RegimeError(9, 0.02, 0.1), "decode": RegimeError(9, 0.04, 0.1)},
)


def given(**numbers: float) -> dict[str, Quantity]:
    return {
        name: Quantity(value=value, unit=UNITS[name], kind="measured", source="a test")
        for name, value in numbers.items()
    }


def test_known_names_give_what_the_shipped_profile_has() -> None:
    key = ProfileKey("A100", "llama-3.1-8b", 1)
    profile, shipped = complete_profile(key, FIT, "my steps"), load_profile(*key)
    assert profile.step_time == FIT.coefficients
    assert (profile.c0_s.kind, profile.c0_s.source, profile.c0_s.fit_error) == ("fitted", "my steps", 0.03)
    for name in (*OTHER_NUMBERS, "peak_power_w", "busy_power_w"):
        assert getattr(profile, name) == getattr(shipped, name), name


def test_given_numbers_win_and_others_follow_from_them() -> None:
    key = ProfileKey("A100", "mine", 1)
    profile = complete_profile(
        key, FIT, "my steps", given(weight_bytes=20e9, kv_bytes_per_token=2e5, context_tokens=8192, wake_s=7.0)
    )
    assert profile.wake_s.value == 7.0
    assert profile.wake_s.kind == "measured"
    assert profile.num_gpu_blocks.value == (0.9 * DEVICES["A100"].memory_bytes - 1.24e9 - 20e9) // (16 * 2e5)
    assert profile.cold_start_s.value == pytest.approx(43.12 + 20e9 / 4.4734e9, rel=1e-3)


def test_a_given_number_wins_over_that_of_a_known_name() -> None:
    key = ProfileKey("A100", "llama-3.1-8b", 1)
    profile = complete_profile(key, FIT, "my steps", given(context_tokens=8192, num_gpu_blocks=99))
    assert (profile.context_tokens.value, profile.num_gpu_blocks.value) == (8192, 99)


def test_the_rest_is_taken_over_from_another_profile() -> None:
    key = ProfileKey("MINE", "llama-3.1-8b", 1)
    like = toy_profile(peak_power_w=100.0)
    profile = complete_profile(key, FIT, "my steps", given(num_gpu_blocks=500), like)
    assert profile.num_gpu_blocks.value == 500
    assert profile.weight_bytes.value == ARCHITECTURES["llama-3.1-8b"].weight_bytes
    assert profile.cold_start_s.value == ROUND_NUMBERS["cold_start_s"]
    assert profile.cold_start_s.kind == "estimated"
    assert profile.cold_start_s.source == "taken over from toy-1b on TOY tp=1: a test"
    assert profile.peak_power_w is not None
    assert profile.busy_power_w is None


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^no weight_bytes, kv_bytes_per_token, context_tokens, wake_s, .* for mine on MINE: give them, or like=",
    ) as error:
        complete_profile(
            ProfileKey("MINE", "mine", 1),
            FIT,
            "my steps",
            given(num_gpu_blocks=500, cold_start_s=1.0, stage_s=1.0),
        )
    assert "\n" not in str(error.value)


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"llama-3\.1-70b does not fit 1 x A100: no memory is left for KV cache"):
        complete_profile(ProfileKey("A100", "llama-3.1-70b", 1), FIT, "my steps")


def test_bounds_are_known_for_known_hardware() -> None:
    assert physical_bounds(ProfileKey("A100", "mine", 1)) == NO_BOUNDS
    assert physical_bounds(ProfileKey("A100", "llama-2-7b", 2)) == roofline(
        DEVICES["A100"], ARCHITECTURES["llama-2-7b"], 2
    )


def test_a_coefficient_at_its_bound_is_marked_as_estimated() -> None:
    key = ProfileKey("A100", "llama-2-7b", 1)
    bound = physical_bounds(key).c3_s_per_kv_token
    fit = FIT._replace(coefficients=FIT.coefficients._replace(c3_s_per_kv_token=bound))
    profile = complete_profile(key, fit, "my steps")
    assert profile.c3_s_per_kv_token.kind == "estimated"
    assert "peak memory bandwidth" in profile.c3_s_per_kv_token.source
    assert profile.c4_s_per_token2.kind == "fitted"
