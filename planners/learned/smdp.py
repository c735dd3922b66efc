"""Discounting by the time that passed: a semi-Markov decision process.

Between two decisions passes a time ``dt``, from none to a second and more. With a discount of ``gamma`` a second, a
reward a decision later counts ``gamma**dt``, so that the horizon is a time and not a number of decisions, of which a
busy cluster has more. Advantages are estimated likewise (GAE with ``(gamma * gae_lambda)**dt``): the outcome of a
decision comes seconds later, whether there were ten decisions in between or a hundred.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

Floats = NDArray[np.float32]


class Clock(Protocol):
    """What the buffer asks of the environments, right after each step."""

    dt_s: NDArray[np.float64]
    """(N,) seconds that passed in the last step."""
    rewards: Floats
    """(N,) rewards of the last step."""


def smdp_advantages(
    rewards: Floats,
    values: Floats,
    dt_s: Floats,
    starts: Floats,
    last_values: Floats,
    last_starts: NDArray[Any],
    gamma: float,
    gae_lambda: float,
) -> Floats:
    """Generalised advantage estimates over T steps of N environments, shape (T, N).

    ``A_t = r_t + gamma**dt_t V_{t+1} - V_t + (gamma lambda)**dt_t A_{t+1}``, cut where an episode ended.

    Args:
        rewards, values, dt_s: (T, N); ``dt_s[t]`` passed between observations t and t + 1.
        starts: (T, N) 1 where an episode began at observation t.
        last_values, last_starts: (N,) the same of observation T.
    """
    advantages = np.zeros_like(rewards)
    discount, trace = gamma**dt_s, (gamma * gae_lambda) ** dt_s
    following = np.zeros(rewards.shape[1], np.float32)
    for t in reversed(range(len(rewards))):
        last = t == len(rewards) - 1
        goes_on = 1.0 - np.asarray(last_starts if last else starts[t + 1], np.float32)
        next_values = last_values if last else values[t + 1]
        delta = rewards[t] + discount[t] * next_values * goes_on - values[t]
        following = (delta + trace[t] * goes_on * following).astype(np.float32)
        advantages[t] = following
    return advantages


class _Smdp(RolloutBuffer):
    """Adds the time of each step to a rollout buffer.

    Args:
        clock: the environments that the rollouts are of.
    """

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any) -> None:
        self._clock = clock
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Forget all rollouts."""
        self.dt_s = np.zeros((self.buffer_size, self.n_envs), np.float32)
        super().reset()

    def add(self, obs: Any, action: Any, reward: Floats, *args: Any, **kwargs: Any) -> None:
        """Keep a step. Where an episode was cut off, ``gamma V`` has been added to the reward; dt belongs in it."""
        dt_s = self._clock.dt_s
        cut_off = reward - self._clock.rewards
        self.dt_s[self.pos] = dt_s
        super().add(obs, action, self._clock.rewards + cut_off * self.gamma ** (dt_s - 1.0), *args, **kwargs)

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: NDArray[Any]) -> None:
        """Fill ``advantages`` and ``returns``, both (T, N)."""
        last = last_values.clone().cpu().numpy().flatten()
        self.advantages = smdp_advantages(
            self.rewards, self.values, self.dt_s, self.episode_starts, last, dones, self.gamma, self.gae_lambda
        )
        self.returns = self.advantages + self.values


class SmdpDictRolloutBuffer(_Smdp, DictRolloutBuffer):
    """For A2C and PPO."""


class SmdpMaskableDictRolloutBuffer(_Smdp, MaskableDictRolloutBuffer):  # type: ignore[misc]
    """For MaskablePPO."""
