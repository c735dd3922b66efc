"""The vector environment as Stable-Baselines3 wants it: one batch of masks, no Python per environment but its infos.

Needs the `rl` extra (stable-baselines3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from qlm_env.vector import Batch, QLMVectorEnv

MASKS = "action_masks"
"""The method that sb3-contrib asks every environment for."""


class QLMVecEnv(VecEnv):
    """A :class:`~qlm_env.vector.QLMVectorEnv` behind the ``VecEnv`` interface of Stable-Baselines3.

    It gives what ``DummyVecEnv`` of as many single environments gives: rewards are float32; an info has the keys of
    the environment's, ``TimeLimit.truncated``, and where an episode ended ``terminal_observation``, while
    ``reset_infos`` has the first info of the next. ``env_method("action_masks")``, and with it sb3-contrib's
    ``get_action_masks``, costs one call for all.

    Args:
        env: the environments, which this now steps and closes.
    """

    def __init__(self, env: QLMVectorEnv) -> None:
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> dict[str, NDArray[np.float32]]:
        """Begin an episode everywhere, of the seeds given to :meth:`seed` before, or drawn ones."""
        observations, infos = self.env.reset(seed=self._seeds)
        hashes = infos["workload_hash"]
        self.reset_infos = [
            info | {"workload_hash": text} for info, text in zip(self._listed(infos), hashes, strict=True)
        ]
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: NDArray[np.integer[Any]]) -> None:
        """Take note of the actions, (N,), which :meth:`step_wait` carries out."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Carry out the actions; returns observations, rewards, dones, infos."""
        batch: Batch = self.env.advance(self._actions)
        infos = self._listed(batch.infos)
        for info in infos:
            info["TimeLimit.truncated"] = False
        for ended in batch.ended:
            infos[ended.env] = ended.info | {
                "TimeLimit.truncated": bool(batch.truncations[ended.env]),
                "terminal_observation": ended.observation,
            }
            self.reset_infos[ended.env] = ended.next_info
        dones = batch.terminations | batch.truncations
        return batch.observations, batch.rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Stop the environment's threads."""
        self.env.close()

    # ----------------------------------------------------------------- single environments, as if there were any
    def has_attr(self, attr_name: str) -> bool:
        """Whether :meth:`get_attr` knows it."""
        return hasattr(self.env, attr_name)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The vector environment's attribute, once for each environment: settings, codec, spaces.

        Raises:
            AttributeError: it has no such attribute.
        """
        return [getattr(self.env, attr_name)] * len(self._chosen(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: the environments have no attributes of their own.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"'{attr_name}' cannot be set: environments in a batch have no attributes of their own")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """``action_masks`` of each environment, shape (n,) each.

        Raises:
            AttributeError: another method; environments in a batch have none of their own.
        """
        if method_name != MASKS:
            raise AttributeError(f"no method '{method_name}' of environments in a batch; allowed: {MASKS}")
        masks = self.env.action_masks()
        return list(masks if indices is None else masks[self._chosen(indices)])

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Never: nothing can be wrapped around one environment of a batch."""
        return [False] * len(self._chosen(indices))

    def get_images(self) -> Sequence[None]:
        """No pictures; single environments draw them."""
        return [None] * self.num_envs

    def _chosen(self, indices: VecEnvIndices) -> list[int]:
        chosen: Iterable[int] = self._get_indices(indices)
        return list(chosen)

    def _listed(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """One info for each environment, with the keys of a single one's."""
        return [
            {"dt": dt, "now_s": now_s, "invalid_action": invalid, "action_mask": mask, "row_groups": rows}
            for dt, now_s, invalid, mask, rows in zip(
                infos["dt"].tolist(),
                infos["now_s"].tolist(),
                infos["invalid_action"].tolist(),
                infos["action_mask"],
                infos["row_groups"],
                strict=True,
            )
        ]
