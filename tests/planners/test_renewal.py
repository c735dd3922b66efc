"""Places in a batch as renewal processes, against simulation of every place."""

from __future__ import annotations

import numpy as np
import pytest

from planners.renewal import Resident, fill_renewals, held_tokens, left_when_settled, turnover
from planners.token_posterior import TokenPosterior

PLACES = 6
SAMPLES = 20_000


def simulate(
    rng: np.random.Generator, posterior: TokenPosterior, ages: np.ndarray, prompts: np.ndarray, prompt: float, at: float
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) admissions by step ``at`` and tokens held then, with a queue of requests of prompt ``prompt``."""
    admissions, held = np.zeros(SAMPLES), np.zeros(SAMPLES)
    for age, resident_prompt in zip(ages, prompts, strict=True):
        lengths = rng.gamma(posterior.shape, posterior.scale_tokens, 40 * SAMPLES)
        ends = lengths[lengths > age][:SAMPLES] - age
        began, prompt_here = np.full(SAMPLES, -age), np.full(SAMPLES, resident_prompt)
        while (ends <= at).any():
            over = ends <= at
            admissions += over
            began[over], prompt_here[over] = ends[over], prompt
            ends[over] += rng.gamma(posterior.shape, posterior.scale_tokens, int(over.sum()))
        held += prompt_here + at - began
    return admissions, held


@pytest.mark.parametrize("cv", [0.6, 1.0])
@pytest.mark.parametrize("at_means", [0.3, 1.0, 3.0])
def test_turnover_agrees_with_simulation(cv: float, at_means: float) -> None:
    posterior = TokenPosterior(200.0, (200.0 * cv) ** 2, 0.0)
    ages = np.array([0.0, 20.0, 60.0, 120.0, 250.0, 400.0])
    prompts = np.array([10.0, 20.0, 100.0, 50.0, 200.0, 90.0])
    admissions, held = simulate(np.random.default_rng(0), posterior, ages, prompts, 150.0, at_means * 200)
    batch = turnover([Resident(posterior, ages, prompts)], posterior, 150.0, 0.0, 1.0, 100.0)

    def at(column: np.ndarray) -> float:
        return float(np.interp(at_means * 200, batch.steps, column))

    assert at(batch.admissions) == pytest.approx(admissions.mean(), abs=0.04)
    assert at(batch.variance) == pytest.approx(admissions.var(), rel=0.08)
    assert at(batch.kv_tokens) == pytest.approx(held.mean(), rel=0.03)
    assert at(batch.sequences) == pytest.approx(PLACES, rel=0.02)


def test_places_that_are_free_are_filled_at_once() -> None:
    posterior = TokenPosterior(200.0, 2e4, 0.0)
    batch = turnover([], posterior, 100.0, 5.0, 1.0, 50.0)
    assert batch.admissions[0] == 5.0
    assert batch.sequences[1:] == pytest.approx(5.0, rel=0.02)
    assert batch.kv_tokens[0] == 500.0


def test_far_ahead_everything_is_linear() -> None:
    posterior = TokenPosterior(200.0, 2e4, 0.0)
    resident = Resident(posterior, np.linspace(0, 300, 8), np.full(8, 100.0))
    batch = turnover([resident], posterior, 100.0, 0.0, 1.0, 5000.0)
    assert batch.admissions[-1] == pytest.approx(5000.0)
    rate = np.diff(batch.admissions) / np.diff(batch.steps)
    assert rate[-2] == pytest.approx(rate[-1], rel=1e-3)
    assert batch.kv_tokens[-2] == pytest.approx(batch.kv_tokens[-1], rel=0.01)
    assert batch.kv_tokens[-1] == pytest.approx(8 * held_tokens(posterior, 100.0))
    growth = np.diff(batch.variance)[-2] / np.diff(batch.steps)[-2]
    assert growth == pytest.approx(8 * 2e4 / 200.0**3, rel=0.02)


def test_fewer_places_are_filled_again_when_memory_holds_less() -> None:
    posterior = TokenPosterior(200.0, 2e4, 0.0)
    resident = Resident(posterior, np.zeros(10), np.full(10, 100.0))
    all_again = turnover([resident], posterior, 100.0, 0.0, 1.0, 10.0)
    half = turnover([resident], posterior, 100.0, 0.0, 0.5, 10.0)
    assert half.admissions[:-1] == pytest.approx(all_again.admissions[:-1] / 2)
    assert half.sequences[-1] == 5.0


def test_renewals_of_lengths_that_are_all_alike() -> None:
    mass = np.zeros(12)
    mass[4] = 1.0
    renewals = np.empty(12)
    fill_renewals(mass, renewals)
    assert np.flatnonzero(renewals).tolist() == [4, 8]


def test_what_is_left_at_a_random_time() -> None:
    exponential = TokenPosterior(100.0, 1e4, 0.0)
    ahead = np.linspace(0, 2000, 2001)
    assert left_when_settled(exponential, ahead) == pytest.approx(np.exp(-ahead / 100.0), abs=1e-3)
