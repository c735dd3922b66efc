"""Training environments against single ones that are stepped by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sb3_contrib", reason="needs the train extra")

from planners.learned.spec import ActionSet
from planners.learned.training_env import TrainingVecEnv, padded_actions
from qlm_env.env import QLMEnv
from qlm_env.lso import ActionCodec
from qlm_env.spec import ConfigError
from qlm_env.vector import QLMVectorEnv, random_legal_actions

FEW: dict[str, Any] = {"preset": "smoke", "num_requests": 25}
PLACING = ActionSet(moves="new", hold=False, swaps="head", evict=False, warm_start=False)
ONE_A100 = {"instances": [{"device": "A100", "count": 1}]}
GAMMA = 0.9


def training_env(num_envs: int, actions: ActionSet = PLACING, **settings: Any) -> TrainingVecEnv:
    return TrainingVecEnv([QLMVectorEnv(num_envs, workload=FEW, **settings)], actions, GAMMA, reward_scale=2.0)


def choose(env: TrainingVecEnv, rng: np.random.Generator) -> np.ndarray:
    return random_legal_actions(env.action_masks().view(np.int8), rng)


def test_time_passes_to_the_next_choice_and_rewards_are_discounted_by_it() -> None:
    """Each step is the action and then as many ``advance`` as there is nothing else to do, in a single environment."""
    env, single = training_env(1), QLMEnv(workload=FEW)
    env.seed(5)
    rng = np.random.default_rng(0)
    observation, _ = single.reset(seed=5)
    seen = env.reset()
    horizon_s = -1.0 / np.log(GAMMA)
    last_arrival_s = env.parts[0].env.horizon_s(0) - single.scenario.environment.max_drain_s
    scale = 2.0 * max(1.0, last_arrival_s / horizon_s)
    total, done, skipped = 0.0, False, 0
    while not done:
        for name in observation:
            np.testing.assert_array_equal(seen[name][0], observation[name])
        action = choose(env, rng)
        seen, rewards, dones, infos = env.step(action)
        reward, elapsed_s = 0.0, 0.0
        step = int(action[0])
        while True:
            observation, earned, ended, cut_off, info = single.step(step)
            reward += GAMMA**elapsed_s * earned
            elapsed_s += info["dt"]
            total += earned
            done = ended or cut_off
            if done or elapsed_s >= env.dt_s[0] - 1e-9:
                break
            step = 0
            skipped += 1
        assert rewards[0] == pytest.approx(scale * reward, rel=1e-5, abs=1e-7)
        assert env.dt_s[0] == pytest.approx(elapsed_s)
        assert dones[0] == done
    assert infos[0]["metrics"] == info["metrics"]
    assert infos[0]["episode"]["r"] == pytest.approx(total)
    for name, array in infos[0]["terminal_observation"].items():
        np.testing.assert_array_equal(array, observation[name])
    assert skipped > 5
    env.close()


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (3, 7)])
def test_actions_of_a_smaller_cluster_keep_their_meaning(sizes: tuple[int, int]) -> None:
    small, large = ActionCodec(5, sizes[0], 3), ActionCodec(5, sizes[1], 3)
    rows = np.arange(5, dtype=np.int32)
    there = padded_actions(small, large)
    assert len(there) == small.num_actions
    for action, other in enumerate(there):
        assert small.decode(action, rows) == large.decode(int(other), rows)


def test_clusters_of_two_sizes_in_one_batch() -> None:
    """The smaller one behaves as it does alone."""
    settings: dict[str, Any] = {"workload": FEW}
    alone = TrainingVecEnv([QLMVectorEnv(2, ONE_A100, **settings)], PLACING, GAMMA, 2.0)
    both = TrainingVecEnv([QLMVectorEnv(2, ONE_A100, **settings), QLMVectorEnv(1, **settings)], PLACING, GAMMA, 2.0)
    alone.seed(3)
    both.seed(3)
    mine, padded = alone.reset(), both.reset()
    there = padded_actions(alone.codec, both.codec)
    rng = np.random.default_rng(1)
    for _ in range(60):
        assert (padded["instance_mask"].sum(1) == [1, 1, 2]).all()
        np.testing.assert_array_equal(padded["instances"][:2, :1], mine["instances"])
        np.testing.assert_array_equal(padded["groups"][:2], mine["groups"])
        np.testing.assert_array_equal(both.action_masks()[:2, there], alone.action_masks())
        assert both.action_masks()[:2].sum() == alone.action_masks().sum()
        actions = choose(alone, rng)
        mine, rewards, dones, _ = alone.step(actions)
        padded, more, ended, infos = both.step(np.append(there[actions], 0))
        np.testing.assert_array_equal(more[:2], rewards)
        np.testing.assert_array_equal(ended[:2], dones)
    assert all(
        info["terminal_observation"]["instances"].shape == both.observation_space["instances"].shape
        for info in infos
        if info
    )


def test_scenarios_that_do_not_go_together() -> None:
    one = QLMVectorEnv(1, workload=FEW)
    other = QLMVectorEnv(1, workload=FEW, environment={"max_groups": 8})
    with pytest.raises(ConfigError, match="must agree in max_groups"):
        TrainingVecEnv([one, other], PLACING, GAMMA, 1.0)


def test_a_restored_state_goes_on_as_the_first() -> None:
    first, second = training_env(3), training_env(3)
    first.seed(1)
    second.seed(77)
    first.reset()
    second.reset()
    rng = np.random.default_rng(2)
    for _ in range(30):
        first.step(choose(first, rng))
    state = first.state()
    second.restore({name: array.copy() for name, array in state.items()})
    ended = 0
    for _ in range(150):
        actions = choose(first, rng)
        np.testing.assert_array_equal(first.action_masks(), second.action_masks())
        mine, rewards, dones, _ = first.step(actions)
        theirs, same, also, _ = second.step(actions)
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])
        np.testing.assert_array_equal(rewards, same)
        np.testing.assert_array_equal(dones, also)
        ended += int(dones.sum())
    assert ended > 0  # episodes that begin draw from the restored generators


def test_a_state_of_other_environments_is_refused() -> None:
    first, second = training_env(2), training_env(3)
    first.reset()
    second.reset()
    with pytest.raises(ConfigError, match="another number of environments"):
        second.restore(first.state())
    other = TrainingVecEnv([QLMVectorEnv(2, workload={**FEW, "num_requests": 26})], PLACING, GAMMA, 2.0)
    other.reset()
    with pytest.raises(ConfigError, match="of other settings"):
        other.restore(first.state())


def test_threads_change_nothing() -> None:
    """Also where some environments skip time and others wait."""
    one, three = training_env(5), training_env(5, threads=3)
    one.seed(2)
    three.seed(2)
    one.reset()
    three.reset()
    rng = np.random.default_rng(3)
    for _ in range(80):
        actions = choose(one, rng)
        mine, rewards, dones, _ = one.step(actions)
        theirs, same, also, _ = three.step(actions)
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])
        np.testing.assert_array_equal(rewards, same)
        np.testing.assert_array_equal(dones, also)
    three.close()
