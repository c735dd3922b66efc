"""Where a training stands, in one file: what a killed training goes on from, as if it had not been killed.

Tensors and plain values alone (``torch.load(weights_only=True)``): reading it runs no code.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from planners.learned.training_env import TrainingVecEnv
from qlm_env.spec import ConfigError
from qlm_env.workload.atomic import atomic_path

State = dict[str, Any]


def write_state(path: Path, state: State) -> None:
    """Write a state, atomically."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def read_state(path: Path) -> State:
    """Read a state.

    Raises:
        ConfigError: the file is cut short, or not a state.
    """
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        raise ConfigError(f"'{path}' is cut short or not a training's state; remove it to start again") from None
    if not isinstance(state, dict) or "steps" not in state:
        raise ConfigError(f"'{path}' is not a training's state; remove it to start again")
    return state


def random_state() -> State:
    """The global generators of torch and NumPy, which Stable-Baselines3 draws from."""
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, np.int64)),
        "numpy_rest": [int(position), int(has_gauss), float(cached)],
    }


def restore_random_state(state: State) -> None:
    """Set them to a state taken before."""
    torch.set_rng_state(state["torch"])
    position, has_gauss, cached = state["numpy_rest"]
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, cached))  # noqa: NPY002


def algorithm_state(algorithm: BaseAlgorithm, env: TrainingVecEnv) -> State:
    """An algorithm between two rollouts, and its environments. A replay buffer is left out: it fills again."""
    assert algorithm._last_obs is not None
    model: Any = algorithm
    return {
        "steps": algorithm.num_timesteps,
        "updates": model._n_updates,
        "policy": algorithm.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "random": random_state(),
        "env": _tensors(env.state()),
        "last_observation": _tensors(model._last_obs),
        "last_starts": torch.from_numpy(np.asarray(algorithm._last_episode_starts, bool)),
    }


def restore_algorithm(algorithm: BaseAlgorithm, env: TrainingVecEnv, state: State) -> None:
    """Put an algorithm of the same settings, and its environments, where another one was.

    Raises:
        ConfigError: the state is of other settings.
    """
    model: Any = algorithm
    model.env.reset()
    env.restore({name: tensor.numpy() for name, tensor in state["env"].items()})
    try:
        algorithm.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the training's state is of another network: {str(error).splitlines()[0]}") from None
    algorithm.num_timesteps = state["steps"]
    model._n_updates = state["updates"]
    model._last_obs = {name: tensor.numpy().copy() for name, tensor in state["last_observation"].items()}
    algorithm._last_episode_starts = state["last_starts"].numpy().copy()
    if isinstance(algorithm, OffPolicyAlgorithm):
        assert algorithm.replay_buffer is not None
        algorithm.replay_buffer.reset()
    restore_random_state(state["random"])


def _tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
