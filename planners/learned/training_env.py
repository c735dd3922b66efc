"""The environments a policy is trained in, as Stable-Baselines3's ``VecEnv``.

One :class:`~qlm_env.vector.QLMVectorEnv` per scenario. Beside them it does what makes learning practicable:

- actions come from an :class:`~planners.learned.action_set.ActionSet`;
- where ``advance`` is all there is to choose, time passes without asking the policy, to the next real choice;
- rewards are discounted by time within a step and scaled, so that meeting every SLO is worth about
  ``reward_scale`` from any point of an episode on;
- scenarios with fewer instances are padded to the largest, so that one batch holds clusters of several sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from planners.learned.action_set import choose_from, make_layout, make_rules
from planners.learned.sb3_vec_env import MASKS
from planners.learned.spec import ActionSet
from qlm_env.lso import ActionCodec
from qlm_env.observation import observation_space
from qlm_env.spec import ConfigError
from qlm_env.vector import Batch, Ended, Observations, QLMVectorEnv

MOST_SKIPS = 256
"""Steps that one environment may be ahead of the policy's others in a batch; then the policy is asked anyway."""


class Part:
    """The environments of one scenario.

    Args:
        env: the environments.
        actions: what the policy chooses from.
        gamma: discount a second.
        reward_scale: about what an episode of met SLOs is worth.
    """

    def __init__(self, env: QLMVectorEnv, actions: ActionSet, gamma: float, reward_scale: float) -> None:
        self.env = env
        self.codec = env.codec
        num_classes = len(env.scenario.slo.classes)
        self._layout = make_layout(env.codec.num_rows, env.codec.num_instances, env.codec.num_models, num_classes)
        self._rules = make_rules(actions)
        self._gamma = gamma
        self._reward_scale = reward_scale
        n = env.num_envs
        self.masks = np.zeros((n, env.codec.num_actions), bool)
        self._forced = np.zeros(n, bool)
        self._scratch = np.zeros(env.codec.num_instances, np.int64)
        self.observations: Observations = {}
        self._scale = np.ones(n)

    def reset(self, seeds: Sequence[int | None]) -> None:
        """Begin an episode everywhere."""
        self.observations, infos = self.env.reset(seed=seeds)
        self._choose(infos["action_mask"])
        self._scale[:] = self._scales(range(self.env.num_envs))

    def step(self, actions: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Ended]]:
        """Take the actions and let time pass to where each environment has a choice again.

        Returns:
            rewards (N,), seconds passed (N,), what ended.
        """
        n = self.env.num_envs
        batch = self.env.advance(actions)
        self.observations = batch.observations
        self._choose(batch.infos["action_mask"])
        rewards, dt_s = batch.rewards.copy(), _dt_s(batch)
        ended = list(batch.ended)
        over = np.zeros(n, bool)
        over[[e.env for e in ended]] = True
        for _ in range(MOST_SKIPS):
            waiting = np.flatnonzero(self._forced & ~over)
            if not len(waiting):
                break
            batch = self.env.advance(np.zeros(n, np.int64), only=waiting)
            for name, array in batch.observations.items():
                self.observations[name][waiting] = array[waiting]
            self._choose(batch.infos["action_mask"])
            rewards[waiting] += self._gamma ** dt_s[waiting] * batch.rewards[waiting]
            dt_s[waiting] += _dt_s(batch)[waiting]
            ended += batch.ended
            over[[e.env for e in ended]] = True
        rewards *= self._scale
        if ended:
            begun = [e.env for e in ended]
            self._scale[begun] = self._scales(begun)
        return rewards, dt_s, ended

    def state(self) -> dict[str, NDArray[Any]]:
        """Where the environments stand, as arrays."""
        own = {"masks": self.masks, "forced": self._forced, "scale": self._scale, **self.observations}
        return {f"own_{name}": array.copy() for name, array in own.items()} | self.env.state()

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Put them there again; after a reset.

        Raises:
            ConfigError: the state is of other settings.
        """
        self.env.restore(state)
        self.masks[:], self._forced[:], self._scale[:] = (state[f"own_{n}"] for n in ("masks", "forced", "scale"))
        self.observations = {name: state[f"own_{name}"].copy() for name in self.observations}

    def _choose(self, legal: NDArray[np.int8]) -> None:
        groups = self.observations["groups"]
        choose_from(self._rules, self._layout, legal, groups, self.masks, self._forced, self._scratch)

    def _scales(self, envs: Sequence[int] | range) -> NDArray[np.float64]:
        """Rewards of an episode sum up to 1: per horizon, by how many horizons its arrivals take."""
        horizon_s = -1.0 / np.log(self._gamma)
        drain_s = self.env.scenario.environment.max_drain_s
        lasts_s = np.array([self.env.horizon_s(k) - drain_s for k in envs])
        scales: NDArray[np.float64] = self._reward_scale * np.maximum(1.0, lasts_s / horizon_s)
        return scales


def _dt_s(batch: Batch) -> NDArray[np.float64]:
    """(N,) seconds that passed in a step, those of the last step where an episode ended."""
    dt_s: NDArray[np.float64] = batch.infos["dt"]
    for ended in batch.ended:
        dt_s[ended.env] = ended.info["dt"]
    return dt_s


class TrainingVecEnv(VecEnv):
    """Environments of several scenarios in one batch; those of a scenario stand next to each other.

    Scenarios must agree in models, SLO classes and ``environment.max_groups``. ``dt_s`` and ``rewards`` are those of
    the last step (:class:`planners.learned.smdp.Clock`).

    Args:
        envs: one for each scenario.
        actions, gamma, reward_scale: see :class:`Part`.

    Raises:
        ConfigError: the scenarios do not go together.
    """

    def __init__(self, envs: Sequence[QLMVectorEnv], actions: ActionSet, gamma: float, reward_scale: float) -> None:
        self.parts = [Part(env, actions, gamma, reward_scale) for env in envs]
        widest = max(envs, key=lambda env: env.codec.num_instances)
        codec = widest.codec
        classes = len(widest.scenario.slo.classes)
        for env in envs:
            shape = (env.codec.num_rows, env.codec.num_models, len(env.scenario.slo.classes))
            if shape != (codec.num_rows, codec.num_models, classes):
                raise ConfigError(
                    "scenarios trained on together must agree in max_groups, models and SLO classes: "
                    f"{shape} and {(codec.num_rows, codec.num_models, classes)}"
                )
        self.codec = codec
        space = observation_space(codec.num_rows, codec.num_instances, codec.num_models, classes)
        sizes = [env.num_envs for env in envs]
        self._rows = [slice(stop - size, stop) for size, stop in zip(sizes, np.cumsum(sizes), strict=True)]
        self._padded = [padded_actions(part.codec, codec) for part in self.parts]
        self._from_padded = [np.full(codec.num_actions, -1) for _ in self.parts]
        for back, there in zip(self._from_padded, self._padded, strict=True):
            back[there] = np.arange(len(there))
        super().__init__(sum(sizes), space, spaces.Discrete(codec.num_actions))
        self._masks = np.zeros((self.num_envs, codec.num_actions), bool)
        self.dt_s = np.zeros(self.num_envs)
        self.rewards = np.zeros(self.num_envs, np.float32)
        self._nothing: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        self._lengths = np.zeros(self.num_envs, np.int64)

    def reset(self) -> dict[str, NDArray[np.float32]]:
        """Begin an episode everywhere, of the seeds given to :meth:`seed` before, or drawn ones."""
        for part, rows in zip(self.parts, self._rows, strict=True):
            part.reset(self._seeds[rows])
        self._lengths[:] = 0
        self._reset_seeds()
        return self._look()

    def step_async(self, actions: NDArray[np.integer[Any]]) -> None:
        """Take note of the actions, (N,), which :meth:`step_wait` carries out."""
        self._actions = np.asarray(actions, np.int64)

    def step_wait(
        self,
    ) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Carry out the actions; returns observations, rewards, dones, infos.

        An info holds something where an episode ended: ``terminal_observation``, ``TimeLimit.truncated``, ``metrics``,
        and ``episode`` as ``Monitor`` tells it.
        """
        dones = np.zeros(self.num_envs, bool)
        infos = list(self._nothing)
        self._lengths += 1
        rewards = np.zeros(self.num_envs)
        for part, rows, own in zip(self.parts, self._rows, self._from_padded, strict=True):
            rewards[rows], self.dt_s[rows], ended = part.step(own[self._actions[rows]])
            for end in ended:
                k = rows.start + end.env
                dones[k] = True
                metrics = end.info["metrics"]
                infos[k] = {
                    "terminal_observation": self._padded_observation(end.observation),
                    # Where an episode is cut off, all that is left counts as missed: nothing comes after.
                    "TimeLimit.truncated": False,
                    "metrics": metrics,
                    "episode": {"r": metrics["episode_return"], "l": int(self._lengths[k]), "t": 0.0},
                }
        self._lengths[dones] = 0
        self.rewards = rewards.astype(np.float32)
        return self._look(), self.rewards.copy(), dones, infos

    def action_masks(self) -> NDArray[np.bool_]:
        """(N, n) what each environment's policy chooses from."""
        return self._masks

    def state(self) -> dict[str, NDArray[Any]]:
        """Where all environments stand, as arrays: what :meth:`restore` takes."""
        found = {"lengths": self._lengths.copy(), "dt_s": self.dt_s.copy()}
        for j, part in enumerate(self.parts):
            found |= {f"{j}.{name}": array for name, array in part.state().items()}
        return found

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Put environments of the same settings where others were; after a reset.

        Raises:
            ConfigError: the state is of other settings.
        """
        if len(state.get("lengths", ())) != self.num_envs:
            raise ConfigError(f"the state is of another number of environments (here {self.num_envs})")
        self._lengths[:], self.dt_s[:] = state["lengths"], state["dt_s"]
        for j, part in enumerate(self.parts):
            prefix = f"{j}."
            part.restore({name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)})
        self._look()

    def close(self) -> None:
        """Close all environments."""
        for part in self.parts:
            part.env.close()

    # ----------------------------------------------------------------- single environments, as if there were any
    def has_attr(self, attr_name: str) -> bool:
        """Whether :meth:`env_method` knows it."""
        return attr_name == MASKS

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """``render_mode``, which is None.

        Raises:
            AttributeError: anything else.
        """
        if attr_name == "render_mode":
            return [None for _ in self._get_indices(indices)]
        raise AttributeError(f"no attribute '{attr_name}' of environments in a batch")

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"'{attr_name}' cannot be set: environments in a batch have no attributes of their own")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """``action_masks`` of each environment.

        Raises:
            AttributeError: another method.
        """
        if method_name != MASKS:
            raise AttributeError(f"no method '{method_name}' of environments in a batch; allowed: {MASKS}")
        return [self._masks[k] for k in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Whether episodes are told as ``Monitor`` tells them: yes; nothing else wraps them."""
        from stable_baselines3.common.monitor import Monitor

        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    # ----------------------------------------------------------------- the batch
    def _look(self) -> dict[str, NDArray[np.float32]]:
        """The observations of all parts, and their masks."""
        if len(self.parts) == 1:
            self._masks[:] = self.parts[0].masks
            return dict(self.parts[0].observations)
        assert isinstance(self.observation_space, spaces.Dict)
        batch = {
            name: np.zeros((self.num_envs, *(box.shape or ())), np.float32)
            for name, box in self.observation_space.items()
        }
        self._masks[:] = False
        for part, rows, there in zip(self.parts, self._rows, self._padded, strict=True):
            self._masks[rows, there] = part.masks
            for name, array in part.observations.items():
                batch[name][rows, : array.shape[1]] = array
        return batch

    def _padded_observation(self, observation: Observations) -> Observations:
        missing = self.codec.num_instances - len(observation["instances"])
        if not missing:
            return observation
        instances = np.pad(observation["instances"], ((0, missing), (0, 0)))
        return observation | {
            "instances": instances,
            "instance_mask": np.pad(observation["instance_mask"], (0, missing)),
        }


def padded_actions(codec: ActionCodec, padded: ActionCodec) -> NDArray[np.int64]:
    """(n,) for every action of ``codec`` the same action of ``padded``, which has as many rows and models and at least
    as many instances."""
    ratio = np.arange(codec.num_instances)
    shapes = ((codec.num_rows, ratio, 2), (1, ratio, 1), (1, ratio, 2), (1, ratio, codec.num_models))
    found = [np.zeros(1, np.int64)]
    for verb, (rows, instances, options) in enumerate((*shapes, shapes[-1]), start=1):
        row = np.arange(rows)[:, None, None] * padded.num_instances
        blocks = (row + instances[None, :, None]) * options + np.arange(options)[None, None, :]
        found.append(padded.verb_starts[verb] + blocks.ravel())
    return np.concatenate(found)
