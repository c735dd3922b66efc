"""The vector environment gives what as many single environments give, bit for bit."""

from __future__ import annotations

import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from qlm_env.batch import choose_legal
from qlm_env.env import QLMEnv
from qlm_env.errors import InvalidActionError
from qlm_env.lso import ActionCodec, decode_action
from qlm_env.spec import ConfigError
from qlm_env.vector import QLMVectorEnv, random_legal_actions
from tests.random_episodes import random_env

FEW: dict[str, Any] = {"preset": "smoke", "num_requests": 12}
QUICK: dict[str, Any] = {"max_actions_per_epoch": 4}

SETTINGS: dict[str, dict[str, Any]] = {
    "smoke": {"workload": FEW, "environment": QUICK},
    "few_rows": {
        "workload": {**FEW, "num_requests": 30, "arrivals": {"kind": "batch"}},
        "environment": {**QUICK, "max_groups": 2, "grouping": {"delta": 0.01}, "max_drain_s": 60.0},
    },
    "time_and_costs": {
        "workload": FEW,
        "slo": {"metric": "ttft"},
        "environment": {
            **QUICK,
            "decision_time": {"mode": "fixed", "fixed_s": 0.25},
            "costs": {"swap": 0.01, "eviction": 0.003},
            "auto_pull": False,
        },
    },
    "cut_off": {"workload": FEW, "environment": {**QUICK, "max_drain_s": 3.0}},
    "multi_model": {
        "cluster": "small_multi",
        "workload": {"preset": "w_b", "num_requests": 15},
        "environment": {**QUICK, "max_drain_s": 60.0},
    },
    "mega_prompts": {"cluster": "small", "workload": {"preset": "w_c", "num_requests": 15}, "environment": QUICK},
    "length_clusters": {
        "workload": {
            **FEW,
            "num_requests": 90,
            "mix": [{"model": "vicuna-7b", "slo_class": "batch-1"}],
            "mega_prompts": {"share": 0.2, "min_tokens": 1000, "max_tokens": 1200},
        },
        "environment": {**QUICK, "max_drain_s": 60.0, "grouping": {"max_clusters": 3, "recluster_requests": 40}},
    },
    "bursts_and_prefix_cache": {
        "cluster": {
            "instances": [{"device": "A100", "count": 2}],
            "failures": [{"instance": 1, "at_s": 2.0, "duration_s": 20.0}],
            "engine": {"enable_prefix_caching": True, "async_scheduling": True, "num_gpu_blocks": 1100},
        },
        "workload": {"preset": "azure_like", "num_requests": 25},
        "environment": QUICK,
    },
}


