from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_env.profiles.least_squares import (
    NO_BOUNDS,
    design_matrix,
    fit_step_time,
    held_out_predictions_s,
    predict_s,
    regime_errors,
)
from qlm_env.profiles.schema import StepTimeCoefficients
from qlm_env.profiles.step_tables import REGIMES, StepTable

KNOWN = StepTimeCoefficients(0.012, 2e-5, 96.0, 7e-5, 4e-7, 3e-9, 1.3e-4, 6e-7)


def grid() -> StepTable:
    """Prefill, decode and mixed steps over the ranges of a real table; latency by :data:`KNOWN`."""
    steps = [(q, k, 0, 0) for q in (16, 64, 96, 128, 512, 2048, 4096) for k in (0, 512, 8192)]
    steps += [(0, 0, b, kv) for b in (1, 8, 64, 128, 256) for kv in (16, 512, 4096)]
    steps += [(q, 0, b, kv) for q in (64, 512) for b in (4, 64) for kv in (128, 2048)]
    q, k, b, kv = np.array(steps, dtype=float).T
    table = StepTable(
        new_tokens=q + b,
        decodes=b,
        kv_tokens=b * kv,
        attention_tokens2=q * (k + q / 2),
        latency_s=np.ones(len(steps)),
        regime=np.where(b == 0, 0, np.where(q == 0, 1, 2)),
    )
    return table._replace(latency_s=predict_s(table, KNOWN))


def test_the_formula_by_hand() -> None:
    table = StepTable(
        new_tokens=np.array([100.0]),
        decodes=np.array([4.0]),
        kv_tokens=np.array([1000.0]),
        attention_tokens2=np.array([96 * (32 + 48.0)]),
        latency_s=np.array([1.0]),
        regime=np.array([2]),
    )
    expected_s = 1 + 64 * 0.1 + 36 * 0.2 + 1000 * 0.003 + 96 * 80 * 0.0004 + 4 * 0.05 + 1000 * 0.007
    coefficients = StepTimeCoefficients(1.0, 0.1, 64.0, 0.2, 0.003, 0.0004, 0.05, 0.007)
    assert predict_s(table, coefficients) == pytest.approx([expected_s])
    assert design_matrix(table, 64.0).tolist() == [[1, 64, 36, 1000, 7680, 4, 1000]]
    decode = table._replace(attention_tokens2=np.array([0.0]))
    assert design_matrix(decode, 64.0).tolist() == [[1, 64, 36, 1000, 0, 4, 0]]


def test_exact_steps_give_back_the_coefficients_that_made_them() -> None:
    fitted = fit_step_time(grid())
    assert fitted.n0_tokens == KNOWN.n0_tokens
    assert tuple(fitted) == pytest.approx(tuple(KNOWN), rel=1e-6)


def test_noisy_steps_give_nearly_the_coefficients_that_made_them() -> None:
    table = grid()
    noise = np.random.default_rng(1).normal(1.0, 0.02, len(table.latency_s))
    noisy = table._replace(latency_s=table.latency_s * noise)
    fitted = fit_step_time(noisy)
    assert fitted.c0_s == pytest.approx(KNOWN.c0_s, rel=0.05)
    assert fitted.c2_s_per_token == pytest.approx(KNOWN.c2_s_per_token, rel=0.05)
    predicted_s = held_out_predictions_s(noisy, NO_BOUNDS, np.random.default_rng(0))
    assert all(error.mean < 0.04 for error in regime_errors(noisy, predicted_s).values())


def test_relative_error_is_what_is_minimised() -> None:
    """A constant fitted to 1 and 100 by relative error stays near 1; by absolute error it would be 50."""
    none = np.zeros(2)
    table = StepTable(none, none, none, none, np.array([1.0, 100.0]), np.array([0, 0]))
    assert fit_step_time(table).c0_s == pytest.approx(1.01 / 1.0001)


def test_bounds_hold_where_the_data_would_have_less() -> None:
    at_least = NO_BOUNDS._replace(c3_s_per_kv_token=2 * KNOWN.c3_s_per_kv_token)
    fitted = fit_step_time(grid(), at_least)
    assert fitted.c3_s_per_kv_token == pytest.approx(at_least.c3_s_per_kv_token, rel=1e-9)
    assert fitted.c2_s_per_token == pytest.approx(KNOWN.c2_s_per_token, rel=0.2)


def test_bounds_change_nothing_where_the_data_have_more() -> None:
    at_least = NO_BOUNDS._replace(c3_s_per_kv_token=KNOWN.c3_s_per_kv_token / 2)
    assert tuple(fit_step_time(grid(), at_least)) == pytest.approx(tuple(KNOWN), rel=1e-6)


def test_held_out_predictions_do_not_see_the_step_they_predict() -> None:
    """One absurd step cannot lower its own error: its prediction is that of the others."""
    table = grid()
    latency_s = table.latency_s.copy()
    latency_s[0] *= 1000
    predicted_s = held_out_predictions_s(table._replace(latency_s=latency_s), NO_BOUNDS, np.random.default_rng(0))
    assert predicted_s[0] == pytest.approx(table.latency_s[0], rel=1e-6)


def test_the_split_depends_on_the_generator_alone() -> None:
    table = grid()._replace(latency_s=grid().latency_s * np.random.default_rng(3).normal(1, 0.05, 44))
    first, again, other = (held_out_predictions_s(table, NO_BOUNDS, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_errors_by_regime_by_hand() -> None:
    none = np.zeros(3)
    table = StepTable(none, none, none, none, np.array([1.0, 2.0, 4.0]), np.array([0, 1, 1]))
    errors = regime_errors(table, np.array([1.1, 1.0, 5.0]))
    assert set(errors) == {"prefill", "decode"}
    assert errors["prefill"] == pytest.approx((1, 0.1, 0.1))
    assert errors["decode"] == pytest.approx((2, 0.375, 0.5))
    assert REGIMES[2] == "mixed"


def test_a_token_costs_no_less_beyond_the_break() -> None:
    """Steps that start steep and flatten, as no step bound first by memory and then by compute does."""
    cheap_later = KNOWN._replace(c1_s_per_token=2e-4, c2_s_per_token=5e-5)
    fitted = fit_step_time(grid()._replace(latency_s=predict_s(grid(), cheap_later)))
    assert fitted.c2_s_per_token >= fitted.c1_s_per_token


@settings(max_examples=25, deadline=None)
@given(
    latency_s=st.lists(st.floats(1e-4, 10), min_size=44, max_size=44),
    floor=st.floats(0, 1e-3),
)
def test_coefficients_are_never_below_their_bounds(latency_s: list[float], floor: float) -> None:
    at_least = StepTimeCoefficients(0.0, 0.0, 0.0, 0.0, floor, floor, 0.0)
    fitted = fit_step_time(grid()._replace(latency_s=np.array(latency_s)), at_least)
    assert all(value >= least for value, least in zip(fitted, at_least, strict=True))
