"""The networks as Stable-Baselines3's algorithms want them."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from planners.learned.networks import make_network
from planners.learned.spec import PolicySpec

MASK_KEY = "action_mask"
"""Where the mask stands in the observations of algorithms that know of none."""

Masks = np.ndarray | Tensor | None


class ActorCriticPolicy(MaskableActorCriticPolicy):
    """For MaskablePPO, and for A2C with the mask in the observation.

    Args:
        observation_space, action_space, lr_schedule, **kwargs: as of ``MaskableActorCriticPolicy``.
        policy: the network and its sizes.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        policy: PolicySpec,
        use_sde: bool = False,
        **kwargs: Any,
    ) -> None:
        self.spec = policy
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.network = make_network(self.spec.network, self.spec.spaces)
        optimizer: Any = self.optimizer_class
        self.optimizer = optimizer(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def get_distribution(self, obs: Any, action_masks: Masks = None) -> MaskableDistribution:
        """The distribution over actions."""
        distribution = self.action_dist.proba_distribution(action_logits=self.network.logits(obs))
        distribution.apply_masking(obs[MASK_KEY] > 0 if action_masks is None and MASK_KEY in obs else action_masks)
        return distribution

    def forward(
        self, obs: Any, deterministic: bool = False, action_masks: Masks = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (B,), values (B, 1) and log probabilities (B,)."""
        distribution = self.get_distribution(obs, action_masks)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.network.value(obs), distribution.log_prob(actions)

    def evaluate_actions(
        self, obs: Any, actions: Tensor, action_masks: Masks = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values (B, 1), log probabilities (B,) and entropies (B,)."""
        distribution = self.get_distribution(obs, action_masks)
        return self.network.value(obs), distribution.log_prob(actions), distribution.entropy()

    def predict_values(self, obs: Any) -> Tensor:
        """(B, 1) values."""
        return self.network.value(obs)
