"""Whatever a policy does, the cluster's books agree with a recount, after every step of random episodes.

A failure names the episode; ``run_episode(<number>)`` repeats it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qlm_env.backends.base import Backend
from qlm_env.dynamics import World
from qlm_env.env import QLMEnv
from qlm_env.requests import MET
from qlm_env.spec import ScenarioSpec
from tests.invariants import Invariants
from tests.random_episodes import (
    emulated_backend,
    random_env,
    random_legal_action,
    random_lso,
    random_requests,
    sensible_lsos,
)

EPISODES = 300
EPISODES_PER_ENVIRONMENT = 3
CHUNKS = 6
RANDOM_STEPS = 60
"""Steps of arbitrary actions, before a sensible policy finishes the episode."""


@functools.lru_cache(maxsize=1)
def environment(number: int, backend: str | Callable[[ScenarioSpec], Backend]) -> QLMEnv:
    return random_env(np.random.default_rng([number, 0]), backend)


def state_bytes(world: World) -> bytes:
    engines = (world.requests, world.fleet.engine, world.fleet.slot, world.fleet.placement)
    queues = (world.queues.group, world.queues.queue, world.queues.kind, world.clock["now_s"])
    return b"".join(array.tobytes() for array in (*engines, *queues))


def arbitrary_step(rng: np.random.Generator, env: QLMEnv) -> tuple[float, bool, bool, dict[str, Any]]:
    """A step of any kind; an action that the mask forbids must change nothing."""
    draw = rng.random()
    if draw < 0.2:
        # Work has to get into the engines for the rest to meet any.
        return env.step_plan(sensible_lsos(env))[1:]
    if draw < 0.35:
        lsos = [random_lso(rng, env) for _ in range(int(rng.integers(0, 4)))]
        return env.step_plan(lsos)[1:]
    mask = env.action_masks()
    if draw < 0.45:
        action = int(rng.integers(env.codec.num_actions))
    else:
        action = 0 if rng.random() < 0.3 else random_legal_action(rng, env)
    world = env._running_world()
    before = state_bytes(world)
    result = env.step(action)[1:]
    if env.scenario.environment.decision_time.mode == "zero":
        assert result[3]["invalid_action"] == (not mask[action])
        # Past the epoch's limit of actions any action lets time pass.
        assert mask[action] or result[3]["dt"] > 0 or state_bytes(world) == before
    return result


def run_episode(number: int, backend: str | Callable[[ScenarioSpec], Backend] = "emulator") -> Counter[str]:
    """Play an episode with checks; returns what happened in it."""
    env = environment(number // EPISODES_PER_ENVIRONMENT, backend)
    rng = np.random.default_rng(number)
    requests = random_requests(rng, env)
    env.start(requests)
    world = env._running_world()
    invariants = Invariants(world, commanded=backend != "emulator")
    invariants.check()
    elapsed_s, total, step = env.now_s, 0.0, 0
    done = False
    info: dict[str, Any] = {}
    while not done:
        if step < RANDOM_STEPS:
            reward, terminated, truncated, info = arbitrary_step(rng, env)
        else:
            reward, terminated, truncated, info = env.step_plan(sensible_lsos(env))[1:]
        if step < RANDOM_STEPS or step % 10 == 0:
            invariants.check()
        step += 1
        total += reward
        elapsed_s += info["dt"]
        done = terminated or truncated
    invariants.check()

    assert np.isclose(elapsed_s, env.now_s)
    metrics = info["metrics"]
    assert terminated == (metrics["finished"] + metrics["rejected"] == len(requests))
    weights = np.array([c.weight for c in env.scenario.slo.classes])[requests["slo_class"]]
    met = np.array([invariants.met(request) for request in requests])
    assert np.array_equal(met, requests["settled"] == MET)
    assert np.isclose(total, 2.0 * (weights @ met) / weights.sum() - 1.0)
    assert np.isclose(total, metrics["episode_return"])
    if terminated:
        engine = world.fleet.engine
        assert not engine["num_running"].any()
        assert not engine["queue_length"].any()
        assert not engine["host_kv_used_bytes"].any()
        assert world.queues.tally[0].live == 0
    happened = Counter({name: int(metrics[name]) for name in ("evictions", "preemptions", "swaps", "rejected")})
    happened.update({name: int(metrics[name]) for name in ("warm_hits", "recomputed_tokens", "invalid_actions")})
    happened.update(terminated=terminated, truncated=truncated, restored=int(metrics["kv_swapped_bytes"] > 0))
    happened.update(failures=len(env.scenario.cluster.failures), steps=step)
    return happened


@pytest.mark.parametrize(
    ("backend", "chunk"), [*(("emulator", chunk) for chunk in range(CHUNKS)), *((emulated_backend, c) for c in (0, 1))]
)
def test_books_agree_with_a_recount(backend: str | Callable[[ScenarioSpec], Backend], chunk: int) -> None:
    """On the emulator, and through the backend contract."""
    happened: Counter[str] = Counter()
    for number in range(chunk * EPISODES // CHUNKS, (chunk + 1) * EPISODES // CHUNKS):
        try:
            happened += run_episode(number, backend)
        except AssertionError as error:
            raise AssertionError(f"episode {number}: {error}") from error
    # Every chunk reaches what the episodes are there for.
    for name in ("evictions", "preemptions", "swaps", "warm_hits", "restored", "failures", "rejected"):
        assert happened[name] > 0, name
    assert happened["terminated"] > EPISODES // CHUNKS // 3
