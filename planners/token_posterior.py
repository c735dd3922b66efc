"""What is known of a (model, SLO class)'s output lengths: a prior, updated by what has finished and what runs.

Lengths ``L`` have an unknown mean ``mu`` and variance ``sigma^2`` with a normal-inverse-gamma prior worth ``k0``
requests. With ``n`` finished requests of mean ``x``, sum of squared deviations ``d``, and prior ``(m0, k0, a0, b0)``
(Murphy, *Conjugate Bayesian analysis of the Gaussian distribution*, 2007, section 3):

``k = k0 + n``, ``m = (k0*m0 + n*x)/k``, ``a = a0 + n/2``, ``b = b0 + d/2 + k0*n*(x - m0)^2/(2k)``,

``E[mu] = m``, ``E[sigma^2] = b/(a - 1)``, ``Var[mu] = E[sigma^2]/k``.

Lengths are not normal, but their mean nearly is, and that is what waiting depends on. Where the shape of one length
matters it is a Gamma of that mean and variance.

**Classes of one model learn from each other.** The prior of a class is the posterior of the model's other classes, and
theirs is an exponential length of mean ``PRIOR_OUTPUT_TOKENS``. Each is worth ``2 * PRIOR_REQUESTS``, so that without
data a mean is known as well as from ``PRIOR_REQUESTS`` requests. The error of the prior's own mean adds
``(k0/k)^2 * Var[m0]``, which classes have in common.

**Running requests are censored observations.** Those that finish first are the short ones, so the finished alone
would mislead while a first batch runs. A running request with ``t`` tokens counts with the moments of ``L`` given
``L > t`` (expectation maximisation), and adds to ``k`` only the share ``1 - Var[L | L > t]/Var[L]`` of a request that
its age tells (the missing information principle; nothing for an exponential length).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincc, gammainccinv

from qlm_env.observation import PRIOR_OUTPUT_TOKENS, PRIOR_REQUESTS
from qlm_env.view import ClusterView

Float = NDArray[np.float64]

EM_ROUNDS = 50
EM_TOLERANCE = 1e-4
"""Relative change of the mean at which the iteration ends."""
TAIL_PROBABILITY = 1e-12
"""Beyond it a Gamma's tail is taken as an exponential of the same scale, which it approaches."""
SURVIVAL_POINTS = 256
"""Of the table that survival of running requests is read from."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of a number of tokens."""

    mean_tokens: Float
    variance_tokens2: Float


