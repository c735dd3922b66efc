"""DQN that keeps to legal actions: in exploration, in its own choice, and in the maximum of its target.

Masks and discounts stand in the observations, so that Stable-Baselines3's replay buffer keeps them with no change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn, VecEnvWrapper
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor

from planners.learned.networks import ILLEGAL, make_network
from planners.learned.policies import MASK_KEY
from planners.learned.spec import PolicySpec
from planners.learned.training_env import TrainingVecEnv

DISCOUNT_KEY = "discount"
"""Where ``gamma**dt`` of the step that led to an observation stands in it."""

Observations = dict[str, NDArray[Any]]


class MaskInObservation(VecEnvWrapper):
    """Adds ``action_mask`` (n,) and ``discount`` (1,) to every observation.

    Args:
        venv: the environments.
        gamma: discount a second.
    """

    venv: TrainingVecEnv

    def __init__(self, venv: TrainingVecEnv, gamma: float) -> None:
        assert isinstance(venv.observation_space, spaces.Dict)
        assert isinstance(venv.action_space, spaces.Discrete)
        self._gamma = gamma
        more: dict[str, spaces.Space[Any]] = {
            MASK_KEY: spaces.Box(0, 1, (int(venv.action_space.n),), np.int8),
            DISCOUNT_KEY: spaces.Box(0.0, 1.0, (1,), np.float32),
        }
        super().__init__(venv, observation_space=spaces.Dict({**venv.observation_space.spaces, **more}))

    @property
    def dt_s(self) -> NDArray[np.float64]:
        """(N,) seconds that passed in the last step."""
        return self.venv.dt_s

    @property
    def rewards(self) -> NDArray[np.float32]:
        """(N,) rewards of the last step."""
        return self.venv.rewards

    def reset(self) -> Observations:
        """As of the environments."""
        observation: Any = self.venv.reset()
        return self._with_more(observation)

    def step_wait(self) -> VecEnvStepReturn:
        """As of the environments; a terminal observation allows ``advance`` alone."""
        observation, rewards, dones, infos = self.venv.step_wait()
        for k in np.flatnonzero(dones):
            mask = np.zeros(self._masks.shape[1], np.int8)
            mask[0] = 1
            discount = np.array([self._gamma ** self.venv.dt_s[k]], np.float32)
            infos[k]["terminal_observation"] |= {MASK_KEY: mask, DISCOUNT_KEY: discount}
        return self._with_more(observation), rewards, dones, infos

    @property
    def _masks(self) -> NDArray[np.bool_]:
        return self.venv.action_masks()

    def _with_more(self, observation: Observations) -> Observations:
        discount = (self._gamma**self.venv.dt_s).astype(np.float32)[:, None]
        return observation | {MASK_KEY: self._masks.astype(np.int8), DISCOUNT_KEY: discount}


class SmdpReplayBuffer(DictReplayBuffer):
    """Discounts each step by the time it took."""

    def _get_samples(self, batch_inds: Any, env: Any = None) -> DictReplayBufferSamples:  # type: ignore[override]
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(discounts=samples.next_observations[DISCOUNT_KEY])


class MaskedQNetwork(BasePolicy):
    """Values of actions, those of illegal ones far below all others."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], policy: PolicySpec
    ) -> None:
        super().__init__(observation_space, action_space)
        self.network = make_network(policy.network, policy.spaces)

    def forward(self, obs: Any) -> Tensor:
        """(B, n)"""
        return self.network.logits(obs).masked_fill(obs[MASK_KEY] == 0, ILLEGAL)

    def _predict(self, observation: Any, deterministic: bool = True) -> Tensor:
        actions: Tensor = self(observation).argmax(1)
        return actions


class MaskedDQNPolicy(DQNPolicy):
    """A network of this project as the Q-network.

    Args:
        policy: the network and its sizes.
    """

    def __init__(self, *args: Any, policy: PolicySpec, **kwargs: Any) -> None:
        self._policy = policy
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> Any:
        """The Q-network, once for values and once for targets."""
        return MaskedQNetwork(self.observation_space, self.action_space, self._policy).to(self.device)


class MaskedDQN(DQN):
    """DQN that explores among legal actions, each environment for itself."""

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], Any]:
        """Actions (N,): of the largest value, or, with the exploration rate, any legal one."""
        actions, state = self.policy.predict(observation, state, episode_start, True)
        if not deterministic:
            masks = np.atleast_2d(observation[MASK_KEY])
            # NumPy's global generator is the one that Stable-Baselines3 seeds for exploration.
            for k in np.flatnonzero(np.random.random(len(masks)) < self.exploration_rate):  # noqa: NPY002
                actions[k] = np.random.choice(np.flatnonzero(masks[k]))  # noqa: NPY002
        return actions, state
