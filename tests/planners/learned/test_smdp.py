"""Returns and advantages discounted by time, against sums worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("sb3_contrib", reason="needs the train extra")

from gymnasium import spaces  # noqa: E402
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer  # noqa: E402

from planners.learned.smdp import SmdpMaskableDictRolloutBuffer, smdp_advantages  # noqa: E402

GAMMA = 0.5


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def advantages(**changes: Any) -> np.ndarray:
    given: dict[str, Any] = {
        "rewards": column(1, 2, 3),
        "values": column(0, 0, 0),
        "dt_s": column(1, 2, 0),
        "starts": column(1, 0, 0),
        "last_values": np.array([8.0], np.float32),
        "last_starts": np.array([False]),
        "gamma": GAMMA,
        "gae_lambda": 1.0,
    }
    return smdp_advantages(**(given | changes))[:, 0]


def test_returns_worked_out_by_hand() -> None:
    # 3 + 0.5^0 * 8 = 11;  2 + 0.5^2 * 11 = 4.75;  1 + 0.5^1 * 4.75 = 3.375
    np.testing.assert_allclose(advantages(), [3.375, 4.75, 11.0])


def test_an_episode_that_ended_passes_nothing_on() -> None:
    np.testing.assert_allclose(advantages(starts=column(1, 0, 1)), [1 + 0.5 * 2, 2.0, 11.0])
    np.testing.assert_allclose(advantages(last_starts=np.array([True])), [1 + 0.5 * 2.75, 2 + 0.25 * 3, 3.0])


def test_lambda_counts_by_time_as_well() -> None:
    # With lambda = 0.5 a second: deltas are 1, 2, 11 (no values but the last); traces 0.25 and 0.0625.
    np.testing.assert_allclose(advantages(gae_lambda=0.5), [1 + 0.25 * (2 + 0.0625 * 11), 2 + 0.0625 * 11, 11.0])


def test_values_are_subtracted() -> None:
    found = advantages(values=column(10, 20, 30), gae_lambda=1e-9)
    # One-step errors; the last takes no time, so nothing is cut from it.
    np.testing.assert_allclose(found, [1 + 0.5 * 20 - 10, 2 + 0.25 * 30 - 20, 3 + 8 - 30], rtol=1e-5)


def buffers(dt_s: np.ndarray, gamma: float) -> tuple[Any, Any, Any]:
    space = spaces.Dict({"x": spaces.Box(-1, 1, (1,))})
    clock = SimpleNamespace(dt_s=None, rewards=None)
    shape: dict[str, Any] = {"gamma": gamma, "gae_lambda": 0.9, "n_envs": dt_s.shape[1]}
    arguments = (len(dt_s), space, spaces.Discrete(2), "cpu")
    ours = SmdpMaskableDictRolloutBuffer(*arguments, clock=clock, **shape)
    return ours, MaskableDictRolloutBuffer(*arguments, **shape), clock


def fill(buffer: Any, clock: Any, dt_s: np.ndarray, bootstraps: np.ndarray, seed: int = 0) -> None:
    """Random rollouts; ``bootstraps`` is what the algorithm adds to rewards where an episode was cut off."""
    rng = np.random.default_rng(seed)
    num_envs = dt_s.shape[1]
    buffer.reset()
    for t in range(len(dt_s)):
        clock.dt_s, clock.rewards = dt_s[t], rng.normal(size=num_envs).astype(np.float32)
        starts, values = rng.random(num_envs) < 0.3, torch.from_numpy(rng.normal(size=num_envs).astype(np.float32))
        given = (clock.rewards + bootstraps[t]).astype(np.float32)
        buffer.add({"x": np.zeros((num_envs, 1))}, np.zeros((num_envs, 1)), given, starts, values, values)
    buffer.compute_returns_and_advantage(torch.ones(num_envs), np.zeros(num_envs, bool))


def test_a_second_a_step_is_what_stable_baselines_does() -> None:
    dt_s = np.ones((5, 3))
    ours, theirs, clock = buffers(dt_s, 0.8)
    bootstraps = np.random.default_rng(1).normal(size=(5, 3))
    fill(ours, clock, dt_s, bootstraps)
    fill(theirs, clock, dt_s, bootstraps)
    np.testing.assert_allclose(ours.advantages, theirs.advantages, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-5, atol=1e-6)


def test_what_an_episode_cut_off_would_have_earned_is_discounted_by_time() -> None:
    """Stable-Baselines3 adds ``gamma * value``, as if the step had taken one second; it took three."""
    dt_s = np.full((1, 1), 3.0)
    ours, _, clock = buffers(dt_s, GAMMA)
    value = 4.0
    fill(ours, clock, dt_s, np.full((1, 1), GAMMA * value))
    assert ours.rewards[0, 0] == pytest.approx(clock.rewards[0] + GAMMA**3 * value, rel=1e-5)
