"""Posteriors of output lengths, against sampling and plain formulas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from planners import make_planner
from planners.spec import FcfsSpec
from planners.token_posterior import (
    Finished,
    Float,
    TokenPosterior,
    TokenPosteriors,
    finished_sums,
    mix,
    update_posterior,
)
from qlm_env.env import QLMEnv
from qlm_env.observation import PRIOR_OUTPUT_TOKENS, PRIOR_REQUESTS

NOTHING = np.empty(0)
WEIGHT = 2 * PRIOR_REQUESTS
"""Requests that a prior is worth."""


def update(finished: Sequence[float] | Float, running: Sequence[float] | Float = NOTHING) -> TokenPosterior:
    lengths = np.asarray(finished, float)
    seen = Finished(len(lengths), float(lengths.sum()), float((lengths**2).sum()))
    return update_posterior(seen, np.asarray(running, float))


def test_without_data_it_is_the_prior() -> None:
    prior = update([])
    assert prior.mean_tokens == PRIOR_OUTPUT_TOKENS
    assert prior.variance_tokens2 == pytest.approx(PRIOR_OUTPUT_TOKENS**2)
    assert prior.mean_variance_tokens2 == pytest.approx(PRIOR_OUTPUT_TOKENS**2 / WEIGHT)


def test_finished_requests_update_it_as_the_conjugate_formulas_say() -> None:
    """Against numerical integration of likelihood times prior over a grid of mean and variance."""
    lengths = np.array([120.0, 300.0, 210.0, 90.0, 400.0])
    posterior = update(lengths)
    mean = np.linspace(-900, 1500, 1201)[:, None]
    variance = np.geomspace(1e2, 1e8, 3001)[None, :]
    a0, b0 = 1 + WEIGHT / 2, WEIGHT / 2 * PRIOR_OUTPUT_TOKENS**2
    log = -(a0 + 1.5) * np.log(variance) - (b0 + WEIGHT * (mean - PRIOR_OUTPUT_TOKENS) ** 2 / 2) / variance
    for length in lengths:
        log = log - np.log(variance) / 2 - (length - mean) ** 2 / (2 * variance)
    density = np.exp(log - log.max()) * variance  # the grid of variances is even in the logarithm
    density /= density.sum()
    assert posterior.mean_tokens == pytest.approx(float((density * mean).sum()), rel=1e-4)
    assert posterior.variance_tokens2 == pytest.approx(float((density * variance).sum()), rel=2e-3)
    spread = float((density * (mean - posterior.mean_tokens) ** 2).sum())
    assert posterior.mean_variance_tokens2 == pytest.approx(spread, rel=5e-3)


def test_many_finished_requests_are_believed() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.gamma(2.0, 150.0, 4000)
    posterior = update(lengths)
    assert posterior.mean_tokens == pytest.approx(lengths.mean(), rel=0.01)
    assert posterior.variance_tokens2 == pytest.approx(lengths.var(), rel=0.02)
    assert posterior.mean_variance_tokens2 == pytest.approx(lengths.var() / 4000, rel=0.05)


def test_running_requests_correct_for_the_short_ones_finishing_first() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.gamma(2.0, 200.0, 300)
    at = 150.0
    finished, running = lengths[lengths <= at], np.full((lengths > at).sum(), at)
    assert update(finished).mean_tokens < 150
    assert update(finished, running).mean_tokens == pytest.approx(400, rel=0.15)


def test_exponential_lengths_have_the_known_answer() -> None:
    """Total tokens over finished requests; the age of a running one tells nothing of its own remainder."""
    rng = np.random.default_rng(2)
    lengths = rng.exponential(300.0, 2000)
    at = rng.uniform(0, 900, 2000)
    finished = lengths[lengths <= at]
    running = at[lengths > at]
    posterior = update(finished, running)
    assert posterior.mean_tokens == pytest.approx(np.minimum(lengths, at).sum() / len(finished), rel=0.05)
    # So the running ones hardly count as observations.
    effective = posterior.variance_tokens2 / posterior.mean_variance_tokens2 - WEIGHT
    assert effective == pytest.approx(len(finished), rel=0.1)


@pytest.mark.parametrize(("mean", "cv"), [(300.0, 0.5), (300.0, 1.0), (80.0, 1.6)])
def test_what_remains_agrees_with_sampling(mean: float, cv: float) -> None:
    rng = np.random.default_rng(3)
    posterior = TokenPosterior(mean, (cv * mean) ** 2, 0.0)
    lengths = rng.gamma(posterior.shape, posterior.scale_tokens, 400_000)
    for generated in (0.0, 0.5 * mean, 1.5 * mean):
        left = lengths[lengths > generated] - generated
        remaining = posterior.remaining(np.array([generated]))
        assert remaining.mean_tokens[0] == pytest.approx(left.mean(), rel=0.02)
        assert remaining.variance_tokens2[0] == pytest.approx(left.var(), rel=0.05)
        ahead = mean * np.array([0.1, 0.7, 2.0])
        survival = posterior.left_survival(np.array([generated]), ahead)[0]
        assert survival == pytest.approx([(left > n).mean() for n in ahead], abs=0.01)
    assert posterior.quantile_tokens(0.9) == pytest.approx(np.quantile(lengths, 0.9), rel=0.02)


def test_the_far_tail_is_finite_and_positive() -> None:
    posterior = TokenPosterior(100.0, 2500.0, 0.0)
    remaining = posterior.remaining(np.array([1e4, 1e6]))
    assert np.all(remaining.mean_tokens > 0)
    assert np.all(np.isfinite(remaining.variance_tokens2))
    survival = posterior.left_survival(np.array([1e6]), np.array([0.0, 25.0, 1e4]))[0]
    assert survival[0] == 1.0
    assert survival[1] == pytest.approx(np.exp(-1.0), rel=0.01)
    assert survival[2] < 1e-12


def test_uncertainty_of_the_mean_widens_quantiles() -> None:
    known, unknown = TokenPosterior(300.0, 3e4, 0.0), TokenPosterior(300.0, 3e4, 3e4)
    assert unknown.quantile_tokens(0.95) > known.quantile_tokens(0.95)
    assert unknown.predictive_variance_tokens2 == 6e4
    with pytest.raises(ValueError, match="between 0 and 1"):
        known.quantile_tokens(1.0)


def test_scaling_and_mixing() -> None:
    short, long = TokenPosterior(100.0, 1e4, 100.0, 25.0), TokenPosterior(500.0, 4e4, 400.0, 100.0)
    assert short.scaled(2.0) == TokenPosterior(200.0, 4e4, 400.0, 100.0)
    both = mix([short, long], np.array([3.0, 1.0]))
    assert both.mean_tokens == 200.0
    assert both.variance_tokens2 == pytest.approx(0.75 * 1e4 + 0.25 * 4e4 + 0.75 * 100**2 + 0.25 * 300**2)
    assert both.shared_variance_tokens2 == pytest.approx((0.75 * 5 + 0.25 * 10) ** 2)
    own = both.mean_variance_tokens2 - both.shared_variance_tokens2
    assert own == pytest.approx(0.75**2 * 75 + 0.25**2 * 300)


def test_what_the_prior_does_not_know_is_shared() -> None:
    vague = TokenPosterior(200.0, 4e4, 900.0)
    without = update_posterior(Finished(0, 0.0, 0.0), NOTHING, vague)
    assert without.mean_tokens == 200.0
    assert without.shared_variance_tokens2 == pytest.approx(900.0)
    assert without.mean_variance_tokens2 == pytest.approx(4e4 / WEIGHT + 900.0)
    informed = update_posterior(Finished(1000, 2e5, 8e7), NOTHING, vague)
    assert informed.shared_variance_tokens2 < 1.0


def test_a_class_learns_from_the_others_of_its_model_and_knows_no_hidden_length() -> None:
    env = QLMEnv("smoke", {"preset": "smoke", "num_requests": 120, "arrivals": {"kind": "poisson", "load": 1.0}})
    env.reset(seed=1)
    planner = make_planner(FcfsSpec())
    planner.reset(env.view, np.random.default_rng(0))
    before = TokenPosteriors(env.view)
    assert before.of(0, 0).mean_tokens == pytest.approx(PRIOR_OUTPUT_TOKENS, rel=0.05)
    while env.view.output_statistics(0, 1).finished < 12:
        env.step_plan(planner.act(env.view))
    statistics = env.view.output_statistics(0, 1)
    weight = PRIOR_REQUESTS + statistics.finished
    total = statistics.mean_tokens * weight - PRIOR_REQUESTS * PRIOR_OUTPUT_TOKENS
    assert finished_sums(env.view, 0, 1).sum_tokens == pytest.approx(total)
    after = TokenPosteriors(env.view)
    # Class 2 of this model never has a request: what it is expected to be is what the others are.
    assert after.of(0, 2).mean_tokens != pytest.approx(PRIOR_OUTPUT_TOKENS, rel=0.01)
    assert after.of(0, 2).mean_variance_tokens2 > after.of(0, 1).mean_variance_tokens2
    assert after.of(1, 1).mean_tokens != after.of(0, 1).mean_tokens
