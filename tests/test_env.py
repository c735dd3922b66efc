"""The environment as users of Gymnasium, Stable-Baselines3 and sb3-contrib meet it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import qlm_env
from qlm_env.env import QLMEnv
from qlm_env.errors import InvalidActionError
from qlm_env.lso import ActionCodec, Advance, Balance, Evict, Pull, SwapModel, WarmStart
from qlm_env.registration import ENVIRONMENTS
from qlm_env.requests import NOWHERE
from qlm_env.spec import ConfigError

FEW: dict[str, Any] = {"preset": "smoke", "num_requests": 40}


def random_episode(env: QLMEnv, seed: int) -> tuple[str, dict[str, Any], float]:
    """A masked random episode: a digest of all it showed, its metrics, and its return."""
    digest = hashlib.sha256()
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    total = 0.0
    while "metrics" not in info:
        for name in sorted(observation):
            digest.update(observation[name].tobytes())
        action = int(rng.choice(np.flatnonzero(info["action_mask"])))
        observation, reward, _, _, info = env.step(action)
        digest.update(np.float64(reward).tobytes() + np.float64(info["now_s"]).tobytes())
        digest.update(info["action_mask"].tobytes() + info["row_groups"].tobytes())
        total += reward
    digest.update(json.dumps(info["metrics"], sort_keys=True).encode())
    return digest.hexdigest(), info["metrics"], total


# --------------------------------------------------------------------------- Gymnasium and SB3
@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_gymnasium_accepts_every_registered_environment(env_id: str) -> None:
    env = gym.make(env_id, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=False)


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_specs_survive_json(env_id: str) -> None:
    spec = gym.make(env_id).spec
    assert spec is not None
    again = gym.envs.registration.EnvSpec.from_json(spec.to_json())
    assert gym.make(again).observation_space == gym.make(env_id).observation_space


def test_make_imports_the_package_and_vectors_work() -> None:
    env = gym.make("qlm_env:QLM/Smoke-v0", workload=FEW)
    env.reset(seed=0)
    vector = gym.make_vec("QLM/Smoke-v0", num_envs=2, vectorization_mode="sync", workload=FEW)
    _, infos = vector.reset(seed=[3, 3])
    assert infos["action_mask"].shape == (2, vector.single_action_space.n)  # type: ignore[attr-defined]
    assert np.array_equal(infos["action_mask"][0], infos["action_mask"][1])


def test_stable_baselines_accepts_the_environment() -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker", reason="needs the rl extra")
    checker.check_env(QLMEnv(workload=FEW), warn=True)


def test_maskable_ppo_learns_on_it() -> None:
    contrib = pytest.importorskip("sb3_contrib", reason="needs the rl extra")
    masking = pytest.importorskip("sb3_contrib.common.maskable.utils")
    env = gym.make("QLM/Smoke-v0", workload=FEW)
    assert masking.is_masking_supported(env)
    model = contrib.MaskablePPO("MultiInputPolicy", env, n_steps=64, batch_size=32, n_epochs=1, seed=0)
    model.learn(128)
    observation, info = env.reset(seed=1)
    action, _ = model.predict(observation, action_masks=masking.get_action_masks(env))
    assert info["action_mask"][int(action)] == 1


# --------------------------------------------------------------------------- determinism
EPISODE_PROGRAM = """
from qlm_env.env import QLMEnv
from tests.test_env import FEW, random_episode
print(random_episode(QLMEnv(workload=FEW), 5)[0])
"""


def test_the_same_seed_gives_the_same_bits_in_another_process() -> None:
    here = random_episode(QLMEnv(workload=FEW), 5)[0]
    there = subprocess.run([sys.executable, "-c", EPISODE_PROGRAM], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert random_episode(QLMEnv(workload=FEW), 6)[0] != here


def test_a_seed_names_a_workload_whatever_the_policy_does() -> None:
    env = QLMEnv(workload=FEW)
    first = env.reset(seed=9)[1]["workload_hash"]
    random_episode(env, 2)
    assert env.reset(seed=9)[1]["workload_hash"] == first
    later = [env.reset()[1]["workload_hash"] for _ in range(2)]
    assert len({first, *later}) == 3


# --------------------------------------------------------------------------- observation
def test_observations_stay_in_their_space_and_returns_are_attainment() -> None:
    env = QLMEnv(workload=FEW)
    rng = np.random.default_rng(0)
    observation, info = env.reset(seed=0)
    total = 0.0
    while "metrics" not in info:
        assert env.observation_space.contains(observation)
        action = int(rng.choice(np.flatnonzero(info["action_mask"])))
        observation, reward, _, _, info = env.step(action)
        total += reward
    assert total == pytest.approx(2 * info["metrics"]["slo_attainment_weighted"] - 1, abs=1e-9)
    assert info["metrics"]["invalid_actions"] == 0


def test_groups_beyond_the_last_row_are_summed_up_not_dropped() -> None:
    batch = {**FEW, "arrivals": {"kind": "batch"}}
    env = QLMEnv(workload=batch, environment={"max_groups": 3, "grouping": {"delta": 0.01}})
    observation, info = env.reset(seed=0)
    world = env.view._world
    live = [g for g in world.queues.live[: world.queues.tally[0].live] if world.queues.group[g].waiting > 0]
    assert len(live) > 3
    assert observation["group_mask"].tolist() == [1, 1, 1]
    assert info["row_groups"][2] == NOWHERE
    waiting = np.expm1(observation["groups"][:, 2 + 3] * np.log1p(4096))
    assert waiting.sum() == pytest.approx(40, rel=1e-3)
    deadlines = [env.view.group(int(g)).deadline_s for g in info["row_groups"][:2]]
    assert deadlines == sorted(deadlines)


def test_nothing_shows_output_lengths_before_they_are_produced() -> None:
    """Two workloads alike but for the output lengths of requests look alike until the first one finishes."""
    env = QLMEnv(
        workload={
            **FEW,
            "lengths": {
                "kind": "uniform",
                "prompt_min_tokens": 10,
                "prompt_max_tokens": 50,
                "output_min_tokens": 100,
                "output_max_tokens": 400,
            },
        }
    )
    shown = []
    for extra in (0, 57):
        requests = env._episodes.requests(3)
        requests["output_tokens"] += extra
        observation, info = env.start(requests)
        steps = []
        for _ in range(25):
            action = int(np.flatnonzero(info["action_mask"])[-1 if len(steps) % 3 else 0])
            steps.append((observation, {k: v for k, v in info.items() if k != "workload_hash"}))
            observation, _, _, _, info = env.step(action)
            if (requests["finish_s"] > 0).any():
                break
        shown.append(steps)
    for (seen, info), (other_seen, other_info) in zip(*shown, strict=False):
        for name in seen:
            np.testing.assert_array_equal(seen[name], other_seen[name])
        for key in info:
            np.testing.assert_array_equal(info[key], other_info[key])


# --------------------------------------------------------------------------- actions
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_codec_round_trips(rows: int, instances: int, models: int, data: st.DataObject) -> None:
    codec = ActionCodec(rows, instances, models)
    row_groups = np.arange(100, 100 + rows, dtype=np.int32)
    action = data.draw(st.integers(0, codec.num_actions - 1))
    assert codec.encode(codec.decode(action, row_groups), row_groups) == action
    assert codec.num_actions == 1 + 2 * rows * instances + 3 * instances + 2 * instances * models


def test_mask_and_legality_agree_on_every_action() -> None:
    env = QLMEnv(workload=FEW, environment={"max_groups": 4})
    rng = np.random.default_rng(1)
    _, info = env.reset(seed=1)
    kinds = set()
    for _ in range(150):
        for action in range(env.codec.num_actions):
            lso = env.codec.decode(action, info["row_groups"])
            legal = lso.code()[2] != NOWHERE and env.view.is_legal(lso)
            assert bool(info["action_mask"][action]) == legal, lso
            kinds.update([type(lso)] if legal else [])
        info = env.step(int(rng.choice(np.flatnonzero(info["action_mask"]))))[-1]
        if "metrics" in info:
            break
    assert kinds >= {Advance, Balance, SwapModel}


@pytest.mark.parametrize("action", [-1, 10**6, 1.5, None, "advance"])
def test_what_is_no_action_is_refused(action: Any) -> None:
    env = QLMEnv(workload=FEW)
    env.reset(seed=0)
    with pytest.raises(InvalidActionError) as caught:
        env.step(action)
    assert "\n" not in str(caught.value)


def test_an_illegal_action_does_nothing_but_count() -> None:
    env = QLMEnv(workload=FEW)
    env.reset(seed=0)
    before_s = env.now_s
    illegal = env.codec.encode(Pull(0), np.array([], np.int32))
    info = env.step(illegal)[-1]
    assert info["invalid_action"]
    assert (env.now_s, env.invalid_actions) == (before_s, 1)
    strict = QLMEnv(workload=FEW, environment={"strict": True})
    strict.reset(seed=0)
    with pytest.raises(InvalidActionError, match="pull is not legal"):
        strict.step(illegal)
    with pytest.raises(InvalidActionError, match="evict is not legal"):
        strict.step_plan([Evict(1)])


def test_time_passes_after_the_limit_of_actions() -> None:
    env = QLMEnv(workload=FEW, environment={"max_actions_per_epoch": 3})
    _, info = env.reset(seed=0)
    before_s = env.now_s
    stage = env.codec.encode(WarmStart(0, 1), info["row_groups"])
    for _ in range(3):
        info = env.step(stage)[-1]
    assert env.now_s == before_s
    assert np.flatnonzero(info["action_mask"]).tolist() == [0]
    info = env.step(stage)[-1]
    assert info["invalid_action"]
    assert env.now_s > before_s


def test_stepping_outside_an_episode_is_refused() -> None:
    env = QLMEnv(workload={**FEW, "num_requests": 1})
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    _, metrics, _ = random_episode(env, 0)
    assert metrics["requests"] == 1
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)


# --------------------------------------------------------------------------- time and reward
def test_a_fixed_decision_time_passes_before_the_decision_takes_effect() -> None:
    charged = {"decision_time": {"mode": "fixed", "fixed_s": 0.25}}
    env = QLMEnv(workload=FEW, environment=charged)
    _, info = env.reset(seed=0)
    start_s = env.now_s
    group = int(info["row_groups"][0])
    model = env.view.group(group).model
    ready = next(instance for instance in env.view.instances if instance.active_model == model)
    info = env.step_plan([Balance(group, ready.index)])[-1]
    pulled_s = env._world.requests["first_scheduled_s"][0]  # type: ignore[union-attr]
    assert pulled_s == pytest.approx(start_s + 0.25)
    assert info["dt"] >= 0.25
    action = env.codec.encode(WarmStart(1, 0), info["row_groups"])
    now_s = env.now_s
    env.step(action)
    assert env.now_s == pytest.approx(now_s + 0.25)


def test_operations_can_cost() -> None:
    free = random_episode(QLMEnv(workload=FEW), 4)
    costly = random_episode(QLMEnv(workload=FEW, environment={"costs": {"swap": 0.01, "eviction": 0.001}}), 4)
    charged = 0.01 * costly[1]["swaps"] + 0.001 * costly[1]["evictions"]
    assert charged > 0
    assert costly[2] == pytest.approx(free[2] - charged)


def test_an_episode_that_never_places_anything_is_cut_off_with_all_missed() -> None:
    env = QLMEnv(workload=FEW, environment={"max_drain_s": 50})
    _, info = env.reset(seed=0)
    total = 0.0
    truncated = False
    while not truncated:
        _, reward, terminated, truncated, info = env.step(0)
        assert not terminated
        total += reward
    assert total == pytest.approx(-1.0)
    assert info["metrics"]["unfinished"] == 40


# --------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cluster": "smal"}, "no cluster named 'smal'; allowed: large, live_cpu"),
        ({"workload": {"preset": "w_z"}}, "no workload named 'w_z'; allowed:"),
        ({"environment": {"max_group": 3}}, "unknown key 'environment.max_group'.*did you mean 'max_groups'"),
        ({"environment": {"decision_interval_s": 0}}, "environment.decision_interval_s"),
        ({"workload": {**FEW, "arrivals": {"kind": "poisson", "rate_per_s": -1}}}, "rate_per_s.*greater than 0"),
        ({"backend": "vlm"}, "backend 'vlm' is not available; allowed: emulator, vllm"),
        ({"render_mode": "human"}, "render_mode 'human' is not available"),
        ({"cluster": {"instances": [{"device": "A10"}]}, "workload": "w_b"}, "13b.*A10"),
        ({"cluster": {"instances": [{"device": "B300"}]}}, "B300"),
        ({"workload": {"preset": "azure_conv", "path": "nowhere.csv"}}, "nowhere.csv"),
    ],
)
def test_mistakes_are_one_line_that_names_them(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        QLMEnv(**kwargs)
    assert "\n" not in str(caught.value)


def test_version_is_a_string() -> None:
    assert qlm_env.__version__.count(".") == 2