@dataclass(frozen=True, slots=True)
class TokenPosterior:
    """Output length of one request of a (model, SLO class), and how well its mean is known."""

    mean_tokens: float
    variance_tokens2: float
    """Of one request about the true mean."""
    mean_variance_tokens2: float
    """Of the true mean: all requests share this uncertainty, so it does not average out over many."""
    shared_variance_tokens2: float = 0.0
    """Of that, what other classes of the model share: the error of the prior's mean."""

    @property
    def predictive_variance_tokens2(self) -> float:
        """Of the next request's length."""
        return self.variance_tokens2 + self.mean_variance_tokens2

    @property
    def shape(self) -> float:
        """Of the Gamma distribution of one length."""
        return self.mean_tokens**2 / self.variance_tokens2

    @property
    def scale_tokens(self) -> float:
        """Of the Gamma distribution of one length."""
        return self.variance_tokens2 / self.mean_tokens

    def scaled(self, factor: float) -> TokenPosterior:
        """The same of lengths ``factor`` times as long."""
        square = factor * factor
        return TokenPosterior(
            self.mean_tokens * factor,
            self.variance_tokens2 * square,
            self.mean_variance_tokens2 * square,
            self.shared_variance_tokens2 * square,
        )

    def survival(self, tokens: Float) -> Float:
        """``P(L > tokens)``, any shape."""
        survival: Float = gammaincc(self.shape, np.maximum(tokens, 0.0) / self.scale_tokens)
        return survival

    def left_survival(self, generated_tokens: Float, ahead_tokens: Float) -> Float:
        """(R, G) ``P(L > t + n | L > t)`` for ``t`` of ``generated_tokens`` (R,) and ``n`` of ``ahead_tokens`` (G,).

        Interpolated in the logarithm of a table, which is far cheaper than the function itself.
        """
        end = self.scale_tokens * float(gammainccinv(self.shape, TAIL_PROBABILITY))
        # Denser near 0, where the density of a shape below 1 is infinite.
        table_tokens = end * np.linspace(0.0, 1.0, SURVIVAL_POINTS) ** 3
        table = np.log(gammaincc(self.shape, table_tokens / self.scale_tokens))
        from_now = np.asarray(generated_tokens, np.float64)
        log_survival = [
            np.interp(tokens, table_tokens, table) - np.maximum(0.0, tokens - end) / self.scale_tokens
            for tokens in (from_now[:, None] + ahead_tokens[None, :], from_now[:, None])
        ]
        survival: Float = np.exp(log_survival[0] - log_survival[1])
        return survival

    def quantile_tokens(self, probability: float) -> float:
        """Of the next request's length, with the uncertainty of the mean.

        Raises:
            ValueError: the probability is not strictly between 0 and 1.
        """
        if not 0.0 < probability < 1.0:
            raise ValueError(f"probability must be between 0 and 1, not {probability}")
        scale = self.predictive_variance_tokens2 / self.mean_tokens
        return float(scale * gammainccinv(self.mean_tokens / scale, 1.0 - probability))

    def remaining(self, generated_tokens: Float) -> Moments:
        """Mean and variance of ``L - t`` given ``L > t``, for ``t = generated_tokens``, any shape.

        From ``E[L^j; L > t] = scale^j * k*(k+1)*..*(k+j-1) * Q(k+j, t/scale)`` of a Gamma of shape ``k``, where ``Q``
        is the regularised upper incomplete gamma function.
        """
        k, scale = self.shape, self.scale_tokens
        x = np.asarray(generated_tokens, np.float64) / scale
        tail = gammaincc(k, x)
        known = tail > TAIL_PROBABILITY
        divisor = np.where(known, tail, 1.0)
        first = k * gammaincc(k + 1.0, x) / divisor
        second = k * (k + 1.0) * gammaincc(k + 2.0, x) / divisor
        mean = np.where(known, first - x, 1.0)
        variance = np.where(known, second - first**2, 1.0)
        # Both are differences of large numbers in the tail, and positive all the same.
        return Moments(scale * np.maximum(mean, 1e-6), scale**2 * np.maximum(variance, 1e-9))


@dataclass(frozen=True, slots=True)
class Finished:
    """What is known of the lengths of finished requests."""

    count: int
    sum_tokens: float
    sum_tokens2: float
    """Of the squares."""

    def __add__(self, other: Finished) -> Finished:
        return Finished(
            self.count + other.count, self.sum_tokens + other.sum_tokens, self.sum_tokens2 + other.sum_tokens2
        )


NO_KIND = TokenPosterior(PRIOR_OUTPUT_TOKENS, PRIOR_OUTPUT_TOKENS**2, 0.0)
"""The prior of a model: an exponential length."""


def update_posterior(finished: Finished, running_tokens: Float, prior: TokenPosterior = NO_KIND) -> TokenPosterior:
    """The posterior from finished requests and those that run.

    Args:
        running_tokens: (R,) tokens generated so far by each running request.
        prior: mean and variance of a length, and how well that mean is known; its weight is always the same.
    """
    running = np.asarray(running_tokens, np.float64)
    posterior = _conjugate(prior, finished, float(finished.count))
    if not len(running):
        return posterior
    for _ in range(EM_ROUNDS):
        before = posterior.mean_tokens
        left = posterior.remaining(running)
        whole = running + left.mean_tokens
        told = np.clip(1.0 - left.variance_tokens2 / posterior.variance_tokens2, 0.0, 1.0)
        completed = finished + Finished(
            len(running), float(whole.sum()), float((whole**2 + left.variance_tokens2).sum())
        )
        posterior = _conjugate(prior, completed, finished.count + float(told.sum()))
        if abs(posterior.mean_tokens - before) < EM_TOLERANCE * before:
            break
    return posterior


