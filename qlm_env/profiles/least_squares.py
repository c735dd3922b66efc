"""Step-time coefficients by bounded least squares on a table of steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from qlm_env.profiles.schema import StepTimeCoefficients
from qlm_env.profiles.step_tables import REGIMES, StepTable

Float = NDArray[np.float64]

N0_GRID_TOKENS = tuple(range(16, 1025, 16))
"""Where the token slope may break: a multiple of 16, as the GEMM tiles whose filling the break marks."""

NO_BOUNDS = StepTimeCoefficients(*[0.0] * 8)


class RegimeError(NamedTuple):
    """Relative error of predictions in one regime."""

    rows: int
    mean: float
    """Mean of the absolute relative errors."""
    worst: float


def design_matrix(table: StepTable, n0_tokens: float) -> Float:
    """Columns of c0, c1, c2, c3, c4, c5 and c6 for a given break; shape (N, 7)."""
    return np.column_stack(
        [
            np.ones_like(table.new_tokens),
            np.minimum(table.new_tokens, n0_tokens),
            np.maximum(table.new_tokens - n0_tokens, 0.0),
            table.kv_tokens,
            table.attention_tokens2,
            table.decodes,
            np.where(table.attention_tokens2 > 0, table.kv_tokens, 0.0),
        ]
    )


def predict_s(table: StepTable, coefficients: StepTimeCoefficients) -> Float:
    """Step times by the formula, shape (N,)."""
    c0, c1, n0, c2, c3, c4, c5, c6 = coefficients
    predicted: Float = design_matrix(table, n0) @ np.array([c0, c1, c2, c3, c4, c5, c6])
    return predicted


def fit_step_time(table: StepTable, at_least: StepTimeCoefficients = NO_BOUNDS) -> StepTimeCoefficients:
    """Coefficients that minimise the squared relative error, each no smaller than in ``at_least``.

    Every regime counts alike, however many rows it has: a table may hold a hundred times as many mixed steps
    as decodes, and an engine still spends most of its time decoding.

    ``at_least`` carries what physics rules out: without it a term that the table barely exercises may come
    out cheaper than the device's peak rates allow. A token costs no less beyond the break than before it, since
    there the step is bound by compute and before by memory. The break ``n0`` is searched on
    :data:`N0_GRID_TOKENS`; its entry in ``at_least`` is not used.
    """
    # In terms of c1 and the rise c2 - c1, neither negative: c1 goes with all tokens, the rise with those beyond n0.
    floor = np.array([value for name, value in at_least._asdict().items() if name != "n0_tokens"])
    floor[2] = max(0.0, floor[2] - floor[1])
    # sqrt, because least squares squares it again.
    weight = np.sqrt(1.0 / np.bincount(table.regime)[table.regime])
    best_residual, best = np.inf, NO_BOUNDS
    for n0_tokens in N0_GRID_TOKENS:
        relative = design_matrix(table, n0_tokens) * (weight / table.latency_s)[:, None]
        relative[:, 1] += relative[:, 2]
        # Unit columns, because tokens squared and constants differ by ten orders of magnitude.
        scale = np.maximum(np.linalg.norm(relative, axis=0), np.finfo(float).tiny)
        above_floor, residual = _non_negative(relative / scale, weight - relative @ floor)
        if residual < best_residual:
            c0, c1, rise, c3, c4, c5, c6 = (float(value) for value in floor + above_floor / scale)
            best_residual, best = residual, StepTimeCoefficients(c0, c1, n0_tokens, c1 + rise, c3, c4, c5, c6)
    return best


def _non_negative(matrix: Float, target: Float) -> tuple[Float, float]:
    """Non-negative least squares and the norm of its residual, on the triangular factor of ``matrix``, (N, 7).

    SciPy's solver is quick on seven rows and very slow on ten thousand; the problem is the same.
    """
    orthogonal, triangular = np.linalg.qr(matrix)
    reduced = orthogonal.T @ target
    solution, within = nnls(triangular, reduced)
    outside2 = max(0.0, float(target @ target - reduced @ reduced))
    return solution, float(np.sqrt(within**2 + outside2))


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
