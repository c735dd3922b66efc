"""`qlm bench env`: steps per second of one environment, as a policy in Python sees it.

Measured as in ``gymnasium.utils.performance``: random actions for some seconds of wall-clock time, which include
choosing them and resetting after an episode. Unlike there the actions are masked; illegal ones do nothing and would
flatter the figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from runners.bench import Figure
from runners.config import BenchEnvOptions

ENV_ID = "QLM/Smoke-v0"
NUM_ENVS = 8
REPEATS = 3

AnyEnv = gym.Env[Any, Any]


def measure(options: BenchEnvOptions) -> list[Figure]:
    """Medians over repeats. Compilation is excluded."""
    wrapped = gym.make(ENV_ID)
    plain: AnyEnv = wrapped.unwrapped
    steps_per_s(plain, 0.01, options.seed)  # compiles

    def median(measured: Callable[[], float]) -> float:
        return statistics.median(measured() for _ in range(REPEATS))

    duration_s, seed = options.duration_s, options.seed
    vector = gym.vector.SyncVectorEnv([lambda: gym.make(ENV_ID)] * NUM_ENVS)
    return [
        Figure(
            name=f"{ENV_ID}, gymnasium.make",
            value=median(lambda: steps_per_s(wrapped, duration_s, seed)),
            unit="steps/s",
        ),
        Figure(
            name=f"{ENV_ID}, without wrappers",
            value=median(lambda: steps_per_s(plain, duration_s, seed)),
            unit="steps/s",
        ),
        Figure(
            name=f"{ENV_ID}, SyncVectorEnv of {NUM_ENVS}",
            value=median(lambda: vector_steps_per_s(vector, duration_s, seed)),
            unit="steps/s",
        ),
        Figure(
            name="of that, choosing a masked random action",
            value=1e6 / median(lambda: samples_per_s(plain, duration_s / 10, seed)),
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


def vector_steps_per_s(env: gym.vector.SyncVectorEnv, duration_s: float, seed: int) -> float:
    """The same of all environments of a vector together, less the steps that only reset one."""
    _, infos = env.reset(seed=seed)
    space = env.single_action_space
    space.seed(seed)
    resetting = np.zeros(env.num_envs, bool)
    steps = 0
    start = time.perf_counter()
    while (elapsed_s := time.perf_counter() - start) < duration_s:
        actions = np.array([space.sample(mask=mask) for mask in infos["action_mask"]])
        _, _, terminated, truncated, infos = env.step(actions)
        steps += env.num_envs - int(resetting.sum())
        resetting = terminated | truncated
    return steps / elapsed_s


def samples_per_s(env: AnyEnv, duration_s: float, seed: int) -> float:
    """How often a random action can be drawn, which is part of every step measured here."""
    _, info = env.reset(seed=seed)
    samples = 0
    start = time.perf_counter()
    while (elapsed_s := time.perf_counter() - start) < duration_s:
        env.action_space.sample(mask=info["action_mask"])
        samples += 1
    return samples / elapsed_s