def singles(num_envs: int, **settings: Any) -> SyncVectorEnv:
    """Gymnasium's vector of single environments, in the same autoreset mode."""
    return SyncVectorEnv([lambda: QLMEnv(**settings)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """The same types, bits and keys, all the way down."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, tuple) or (isinstance(ours, np.ndarray) and ours.dtype == object):
        for k, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{k}]")
    elif isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        assert ours.tobytes() == theirs.tobytes(), where
    else:
        assert ours == theirs, where


def assert_same_episodes(settings: dict[str, Any], num_envs: int, steps: int, seed: int, threads: int) -> int:
    """Random actions, some of them illegal and many that let time pass, in both; returns how many episodes ended."""
    ours, theirs = QLMVectorEnv(num_envs, threads=threads, **settings), singles(num_envs, **settings)
    rng = np.random.default_rng(seed)
    assert_same(ours.reset(seed=seed), theirs.reset(seed=seed), "reset")
    ended = 0
    for step in range(steps):
        masks = ours.action_masks()
        assert np.array_equal(masks, np.stack(theirs.call("action_masks")))
        actions = random_legal_actions(masks.view(np.int8), rng)
        actions[rng.random(num_envs) < 0.4] = 0
        astray = rng.random(num_envs) < 0.03
        actions[astray] = rng.integers(0, masks.shape[1], int(astray.sum()))
        mine, other = ours.step(actions), theirs.step(actions)
        assert_same(mine, other, f"step {step}")
        ended += int((mine[2] | mine[3]).sum())
    ours.close()
    return ended


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_those_of_single_environments(name: str) -> None:
    assert assert_same_episodes(SETTINGS[name], num_envs=3, steps=500, seed=4, threads=2) > 1


@pytest.mark.parametrize("seed", range(6))
def test_steps_are_those_of_single_environments_in_random_clusters(seed: int) -> None:
    scenario = random_env(np.random.default_rng(seed)).scenario
    settings = {name: getattr(scenario, name).model_dump() for name in ("cluster", "workload", "slo", "environment")}
    settings["workload"]["num_requests"] = 15
    settings["environment"]["max_drain_s"] = 40.0
    assert_same_episodes(settings, num_envs=2, steps=300, seed=seed, threads=1)


# --------------------------------------------------------------------------- Gymnasium
def test_make_vec_makes_it() -> None:
    env = gym.make_vec("qlm_env:QLM/Smoke-v0", num_envs=3, workload=FEW)
    assert isinstance(env.unwrapped, QLMVectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    observations, infos = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    single = gym.make("QLM/Smoke-v0", workload=FEW)
    assert env.single_observation_space == single.observation_space
    assert env.single_action_space == single.action_space
    assert env.action_space.shape == (3,)
    assert infos["action_mask"].shape == (3, env.single_action_space.n)  # type: ignore[attr-defined]
    assert env.spec is not None
    gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    env.close()


def test_what_was_returned_stays_as_it_was() -> None:
    env = QLMVectorEnv(2, workload=FEW)
    observations, infos = env.reset(seed=0)
    kept = [array.copy() for array in (*observations.values(), infos["action_mask"], infos["row_groups"])]
    env.step([0, 0])
    for array, copy in zip((*observations.values(), infos["action_mask"], infos["row_groups"]), kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_some_environments_can_be_reset() -> None:
    ours, theirs = QLMVectorEnv(3, workload=FEW), singles(3, workload=FEW)
    for env in (ours, theirs):
        env.reset(seed=[5, 6, 7])
        for _ in range(4):
            env.step(np.zeros(3, int))
    mask = np.array([False, True, False])
    assert_same(
        ours.reset(seed=[1, 2, 3], options={"reset_mask": mask}),
        theirs.reset(seed=[1, 2, 3], options={"reset_mask": mask}),
    )
    assert_same(ours.reset(options={"reset_mask": ~mask}), theirs.reset(options={"reset_mask": ~mask}))
    assert_same(ours.step(np.zeros(3, int)), theirs.step(np.zeros(3, int)))


def test_the_number_of_threads_changes_nothing() -> None:
    runs = []
    for threads in (1, 2, 5):
        env = QLMVectorEnv(7, workload=FEW, environment=QUICK, threads=threads)
        rng = np.random.default_rng(0)
        _, infos = env.reset(seed=1)
        shown = []
        for _ in range(150):
            shown.append(env.step(random_legal_actions(infos["action_mask"], rng)))
            infos = shown[-1][-1]
        env.close()
        runs.append(shown)
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert_same(one, other)


def test_closing_stops_the_threads() -> None:
    before = threading.active_count()
    env = QLMVectorEnv(4, workload=FEW, threads=4)
    env.reset(seed=0)
    env.step(np.zeros(4, int))
    assert threading.active_count() > before
    env.close()
    env.close()
    assert threading.active_count() == before
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(4, int))


# --------------------------------------------------------------------------- actions
def test_compiled_decoding_is_the_codecs() -> None:
    codec = ActionCodec(4, 3, 2)
    row_groups = np.array([7, -1, 3, 12], np.int32)
    for action in range(codec.num_actions):
        expected = codec.decode(action, row_groups).code()
        assert _decode(action, row_groups) == expected, action


def test_random_legal_actions_are_legal_and_equally_likely() -> None:
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], np.int8)
    chosen = np.empty(3, np.int64)
    for uniform, expected in ((0.0, 0), (0.33, 0), (0.34, 2), (0.66, 2), (0.67, 3), (np.nextafter(1.0, 0.0), 3)):
        choose_legal(mask, np.full(3, uniform), chosen)
        assert chosen.tolist() == [expected, 4, 0]
    many = random_legal_actions(np.tile(mask[:1], (3000, 1)), np.random.default_rng(0))
    assert np.bincount(many, minlength=5)[[0, 2, 3]].min() > 900


@pytest.mark.parametrize(
    "actions", [[0], [0, -1], [0, 10**6], [0.0, 1.0], [[0, 0]], None, ["a", "b"]], ids=lambda actions: str(actions)
)
def test_what_is_no_batch_of_actions_is_refused(actions: Any) -> None:
    env = QLMVectorEnv(2, workload=FEW)
    env.reset(seed=0)
    before = env.action_masks()
    with pytest.raises(InvalidActionError) as caught:
        env.step(actions)
    assert "\n" not in str(caught.value)
    assert np.array_equal(env.action_masks(), before)


def test_strict_environments_refuse_illegal_actions() -> None:
    env = QLMVectorEnv(2, workload=FEW, environment={"strict": True})
    env.reset(seed=0)
    illegal = int(np.flatnonzero(~env.action_masks()[1])[0])
    with pytest.raises(InvalidActionError, match="is not legal in environment 1"):
        env.step([0, illegal])


def test_it_must_be_reset_first() -> None:
    env = QLMVectorEnv(2, workload=FEW)
    for call in (
        lambda: env.step([0, 0]),
        env.action_masks,
        lambda: env.reset(options={"reset_mask": np.array([True, False])}),
    ):
        with pytest.raises(gym.error.ResetNeeded):
            call()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_envs": 0}, "'num_envs' must be at least 1"),
        ({"threads": 0}, "'threads' must be at least 1"),
        ({"backend": "vllm"}, "allowed: emulator"),
        ({"render_mode": "rgb_array"}, "single environments"),
        ({"timeline": True}, "single environments"),
        ({"cluster": "smal"}, "no cluster named 'smal'"),
        ({"environment": {"decision_time": {"mode": "measured"}}}, "'measured' is not available.*allowed: zero, fixed"),
    ],
)
def test_mistakes_are_one_line_that_names_them(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        QLMVectorEnv(**kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        ({"seed": [1]}, "'seed'"),
        ({"options": {"reset_mask": [True, False]}}, "bool array"),
        ({"options": {"reset_mask": np.zeros(2, bool)}}, "true somewhere"),
    ],
)
def test_resets_that_cannot_be_are_refused(reset: dict[str, Any], message: str) -> None:
    env = QLMVectorEnv(2, workload=FEW)
    env.reset(seed=0)
    with pytest.raises(ConfigError, match=message):
        env.reset(**reset)


def _decode(action: int, row_groups: np.ndarray) -> tuple[int, ...]:
    plain = getattr(decode_action, "py_func", decode_action)
    return tuple(int(value) for value in plain(action, row_groups, 3, 2))
