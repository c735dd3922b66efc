"""`qlm bench env`: steps per second of the environment, alone and in vectors, as a policy in Python sees it.

Measured as in ``gymnasium.utils.performance``: random actions for some seconds of wall-clock time, which include
choosing them and resetting after an episode. Unlike there the actions are masked; illegal ones do nothing and would
flatter the figures. Every vector chooses them by one compiled call.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils.performance import benchmark_vector_step
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray

from qlm_env.vector import QLMVectorEnv, random_legal_actions
from runners.bench import Figure
from runners.config import BenchEnvOptions

ENV_ID = "QLM/Smoke-v0"
NUM_PROCESSES = 8
FEW_ENVS, MANY_ENVS = 64, 256
REPEATS = 3

AnyEnv = gym.Env[Any, Any]
AnyVector = VectorEnv[Any, Any, Any]


class LegalActions(spaces.Space[NDArray[np.int64]]):
    """Samples one legal action for each environment of a vector."""

    def __init__(self, num_envs: int) -> None:
        super().__init__((num_envs,), np.int64)
        self.masks = np.ones((num_envs, 1), np.int8)
        """(N, n) what is legal now."""

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> NDArray[np.int64]:
        """(N,) legal actions, each row's equally likely."""
        return random_legal_actions(self.masks, self.np_random)


class WithLegalActions(VectorWrapper[Any, Any, Any, Any, Any]):
    """A vector environment whose action space samples what its last infos said is legal."""

    def __init__(self, env: AnyVector) -> None:
        super().__init__(env)
        self._legal = LegalActions(env.num_envs)
        self.action_space = self._legal

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        observations, infos = self.env.reset(seed=seed, options=options)
        self._legal.masks = infos["action_mask"]
        return observations, infos

    def step(self, actions: Any) -> Any:
        result = self.env.step(actions)
        self._legal.masks = result[-1]["action_mask"]
        return result


def measure(options: BenchEnvOptions) -> list[Figure]:
    """Medians over repeats. Compilation is excluded."""
    duration_s, seed = options.duration_s, options.seed
    wrapped = gym.make(ENV_ID)
    plain: AnyEnv = wrapped.unwrapped
    steps_per_s(plain, 0.01, seed)  # compiles

    def figure(name: str, measured: Callable[[], float]) -> Figure:
        speed = statistics.median(measured() for _ in range(REPEATS))
        return Figure(name=f"{ENV_ID}, {name}", value=speed, unit="steps/s")

    def vector_figure(name: str, env: AnyVector) -> Figure:
        # Declared a whole number of seconds, taken as any.
        speed = figure(name, lambda: benchmark_vector_step(WithLegalActions(env), duration_s, seed))  # type: ignore[arg-type]
        env.close()
        return speed

    figures = [
        figure("gymnasium.make", lambda: steps_per_s(wrapped, duration_s, seed)),
        figure("without wrappers", lambda: steps_per_s(plain, duration_s, seed)),
        # First, because its processes are forks of this one.
        vector_figure(f"AsyncVectorEnv of {NUM_PROCESSES}", gym.make_vec(ENV_ID, NUM_PROCESSES, "async")),
        vector_figure(f"SyncVectorEnv of {MANY_ENVS}", gym.make_vec(ENV_ID, MANY_ENVS, "sync")),
        vector_figure(f"QLMVectorEnv of {FEW_ENVS}", gym.make_vec(ENV_ID, FEW_ENVS)),
        vector_figure(f"QLMVectorEnv of {MANY_ENVS}, two threads", gym.make_vec(ENV_ID, MANY_ENVS, threads=2)),
        vector_figure(f"QLMVectorEnv of {MANY_ENVS}", gym.make_vec(ENV_ID, MANY_ENVS)),
    ]
    sync, native = figures[-4]["value"], figures[-1]["value"]
    if importlib.util.find_spec("stable_baselines3") is not None:
        env = QLMVectorEnv(MANY_ENVS)
        name = f"QLMVectorEnv of {MANY_ENVS} in Stable-Baselines3"
        figures.append(figure(name, lambda: stable_baselines_steps_per_s(env, duration_s, seed)))
        env.close()
    return [
        *figures,
        Figure(name=f"QLMVectorEnv over SyncVectorEnv, both of {MANY_ENVS}", value=native / sync, unit="times"),
        Figure(
            name="choosing a masked random action for one environment",
            value=1e6 / statistics.median(samples_per_s(plain, duration_s / 10, seed) for _ in range(REPEATS)),
            unit="us/step",
        ),
    ]


def steps_per_s(env: AnyEnv, duration_s: float, seed: int) -> float:
    """Steps per second of a random policy that keeps to the action mask."""
    _, info = env.reset(seed=seed)
    env.action_space.seed(seed)
    steps = 0
    start = time.perf_counter()
    while (elapsed_s := time.perf_counter() - start) < duration_s:
        _, _, terminated, truncated, info = env.step(env.action_space.sample(mask=info["action_mask"]))
        if terminated or truncated:
            _, info = env.reset()
        steps += 1
    return steps / elapsed_s


def stable_baselines_steps_per_s(env: QLMVectorEnv, duration_s: float, seed: int) -> float:
    """The same through Stable-Baselines3's interface, with the masks as sb3-contrib asks for them."""
    from planners.learned.sb3_vec_env import MASKS, QLMVecEnv

    batch = QLMVecEnv(env)
    batch.seed(seed)
    batch.reset()
    rng = np.random.default_rng(seed)
    steps = 0
    start = time.perf_counter()
    while (elapsed_s := time.perf_counter() - start) < duration_s:
        masks = np.stack(batch.env_method(MASKS))
        batch.step(random_legal_actions(masks.view(np.int8), rng))
        steps += env.num_envs
    return steps / elapsed_s


def samples_per_s(env: AnyEnv, duration_s: float, seed: int) -> float:
    """How often a random action can be drawn, which is part of every step of a single environment."""
    _, info = env.reset(seed=seed)
    samples = 0
    start = time.perf_counter()
    while (elapsed_s := time.perf_counter() - start) < duration_s:
        env.action_space.sample(mask=info["action_mask"])
        samples += 1
    return samples / elapsed_s
