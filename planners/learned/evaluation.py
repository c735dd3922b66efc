"""How good a network is: its likeliest actions on held-out workloads, all at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from planners.learned.base import Network
from planners.learned.networks import likeliest
from planners.learned.spec import ActionSet
from planners.learned.training_env import TrainingVecEnv
from qlm_env.spec import ScenarioSpec
from qlm_env.vector import QLMVectorEnv

FIRST_SEED = 1 << 29
"""Evaluations use the workloads from this seed on; trainings draw theirs from elsewhere."""


def make_vector_env(scenario: ScenarioSpec, num_envs: int, threads: int) -> QLMVectorEnv:
    """Environments of a validated scenario."""
    return QLMVectorEnv(
        num_envs,
        scenario.cluster.model_dump(),
        scenario.workload.model_dump(),
        scenario.slo.model_dump(),
        scenario.environment.model_dump(),
        threads=threads,
    )


class HeldOut:
    """Episodes of held-out workloads.

    Args:
        scenario: what is served.
        actions: what the policy chooses from.
        count: workloads.
    """

    def __init__(self, scenario: ScenarioSpec, actions: ActionSet, count: int) -> None:
        self._env = TrainingVecEnv([make_vector_env(scenario, count, 1)], actions, gamma=0.99, reward_scale=1.0)

    def metrics(self, network: Network) -> list[dict[str, Any]]:
        """``info["metrics"]`` of every episode, in order of seed."""
        env = self._env
        env.seed(FIRST_SEED)
        observation = env.reset()
        found: dict[int, dict[str, Any]] = {}
        with torch.no_grad():
            while len(found) < env.num_envs:
                tensors = {name: torch.from_numpy(array) for name, array in observation.items()}
                actions = likeliest(network.logits(tensors), torch.from_numpy(env.action_masks()))
                env.step_async(actions.numpy())
                observation, _, dones, infos = env.step_wait()
                for k in np.flatnonzero(dones):
                    found.setdefault(int(k), infos[k]["metrics"])
        return [found[k] for k in range(env.num_envs)]

    def close(self) -> None:
        """Close the environments."""
        self._env.close()