def _conjugate(prior: TokenPosterior, seen: Finished, information: float) -> TokenPosterior:
    """The module's formulas; ``information`` is what the requests are worth in knowledge of the mean."""
    k0, m0 = 2.0 * PRIOR_REQUESTS, prior.mean_tokens
    count = float(seen.count)
    a0 = 1.0 + k0 / 2.0
    b0 = (a0 - 1.0) * prior.variance_tokens2
    mean = (k0 * m0 + seen.sum_tokens) / (k0 + count)
    average = seen.sum_tokens / count if count else m0
    deviations = max(0.0, seen.sum_tokens2 - count * average**2)
    b = b0 + deviations / 2.0 + k0 * count * (average - m0) ** 2 / (2.0 * (k0 + count))
    variance = b / (a0 + count / 2.0 - 1.0)
    shared = (k0 / (k0 + information)) ** 2 * prior.mean_variance_tokens2
    return TokenPosterior(mean, variance, variance / (k0 + information) + shared, shared)


class TokenPosteriors:
    """The posteriors of every (model, SLO class) at one epoch, each worked out when it is first asked for."""

    def __init__(self, view: ClusterView) -> None:
        self._classes = range(len(view.scenario.slo.classes))
        self._view = view
        self._known: dict[tuple[int, int], TokenPosterior] = {}
        self._running: dict[tuple[int, int], list[int]] = {}
        for instance in view.instances:
            for request in instance.running():
                self._running.setdefault((request.model, request.slo_class), []).append(request.generated_tokens)

    def of(self, model: int, slo_class: int) -> TokenPosterior:
        """The posterior of one kind."""
        kind = (model, slo_class)
        if kind not in self._known:
            others = self._posterior(model, [c for c in self._classes if c != slo_class], NO_KIND)
            self._known[kind] = self._posterior(model, [slo_class], others)
        return self._known[kind]

    def _posterior(self, model: int, classes: Sequence[int], prior: TokenPosterior) -> TokenPosterior:
        finished = sum((finished_sums(self._view, model, c) for c in classes), Finished(0, 0.0, 0.0))
        running = [tokens for c in classes for tokens in self._running.get((model, c), [])]
        return update_posterior(finished, np.array(running, np.float64), prior)


def finished_sums(view: ClusterView, model: int, slo_class: int) -> Finished:
    """The finished requests of a kind: what the view gives, with its prior taken out again."""
    statistics = view.output_statistics(model, slo_class)
    weight = PRIOR_REQUESTS + statistics.finished
    total = statistics.mean_tokens * weight - PRIOR_REQUESTS * PRIOR_OUTPUT_TOKENS
    squares = (statistics.variance_tokens2 + statistics.mean_tokens**2) * weight
    squares -= PRIOR_REQUESTS * 2.0 * PRIOR_OUTPUT_TOKENS**2
    return Finished(statistics.finished, max(0.0, total), max(0.0, squares))


def mix(posteriors: Sequence[TokenPosterior], weights: Float) -> TokenPosterior:
    """The length of a request that is of kind ``k`` with probability ``weights[k] / sum(weights)``.

    Of the means' errors the kinds share what is shared; the rest is independent.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    means = np.array([p.mean_tokens for p in posteriors])
    mean = float(share @ means)
    within = float(share @ np.array([p.variance_tokens2 for p in posteriors]))
    between = float(share @ (means - mean) ** 2)
    shared = float(share @ np.sqrt([p.shared_variance_tokens2 for p in posteriors])) ** 2
    own = float(share**2 @ np.array([p.mean_variance_tokens2 - p.shared_variance_tokens2 for p in posteriors]))
    return TokenPosterior(mean, within + between, own + shared, shared)
