"""A measured curve over new tokens in the place of a formula: in profiles, in fits and in the compiled engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_env.backends.emulator.latency import step_time_s, tokens_time_s
from qlm_env.backends.emulator.state import PLACEMENT_DTYPE
from qlm_env.cluster import fill_placement
from qlm_env.profiles import Profile, load_profile
from qlm_env.profiles.fitting import fit_table
from qlm_env.profiles.least_squares import fit_step_times, predict_s
from qlm_env.profiles.schema import StepTimeCoefficients
from qlm_env.profiles.token_curve import MAX_KNOTS, Knots, TokenCurve
from qlm_env.spec import ConfigError, EngineSpec, parse
from tests.profiles.test_least_squares import grid
from tests.profiles.toy import toy_profile, write_profile

STAIRS = Knots(np.array([1.0, 64.0, 65.0, 128.0, 4096.0]), np.array([0.01, 0.011, 0.014, 0.0141, 0.3]))
VALUES = {"tokens": [1, 64, 65], "seconds": [0.01, 0.011, 0.014], "kind": "measured", "source": "a test"}


def with_curve(knots: Knots = STAIRS) -> Profile:
    curve = TokenCurve(
        tokens=tuple(int(tokens) for tokens in knots.tokens),
        seconds=tuple(float(seconds) for seconds in knots.seconds),
        kind="measured",
        chunk_s=knots.chunk_s,
        source="a test",
    )
    return toy_profile().model_copy(update={"token_curve": curve})


def placement(profile: Profile) -> Any:
    row = np.zeros(1, PLACEMENT_DTYPE)
    fill_placement(row[0], profile, EngineSpec())
    return row.view(np.recarray)[0]


def test_between_knots_it_is_linear_and_beyond_them_it_goes_on() -> None:
    tokens = np.array([1.0, 32.5, 64.0, 64.5, 4096.0, 5096.0])
    expected_s = [0.01, 0.0105, 0.011, 0.0125, 0.3, 0.3 + 1000 * 2e-4]
    assert STAIRS.at(tokens, 2e-4) == pytest.approx(expected_s)
    assert STAIRS.at(np.array([0.0])) == pytest.approx([0.01])


def test_thinning_keeps_the_ends_and_the_stairs() -> None:
    tokens = np.arange(1.0, 2049.0)
    stairs = Knots(tokens, 0.01 + 0.005 * np.floor(tokens / 512))
    thinned = stairs.thinned(10)
    assert (thinned.tokens[0], thinned.tokens[-1]) == (1.0, 2048.0)
    assert thinned.at(tokens) == pytest.approx(stairs.seconds)
    assert len(stairs.thinned(5).tokens) == 5
    assert STAIRS.thinned(100).tokens.tolist() == STAIRS.tokens.tolist()


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 9000))
def test_the_engine_reads_the_curve_as_the_profile_does(tokens: int) -> None:
    profile = with_curve()
    expected_s = STAIRS.at(np.array([float(tokens)]), profile.c2_s_per_token.value)[0]
    assert tokens_time_s(placement(profile), float(tokens)) == pytest.approx(expected_s, rel=1e-12)


def test_the_curve_stands_for_three_terms_of_a_step() -> None:
    profile = with_curve(STAIRS._replace(chunk_s=0.002))
    row = placement(profile)
    c = profile.step_time
    kv_token_s = c.c3_s_per_kv_token + c.c6_s_per_mixed_kv_token
    rest_s = kv_token_s * 900 + c.c4_s_per_token2 * 5000 + c.c5_s_per_sequence * 3
    assert step_time_s(row, 64.0, 3.0, 900.0, 5000.0) == pytest.approx(0.013 + rest_s, rel=1e-12)
    decode_s = c.c3_s_per_kv_token * 900 + c.c5_s_per_sequence * 64
    assert step_time_s(row, 64.0, 64.0, 900.0, 0.0) == pytest.approx(0.011 + decode_s, rel=1e-12)
    formula_s = c.c0_s + 64 * c.c1_s_per_token + 36 * c.c2_s_per_token
    assert tokens_time_s(placement(toy_profile()), 100.0) == pytest.approx(formula_s, rel=1e-12)


def test_a_record_that_held_a_curve_forgets_it() -> None:
    row = np.zeros(1, PLACEMENT_DTYPE)
    fill_placement(row[0], with_curve(), EngineSpec())
    fill_placement(row[0], toy_profile(), EngineSpec())
    assert row["num_knots"][0] == 0


def test_a_profile_with_a_curve_reads_back_as_it_was(tmp_path: Path) -> None:
    write_profile(tmp_path, with_curve())
    assert load_profile("TOY", "toy-1b", 1, tmp_path) == with_curve()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": [0.01, 0.02]}, "3 tokens and 2 seconds; expected as many"),
        ({"tokens": [1, 65, 65]}, "tokens must ascend, but 65 follows 65"),
        ({"seconds": [0.01, 0.0, 0.02]}, "greater than 0"),
        ({"tokens": [1], "seconds": [0.1]}, "at least 2 items"),
        ({"tokens": [*range(1, MAX_KNOTS + 2)], "seconds": [0.1] * (MAX_KNOTS + 1)}, f"at most {MAX_KNOTS} items"),
    ],
    ids=["lengths", "order", "zero", "too few", "too many"],
)
def test_a_wrong_curve_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(TokenCurve, VALUES | change)
    assert "\n" not in str(error.value)


def test_a_fit_beside_a_curve_finds_the_rest() -> None:
    """Steps made from a curve, a constant and known coefficients give all of them back."""
    table = grid()
    known = StepTimeCoefficients(0.0, 0.0, 16.0, 1e-4, 4e-7, 3e-9, 1.3e-4, 6e-7)
    raised = Knots(STAIRS.tokens, STAIRS.seconds + 0.004, 0.003)
    table = table._replace(latency_s=predict_s(table, known, raised))
    inside = table.rows(table.new_tokens <= STAIRS.tokens[-1])
    coefficients, curve = fit_step_times(inside, curve=STAIRS)
    assert curve is not None
    assert curve.seconds == pytest.approx(raised.seconds, rel=1e-6)
    assert curve.chunk_s == pytest.approx(raised.chunk_s, rel=1e-6)
    assert tuple(coefficients)[4:] == pytest.approx(tuple(known)[4:], rel=1e-6)
    errors = fit_table(inside, np.random.default_rng(0), curve=STAIRS).errors
    assert all(error.worst < 1e-6 for error in errors.values())


def test_the_summary_follows_the_curve() -> None:
    tokens = np.arange(1.0, 4097.0, 5.0)
    bend = Knots(tokens, 0.01 + 1e-5 * np.minimum(tokens, 96) + 5e-5 * np.maximum(0, tokens - 96))
    table = grid()
    table = table._replace(latency_s=predict_s(table, StepTimeCoefficients(0, 0, 16, 0, 1e-7, 1e-9, 0, 0), bend))
    coefficients, _ = fit_step_times(table, curve=bend)
    assert coefficients.n0_tokens == 96
    assert tuple(coefficients)[:4] == pytest.approx((0.01, 1e-5, 96.0, 5e-5), rel=1e-3)
