"""How long one engine step takes.

``T = c0 + c1*min(n, n0) + c2*max(0, n - n0) + c3*sum(kv of decodes) + c4*sum(q*(k + q/2)) + c5*B``,
and ``c6*sum(kv of decodes)`` more if there is a prefill chunk. Where there is a curve over ``n``, it takes the place of
the first three terms, with a constant more if there is a prefill chunk,

with ``n`` new tokens in the step, ``B`` decoding sequences, and for each prefill chunk ``q`` new and
``k`` cached tokens. All coefficients are non-negative, in seconds per unit; they come from
:mod:`qlm_env.profiles`. For a fixed batch of ``B`` decodes the sum over decodes grows by ``B`` per step,
so ``k`` consecutive steps take ``k*a + b*k*(k-1)/2`` with ``a`` the first step's time and ``b = c3*B``:
that is what lets the engine leap. The curve is a constant to such a batch.
"""

from __future__ import annotations

import math
from typing import Any

from qlm_env.compiled import compiled


@compiled
def tokens_time_s(placement: Any, new_tokens: float) -> float:
    """The part of a step's time that goes by its new tokens alone, in seconds, without the constant of a chunk."""
    if placement.num_knots == 0:
        below = min(new_tokens, placement.n0)
        above = max(0.0, new_tokens - placement.n0)
        return placement.c0 + placement.c1 * below + placement.c2 * above
    tokens, seconds = placement.knot_tokens, placement.knot_s
    low, high = 0, placement.num_knots - 1
    if new_tokens <= tokens[low]:
        return seconds[low]
    if new_tokens >= tokens[high]:
        return seconds[high] + placement.c2 * (new_tokens - tokens[high])
    while high - low > 1:
        middle = (low + high) // 2
        if tokens[middle] <= new_tokens:
            low = middle
        else:
            high = middle
    share = (new_tokens - tokens[low]) / (tokens[high] - tokens[low])
    return seconds[low] + share * (seconds[high] - seconds[low])


@compiled
def step_time_s(placement: Any, new_tokens: float, decodes: float, kv_tokens: float, attention: float) -> float:
    """Seconds of one step.

    Args:
        placement: a record with the coefficients ``c0, c1, n0, c2, c3, c4, c5, c6`` and the curve's knots
            and ``chunk_s``.
        new_tokens: all tokens computed in the step.
        decodes: sequences that decode one token.
        kv_tokens: their cached tokens before the step, summed.
        attention: ``q*(k + q/2)`` summed over the prefill chunks.
    """
    kv_token_s, chunk_s = placement.c3, 0.0
    if attention > 0.0:
        kv_token_s, chunk_s = placement.c3 + placement.c6, placement.chunk_s
    return (
        tokens_time_s(placement, new_tokens)
        + chunk_s
        + kv_token_s * kv_tokens
        + placement.c4 * attention
        + placement.c5 * decodes
    )


@compiled
def steps_time_s(first_step_s: float, growth_s: float, steps: int) -> float:
    """Seconds of ``steps`` steps in a row, the first of ``first_step_s`` and each next one ``growth_s`` longer."""
    return steps * first_step_s + growth_s * (0.5 * steps * (steps - 1.0))


@compiled
def whole_steps_within(first_step_s: float, growth_s: float, seconds: float, limit: int) -> int:
    """The largest ``j <= limit`` with ``steps_time_s(first_step_s, growth_s, j) <= seconds``."""
    if limit <= 0 or first_step_s > seconds:
        return 0
    if growth_s > 0.0:
        half = first_step_s - 0.5 * growth_s
        guess = (math.sqrt(half * half + 2.0 * growth_s * seconds) - half) / growth_s
    else:
        guess = seconds / first_step_s
    j = limit if guess >= limit else int(guess)
    # The root is exact up to rounding; settle ties by the same function that dates the steps.
    while j < limit and steps_time_s(first_step_s, growth_s, j + 1) <= seconds:
        j += 1
    while j > 0 and steps_time_s(first_step_s, growth_s, j) > seconds:
        j -= 1
    return j
