"""Prompt and output lengths, sampled by inverting their distribution functions.

Both lengths of a request come from its own two uniform numbers, so a longer workload begins with the
shorter one, and the same numbers can be read as another distribution.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from qlm_env.spec import EmpiricalLengths, Lengths, LognormalLengths
from qlm_env.workload.length_table import LengthTable, load_length_table

MAX_TOKENS = 2**30
"""No length is longer, so that prompt + output fits 32 bits."""

ROWS_PER_BLOCK = 1_000_000
"""Requests sampled at a time, which bounds the memory of intermediate results."""

Float = NDArray[np.float64]
Int = NDArray[np.int32]


def sample_lengths(spec: Lengths, num_requests: int, rng: np.random.Generator) -> tuple[Int, Int]:
    """Prompt and output tokens of ``num_requests`` independent requests, both of shape (N,) and >= 1."""
    prompt_tokens = np.empty(num_requests, np.int32)
    output_tokens = np.empty(num_requests, np.int32)
    for start in range(0, num_requests, ROWS_PER_BLOCK):
        rows = slice(start, min(start + ROWS_PER_BLOCK, num_requests))
        uniform = rng.random((rows.stop - rows.start, 2))
        prompt_tokens[rows], output_tokens[rows] = lengths_at(spec, uniform[:, 0], uniform[:, 1])
    return prompt_tokens, output_tokens


def lengths_at(spec: Lengths, prompt_uniform: Float, output_uniform: Float) -> tuple[Int, Int]:
    """The lengths at points of the unit square, all of shape (N,): uniform numbers in, lengths out.

    - ``empirical``: the prompt quantile, and the output quantile among requests with such a prompt
      (linear between the table's quantiles, rounded).
    - ``lognormal``: ``exp(mu + sigma * Phi^-1(u))``, rounded, with ``sigma^2 = ln(1 + cv^2)`` and
      ``mu = ln(mean) - sigma^2 / 2``; raising lengths below 1 to 1 raises a mean of a few tokens.
    - ``uniform``: each whole number of the range equally likely.
    """
    if isinstance(spec, EmpiricalLengths):
        return _empirical(load_length_table(spec.table), prompt_uniform, output_uniform)
    if isinstance(spec, LognormalLengths):
        return (
            _lognormal(spec.prompt_mean_tokens, spec.prompt_cv, prompt_uniform),
            _lognormal(spec.output_mean_tokens, spec.output_cv, output_uniform),
        )
    return (
        uniform_tokens(spec.prompt_min_tokens, spec.prompt_max_tokens, prompt_uniform),
        uniform_tokens(spec.output_min_tokens, spec.output_max_tokens, output_uniform),
    )


def uniform_tokens(min_tokens: int, max_tokens: int, uniform: Float) -> Int:
    """Whole numbers from ``min_tokens`` to ``max_tokens``, equally likely, shape (N,)."""
    return _whole(min_tokens + np.floor(uniform * (max_tokens - min_tokens + 1)))


def truncate_lengths(prompt_tokens: Int, output_tokens: Int, max_total_tokens: Int | int) -> None:
    """Cut lengths, in place, to ``max_total_tokens`` of prompt + output.

    The prompt keeps all but one token, the output what then remains; neither falls below 1.
    ``max_total_tokens`` is one number or of shape (N,).
    """
    np.minimum(prompt_tokens, np.maximum(max_total_tokens - 1, 1), out=prompt_tokens, casting="same_kind")
    np.minimum(
        output_tokens,
        np.maximum(max_total_tokens - prompt_tokens, 1),
        out=output_tokens,
        casting="same_kind",
    )


def _empirical(table: LengthTable, prompt_uniform: Float, output_uniform: Float) -> tuple[Int, Int]:
    prompt = np.interp(prompt_uniform, table.probabilities, table.prompt_tokens)
    num_bins = len(table.output_tokens)
    prompt_bin = np.minimum((prompt_uniform * num_bins).astype(np.int64), num_bins - 1)
    left = np.searchsorted(table.probabilities, output_uniform, side="right") - 1
    left = np.clip(left, 0, len(table.probabilities) - 2)
    weight = (output_uniform - table.probabilities[left]) / np.diff(table.probabilities)[left]
    low, high = table.output_tokens[prompt_bin, left], table.output_tokens[prompt_bin, left + 1]
    return _whole(prompt), _whole(low + weight * (high - low))


def _lognormal(mean: float, cv: float, uniform: Float) -> Int:
    variance = math.log1p(cv * cv)
    return _whole(np.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * ndtri(uniform)))


def _whole(tokens: Float) -> Int:
    return np.clip(np.rint(tokens), 1, MAX_TOKENS).astype(np.int32)
