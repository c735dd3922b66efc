"""A batch under a waiting queue as renewal processes: when places in it become free, counted in decode steps.

Every running request produces one token a step, and its place goes to the next in the queue, so each place is a
renewal process in steps: first what is left of the request in it, then lengths ``L`` one after another. On a grid of
steps, with ``f`` the distribution of ``L``, ``r_j`` that of what is left at place ``j``, and ``*`` convolution,

- renewals of a fresh place: ``m = f + f*m``; of place ``j``: ``m_j = r_j + r_j*m`` (Cox, *Renewal theory*, 1962);
- second moments: ``E[N_j (N_j - 1)] = 2 m_j * cumsum(m)``, so the variance of the sum over places is known too;
- tokens in the KV cache: those of the requests still there, plus ``m_j`` convolved with what a request of an age holds.

Far ahead all are linear: admissions grow by ``B/mu`` a step and their variance by ``B sigma^2/mu^3``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planners.token_posterior import TokenPosterior
from qlm_env.compiled import compiled

Float = NDArray[np.float64]

STEPS_PER_MEAN = 16
"""Grid points within a mean length."""
MEAN_LENGTHS = 10
"""Mean lengths the grid spans; by then a renewal process of moderate variation has settled."""


class Resident(NamedTuple):
    """Requests of one kind in the batch."""

    lengths: TokenPosterior
    generated_tokens: Float
    """(R,)"""
    prompt_tokens: Float
    """(R,)"""


class Turnover(NamedTuple):
    """A batch with a queue that never ends, on a grid of G points, the last of them far ahead."""

    steps: Float
    """(G,) decode steps from now"""
    admissions: Float
    """(G,) expected by then"""
    variance: Float
    """(G,) of the number admitted by then"""
    sequences: Float
    """(G,) expected in the batch"""
    kv_tokens: Float
    """(G,) expected in the KV cache"""


@compiled
def fill_renewals(mass: Float, renewals: Float) -> None:
    """Solve ``m = f + f*m`` on a grid: (G,) probabilities of a length into (G,) expected renewals at each point."""
    for k in range(len(mass)):
        total = mass[k]
        for i in range(1, k + 1):
            total += mass[i] * renewals[k - i]
        renewals[k] = total / (1.0 - mass[0])


@compiled
def fill_delayed(first: Float, renewals: Float, all_of_them: Float) -> None:
    """``m_j = r_j + r_j*m`` for every place: (R, G) and (G,) into (R, G)."""
    for j in range(first.shape[0]):
        for k in range(first.shape[1]):
            total = first[j, k]
            for i in range(k + 1):
                total += first[j, i] * renewals[k - i]
            all_of_them[j, k] = total


def turnover(
    residents: list[Resident],
    lengths: TokenPosterior,
    prompt_tokens: float,
    free: float,
    refill: float,
    admitted: float,
) -> Turnover:
    """How a batch turns over while requests with outputs of ``lengths`` wait for places in it.

    Args:
        prompt_tokens: mean of the waiting requests.
        free: places that can be filled at once.
        refill: places filled again for each that a resident leaves: 1, or what KV memory will hold over what runs now.
        admitted: the last grid point is where so many have been admitted.
    """
    width = lengths.mean_tokens / STEPS_PER_MEAN
    steps = width * np.arange(STEPS_PER_MEAN * MEAN_LENGTHS)
    edges = np.append(0.0, steps + width / 2)
    mass = -np.diff(lengths.survival(edges))
    renewals = np.empty_like(mass)
    fill_renewals(mass, renewals)

    num_resident = sum(len(resident.generated_tokens) for resident in residents)
    still = [resident.lengths.left_survival(resident.generated_tokens, edges) for resident in residents]
    left = np.concatenate([np.empty((0, len(edges))), *still])
    freed = np.empty((num_resident, len(steps)))
    fill_delayed(-refill * np.diff(left, axis=1), renewals, freed)
    of_fresh = renewals.copy()
    of_fresh[0] += 1.0
    admissions = freed.sum(axis=0) + free * of_fresh
    by_then = np.cumsum(admissions)
    again = np.convolve(admissions, np.cumsum(renewals))[: len(steps)]
    squares = (np.cumsum(freed, axis=1) ** 2).sum(axis=0) + free * np.cumsum(of_fresh) ** 2
    variance = np.maximum(0.0, 2.0 * again + by_then - squares)

    # Masses stand for the half step around their grid point, so sums over them are those at its edge.
    alive = lengths.survival(edges[1:])
    sequences = np.append(free, np.convolve(admissions, alive)[: len(steps)])
    kv_tokens = np.convolve(admissions, alive * (prompt_tokens + edges[1:]))[: len(steps)]
    kv_tokens = np.append(free * prompt_tokens, kv_tokens)
    sequences += left.sum(axis=0)
    for resident, alive_there in zip(residents, still, strict=True):
        held = (resident.prompt_tokens + resident.generated_tokens)[:, None] + edges[None, :]
        kv_tokens += (alive_there * held).sum(axis=0)

    places = max(1.0, free + refill * num_resident)
    rate = places / lengths.mean_tokens
    spread = rate * lengths.variance_tokens2 / lengths.mean_tokens**2
    beyond = max(1.0, admitted - float(by_then[-1])) / rate
    return Turnover(
        steps=np.append(edges, edges[-1] + beyond),
        admissions=np.concatenate([[free], by_then, [by_then[-1] + beyond * rate]]),
        variance=np.concatenate([[0.0], variance, [variance[-1] + beyond * spread]]),
        sequences=np.append(sequences, places),
        kv_tokens=np.append(kv_tokens, places * held_tokens(lengths, prompt_tokens)),
    )


def held_tokens(lengths: TokenPosterior, prompt_tokens: float) -> float:
    """Tokens a running request holds, averaged over a full batch: ``P + E[L^2]/(2 E[L])``."""
    return prompt_tokens + (lengths.variance_tokens2 / lengths.mean_tokens + lengths.mean_tokens) / 2.0


def left_when_settled(lengths: TokenPosterior, ahead: Float) -> Float:
    """``P(left > n)`` of a running request seen at a random time, for ``ahead`` (G,) evenly spaced from 0.

    ``1/mu`` times the integral of the survival function from ``n`` on, by the trapezoidal rule.
    """
    alive = lengths.survival(ahead)
    pieces = (alive[1:] + alive[:-1]) / 2.0 * (ahead[1] - ahead[0])
    integral = np.append(np.cumsum(pieces[::-1])[::-1], 0.0)
    left: Float = np.minimum(1.0, integral / lengths.mean_tokens)
    return left
