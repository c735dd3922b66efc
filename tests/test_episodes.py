"""Time in an episode, and episodes through Gymnasium's wrappers and vectors."""

from __future__ import annotations

import itertools
import time
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from qlm_env.env import QLMEnv
from qlm_env.registration import ENVIRONMENTS
from tests.random_episodes import random_env, random_legal_action, random_requests

FEW: dict[str, Any] = {"preset": "smoke", "num_requests": 40}


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_gymnasium_warns_of_nothing(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id).unwrapped)


def test_time_adds_up_and_no_step_is_longer_than_the_decision_interval() -> None:
    for seed in range(15):
        rng = np.random.default_rng(seed)
        env = random_env(rng)
        settings = env.scenario.environment
        charged_s = settings.decision_time.fixed_s if settings.decision_time.mode == "fixed" else 0.0
        _, info = env.start(random_requests(rng, env))
        elapsed_s = info["dt"]
        for _ in range(150):
            exhausted = env._actions_this_epoch >= settings.max_actions_per_epoch
            action = random_legal_action(rng, env)
            info = env.step(action)[-1]
            elapsed_s += info["dt"]
            assert info["now_s"] == pytest.approx(elapsed_s)
            assert info["dt"] <= settings.decision_interval_s + charged_s + 1e-9
            if "metrics" in info:
                break
            assert info["dt"] >= charged_s - 1e-9
            if action != 0 and not exhausted:
                assert info["dt"] == pytest.approx(charged_s, abs=1e-9)


def test_advance_stops_when_a_group_forms_and_when_the_episode_is_cut_off() -> None:
    every_request_a_group = {"grouping": {"delta": 1e-9}, "decision_interval_s": 1e4, "max_drain_s": 77.0}
    env = QLMEnv(workload=FEW, environment=every_request_a_group)
    _, info = env.reset(seed=0)
    arrival_s = env._running_world().requests["arrival_s"].tolist()
    assert info["now_s"] == arrival_s[0]
    for expected_s in arrival_s[1:]:
        info = env.step(0)[-1]
        assert info["now_s"] == expected_s
    _, _, terminated, truncated, info = env.step(0)
    assert (terminated, truncated, info["now_s"]) == (False, True, arrival_s[-1] + 77.0)


def test_measured_decision_time_is_the_wall_clock_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=0.125)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    env = QLMEnv(workload=FEW, environment={"decision_time": {"mode": "measured"}})
    _, info = env.reset(seed=0)
    illegal = int(np.flatnonzero(info["action_mask"] == 0)[0])
    for _ in range(3):
        assert env.step(illegal)[-1]["dt"] == pytest.approx(0.125)


def test_frames_can_be_collected() -> None:
    env = gym.wrappers.RenderCollection(gym.make("QLM/Smoke-v0", workload=FEW, render_mode="rgb_array"))
    env.reset(seed=0)
    for _ in range(5):
        env.step(0)
    frames: Any = env.render()
    assert len(frames) == 6
    assert {(frame.dtype, frame.ndim, frame.shape[2]) for frame in frames} == {(np.dtype(np.uint8), 3, 3)}
    assert (frames[0] != frames[-1]).any()


def test_a_vector_of_environments_plays_the_episodes_of_its_members() -> None:
    settings = {"max_drain_s": 5.0}
    vector: Any = gym.make_vec("QLM/Smoke-v0", 2, "sync", workload=FEW, environment=settings)
    vector.reset(seed=[3, 4])
    ended: dict[int, tuple[float, int]] = {}
    while len(ended) < 2:
        _, _, terminated, truncated, infos = vector.step(np.zeros(2, int))
        for k in np.flatnonzero(terminated | truncated).tolist():
            results = infos["metrics"]
            ended.setdefault(k, (results["emulated_s"][k], results["unfinished"][k]))
    for k, seed in enumerate((3, 4)):
        env = QLMEnv(workload=FEW, environment=settings)
        info = env.reset(seed=seed)[1]
        while "metrics" not in info:
            info = env.step(0)[-1]
        assert ended[k] == (info["metrics"]["emulated_s"], info["metrics"]["unfinished"])
