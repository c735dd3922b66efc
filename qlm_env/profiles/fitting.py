"""A fit of step-time coefficients together with how well it predicts steps it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from qlm_env.profiles.least_squares import (
    NO_BOUNDS,
    RegimeError,
    fit_step_times,
    held_out_predictions_s,
    regime_errors,
)
from qlm_env.profiles.schema import StepTimeCoefficients
from qlm_env.profiles.step_tables import REGIMES, StepTable
from qlm_env.profiles.token_curve import Knots
from qlm_env.spec import ConfigError

SPLIT_SEED = 0
"""Deals the rows of published tables to folds, and those of users who have no seed of their own."""

MIN_STEPS = 8
"""Of a regime: fewer leave a fold without any, or a fit through every point."""

REQUIRED_REGIMES = ("prefill", "decode")
"""Mixed steps follow from the two; the reverse does not hold."""


class StepTimeFit(NamedTuple):
    """Coefficients fitted to all steps of a table, and the errors of fits that did not see the step."""

    coefficients: StepTimeCoefficients
    errors: Mapping[str, RegimeError]
    """Held out, by regime."""
    curve: Knots | None = None
    """Of the time by new tokens alone, measured; it is the same in all the fits that the errors are of."""

    @property
    def mean_error(self) -> float:
        """The mean over the regimes of their mean errors."""
        return float(np.mean([error.mean for error in self.errors.values()]))


def fit_table(
    table: StepTable,
    rng: np.random.Generator,
    at_least: StepTimeCoefficients = NO_BOUNDS,
    curve: Knots | None = None,
) -> StepTimeFit:
    """Fit ``table`` and measure the fit on held-out rows, in five folds that ``rng`` deals.

    Args:
        curve: what new tokens cost outside attention, if that was measured by itself.

    Raises:
        ConfigError: prefill or decode steps are missing, or a regime has fewer than :data:`MIN_STEPS`.
    """
    count = np.bincount(table.regime, minlength=len(REGIMES))
    for index, name in enumerate(REGIMES):
        if count[index] < MIN_STEPS and (count[index] or name in REQUIRED_REGIMES):
            raise ConfigError(f"too few {name} steps to fit: {count[index]}; at least {MIN_STEPS} are needed")
    predicted_s = held_out_predictions_s(table, at_least, rng, curve)
    coefficients, raised = fit_step_times(table, at_least, curve)
    return StepTimeFit(coefficients, regime_errors(table, predicted_s), raised)


def check_errors(fit: StepTimeFit, max_error: float) -> None:
    """Refuse a fit whose mean held-out error in any regime is above ``max_error``.

    Raises:
        ConfigError: it is; the message names every such regime and its error.
    """
    worse = [f"{name} {error.mean:.1%}" for name, error in fit.errors.items() if error.mean > max_error]
    if worse:
        raise ConfigError(f"the fit is worse than max_error={max_error:g}: mean held-out error of {', '.join(worse)}")
