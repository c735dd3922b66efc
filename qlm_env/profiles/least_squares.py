"""Step-time coefficients by bounded least squares on a table of steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from qlm_env.profiles.schema import StepTimeCoefficients
from qlm_env.profiles.step_tables import REGIMES, StepTable
from qlm_env.profiles.token_curve import Knots

Float = NDArray[np.float64]

N0_GRID_TOKENS = tuple(range(16, 1025, 16))
"""Where the token slope may break: a multiple of 16, as the GEMM tiles whose filling the break marks."""

NO_BOUNDS = StepTimeCoefficients(*[0.0] * 8)


class StepTimes(NamedTuple):
    """What a fit comes to."""

    coefficients: StepTimeCoefficients
    curve: Knots | None = None
    """Takes the place of c0, c1, n0 and c2, which then sum it up."""


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


def predict_s(table: StepTable, coefficients: StepTimeCoefficients, curve: Knots | None = None) -> Float:
    """Step times by the formula, shape (N,)."""
    c0, c1, n0, c2, c3, c4, c5, c6 = coefficients
    if curve is None:
        predicted: Float = design_matrix(table, n0) @ np.array([c0, c1, c2, c3, c4, c5, c6])
        return predicted
    beside: Float = _beside_curve(table) @ np.array([0.0, curve.chunk_s, c3, c4, c5, c6])
    return beside + curve.at(table.new_tokens, c2)


def fit_step_times(
    table: StepTable, at_least: StepTimeCoefficients = NO_BOUNDS, curve: Knots | None = None
) -> StepTimes:
    """As :func:`fit_step_time`; with a ``curve`` of what tokens cost outside attention, only the rest is fitted.

    The rest has a constant part too, which raises the curve, and another in steps with a prefill chunk.
    """
    if curve is None:
        return StepTimes(fit_step_time(table, at_least))
    floor = np.array([0.0, 0.0, at_least.c3_s_per_kv_token, at_least.c4_s_per_token2, 0.0, 0.0])
    weight = _regime_weight(table)
    relative = _beside_curve(table) * (weight / table.latency_s)[:, None]
    scale = np.maximum(np.linalg.norm(relative, axis=0), np.finfo(float).tiny)
    target = weight * (1.0 - curve.at(table.new_tokens) / table.latency_s) - relative @ floor
    constant, chunk_s, c3, c4, c5, c6 = (float(x) for x in floor + _non_negative(relative / scale, target)[0] / scale)
    raised = Knots(curve.tokens, curve.seconds + constant, chunk_s)
    nothing = np.zeros_like(table.latency_s)
    with_chunk_s = np.where(table.attention_tokens2 > 0, chunk_s, 0.0)
    tokens_alone = table._replace(
        kv_tokens=nothing,
        attention_tokens2=nothing,
        decodes=nothing,
        latency_s=raised.at(table.new_tokens) + with_chunk_s,
    )
    summary = fit_step_time(tokens_alone)
    return StepTimes(
        summary._replace(c3_s_per_kv_token=c3, c4_s_per_token2=c4, c5_s_per_sequence=c5, c6_s_per_mixed_kv_token=c6),
        raised,
    )


def _beside_curve(table: StepTable) -> Float:
    """Columns of a constant, one with a prefill chunk, c3, c4, c5 and c6; shape (N, 6)."""
    columns = design_matrix(table, 0.0)
    columns[:, 1] = table.attention_tokens2 > 0
    beside: Float = columns[:, [0, 1, 3, 4, 5, 6]]
    return beside


def _regime_weight(table: StepTable) -> Float:
    """Square roots, because least squares squares them again; shape (N,)."""
    weight: Float = np.sqrt(1.0 / np.bincount(table.regime)[table.regime])
    return weight


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
    weight = _regime_weight(table)
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
    """Non-negative least squares and the norm of its residual, on the triangular factor of ``matrix``, (N, C).

    SciPy's solver is quick on a few rows and very slow on ten thousand; the problem is the same.
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
    table: StepTable,
    at_least: StepTimeCoefficients,
    rng: np.random.Generator,
    curve: Knots | None = None,
    folds: int = 5,
) -> Float:
    """Each row predicted by a fit on the folds it is not in, shape (N,); ``rng`` deals rows to folds."""
    fold = rng.permutation(len(table.latency_s)) % folds
    predicted = np.empty_like(table.latency_s)
    for index in range(folds):
        held_out = fold == index
        fitted = fit_step_times(table.rows(~held_out), at_least, curve)
        predicted[held_out] = predict_s(table.rows(held_out), *fitted)
    return predicted
