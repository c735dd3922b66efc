from __future__ import annotations

import numpy as np
import pytest

from qlm_env.profiles.fitting import MIN_STEPS, check_errors, fit_table
from qlm_env.profiles.least_squares import fit_step_time, predict_s
from qlm_env.profiles.step_tables import REGIMES, StepTable
from qlm_env.spec import ConfigError
from tests.profiles.test_least_squares import KNOWN, grid


def repeated(table: StepTable, regime: str, times: int) -> StepTable:
    """``table`` with every row of ``regime`` present ``times`` times."""
    rows = np.repeat(np.arange(len(table.regime)), np.where(table.regime == REGIMES.index(regime), times, 1))
    return StepTable(*(column[rows] for column in table))


def test_a_fit_of_exact_steps_predicts_what_it_has_not_seen() -> None:
    fit = fit_table(grid(), np.random.default_rng(0))
    assert tuple(fit.coefficients) == pytest.approx(tuple(KNOWN), rel=1e-6)
    assert set(fit.errors) == set(REGIMES)
    assert sum(error.rows for error in fit.errors.values()) == len(grid().latency_s)
    assert fit.mean_error < 1e-6


def test_every_regime_counts_alike() -> None:
    """Steps that the form cannot express: many of them must not outweigh the others."""
    table = grid()
    slow = np.where(table.regime == REGIMES.index("mixed"), 1.5, 1.0)
    table = table._replace(latency_s=table.latency_s * slow)
    many = repeated(table, "mixed", 50)
    few_fit, many_fit = fit_step_time(table), fit_step_time(many)
    assert tuple(many_fit) == pytest.approx(tuple(few_fit), rel=1e-6)
    decodes = table.rows(table.regime == REGIMES.index("decode"))
    assert np.abs(predict_s(decodes, many_fit) / decodes.latency_s - 1).mean() < 0.1


def test_the_mean_error_is_that_of_the_regimes() -> None:
    table = grid()
    noise = np.random.default_rng(1).normal(1.0, 0.05, len(table.latency_s))
    fit = fit_table(table._replace(latency_s=table.latency_s * noise), np.random.default_rng(0))
    assert fit.mean_error == pytest.approx(np.mean([fit.errors[name].mean for name in REGIMES]))


@pytest.mark.parametrize("regime", REGIMES)
def test_too_few_steps_of_a_regime_are_refused(regime: str) -> None:
    table = grid()
    rows = np.flatnonzero(table.regime == REGIMES.index(regime))
    keep = np.ones(len(table.regime), dtype=bool)
    keep[rows[MIN_STEPS - 1 :]] = False
    with pytest.raises(ConfigError, match=f"too few {regime} steps to fit: {MIN_STEPS - 1}; at least {MIN_STEPS}"):
        fit_table(table.rows(keep), np.random.default_rng(0))


def test_mixed_steps_may_be_missing_and_others_not() -> None:
    table = grid()
    assert set(fit_table(table.rows(table.regime != 2), np.random.default_rng(0)).errors) == {"prefill", "decode"}
    for index in (0, 1):
        with pytest.raises(ConfigError, match=f"too few {REGIMES[index]} steps to fit: 0"):
            fit_table(table.rows(table.regime != index), np.random.default_rng(0))


def test_a_fit_worse_than_the_bound_is_refused_by_regime() -> None:
    table = grid()
    noise = np.where(table.regime == 1, np.random.default_rng(1).normal(1.0, 0.3, len(table.latency_s)), 1.0)
    fit = fit_table(table._replace(latency_s=table.latency_s * noise), np.random.default_rng(0))
    bound = (fit.errors["decode"].mean + max(fit.errors[name].mean for name in ("prefill", "mixed"))) / 2
    with pytest.raises(ConfigError, match=rf"max_error={bound:g}: mean held-out error of decode \d+\.\d%$"):
        check_errors(fit, bound)
    check_errors(fit, 1.0)
