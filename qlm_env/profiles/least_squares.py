"""Step-time coefficients by bounded least squares on a table of steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from qlm_env.profiles.schema import StepTimeCoefficients
from qlm_env.profiles.step_tables import REGIMES, StepTable

Float = NDArray[np.float64]

N0_GRID_TOKENS = tuple(range(16, 513, 16))
"""Where the token slope may break: a multiple of 16, as the GEMM tiles whose filling the break marks."""

NO_BOUNDS = StepTimeCoefficients(*[0.0] * 7)


class RegimeError(NamedTuple):
    """Relative error of predictions in one regime."""

    rows: int
    mean: float
    """Mean of the absolute relative errors."""
    worst: float


def design_matrix(table: StepTable, n0_tokens: float) -> Float:
    """Columns of c0, c1, c2, c3, c4 and c5 for a given break; shape (N, 6)."""
    return np.column_stack(
        [
            np.ones_like(table.new_tokens),
            np.minimum(table.new_tokens, n0_tokens),
            np.maximum(table.new_tokens - n0_tokens, 0.0),
            table.kv_tokens,
            table.attention_tokens2,
            table.decodes,
        ]
    )


def predict_s(table: StepTable, coefficients: StepTimeCoefficients) -> Float:
    """Step times by the formula, shape (N,)."""
    c0, c1, n0, c2, c3, c4, c5 = coefficients
    predicted: Float = design_matrix(table, n0) @ np.array([c0, c1, c2, c3, c4, c5])
    return predicted


def fit_step_time(table: StepTable, at_least: StepTimeCoefficients = NO_BOUNDS) -> StepTimeCoefficients:
    """Coefficients that minimise the squared relative error, each no smaller than in ``at_least``.

    ``at_least`` carries what physics rules out: without it a term that the table barely exercises may come
    out cheaper than the device's peak rates allow. The break ``n0`` is searched on :data:`N0_GRID_TOKENS`;
    its entry in ``at_least`` is not used.
    """
    floor = np.array([value for name, value in at_least._asdict().items() if name != "n0_tokens"])
    best_residual, best = np.inf, NO_BOUNDS
    for n0_tokens in N0_GRID_TOKENS:
        relative = design_matrix(table, n0_tokens) / table.latency_s[:, None]
        # Unit columns, because tokens squared and constants differ by ten orders of magnitude.
        scale = np.maximum(np.linalg.norm(relative, axis=0), np.finfo(float).tiny)
        above_floor, residual = nnls(relative / scale, 1.0 - relative @ floor)
        if residual < best_residual:
            c0, c1, c2, c3, c4, c5 = (float(value) for value in floor + above_floor / scale)
            best_residual, best = residual, StepTimeCoefficients(c0, c1, n0_tokens, c2, c3, c4, c5)
    return best


def regime_errors(table: StepTable, predicted_s: Float) -> dict[str, RegimeError]:
    """Relative errors of ``predicted_s``, shape (N,), by regime, for the regimes that occur."""
    error = np.abs(predicted_s / table.latency_s - 1.0)
    by_regime = {name: error[table.regime == index] for index, name in enumerate(REGIMES)}
    return {
        name: RegimeError(len(errors), float(errors.mean()), float(errors.max()))
        for name, errors in by_regime.items()
        if len(errors)
    }


def held_out_predictions_s(
    table: StepTable, at_least: StepTimeCoefficients, rng: np.random.Generator, folds: int = 5
) -> Float:
    """Each row predicted by a fit on the folds it is not in, shape (N,); ``rng`` deals rows to folds."""
    fold = rng.permutation(len(table.latency_s)) % folds
    predicted = np.empty_like(table.latency_s)
    for index in range(folds):
        held_out = fold == index
        predicted[held_out] = predict_s(table.rows(held_out), fit_step_time(table.rows(~held_out), at_least))
    return predicted
