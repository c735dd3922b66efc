"""The Stable-Baselines3 adapter gives what DummyVecEnv of single environments gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qlm_env.env import QLMEnv
from qlm_env.vector import QLMVectorEnv, random_legal_actions
from tests.test_vector import FEW, QUICK, assert_same

vec_env = pytest.importorskip("stable_baselines3.common.vec_env", reason="needs the rl extra")
masking = pytest.importorskip("sb3_contrib.common.maskable.utils", reason="needs the rl extra")

SETTINGS: dict[str, dict[str, Any]] = {
    "served": {"workload": FEW, "environment": QUICK},
    "cut_off": {"workload": FEW, "environment": {**QUICK, "max_drain_s": 3.0}},
}


def adapter(num_envs: int, **settings: Any) -> Any:
    from planners.learned.sb3_vec_env import QLMVecEnv

    return QLMVecEnv(QLMVectorEnv(num_envs, **settings))


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_those_of_dummy_vec_env(name: str) -> None:
    settings = SETTINGS[name]
    ours, theirs = adapter(3, **settings), vec_env.DummyVecEnv([lambda: QLMEnv(**settings)] * 3)
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    ours.seed(8)
    theirs.seed(8)
    assert_same(ours.reset(), dict(theirs.reset()), "reset")
    assert_same(tuple(ours.reset_infos), tuple(theirs.reset_infos), "reset_infos")
    rng = np.random.default_rng(0)
    truncated = ended = 0
    for step in range(400):
        masks = masking.get_action_masks(ours)
        assert_same(masks, masking.get_action_masks(theirs), "masks")
        actions = random_legal_actions(masks.view(np.int8), rng)
        actions[rng.random(3) < 0.4] = 0
        observations, rewards, dones, infos = ours.step(actions)
        expected = theirs.step(actions)
        assert_same(observations, dict(expected[0]), f"observations of step {step}")
        assert_same((rewards, dones, tuple(infos)), (*expected[1:3], tuple(expected[3])), f"step {step}")
        assert_same(tuple(ours.reset_infos), tuple(theirs.reset_infos), "reset_infos")
        ended += int(dones.sum())
        truncated += sum(info["TimeLimit.truncated"] for info in infos)
    assert ended > 1
    assert (truncated > 0) == (name == "cut_off")
    ours.close()


def test_masks_of_some_environments() -> None:
    env = adapter(4, workload=FEW)
    assert masking.is_masking_supported(env)
    env.reset()
    every = masking.get_action_masks(env)
    assert every.shape == (4, env.action_space.n)
    assert every.dtype == bool
    np.testing.assert_array_equal(np.stack(env.env_method("action_masks", indices=[2, 0])), every[[2, 0]])
    np.testing.assert_array_equal(env.env_method("action_masks", indices=1)[0], every[1])


def test_attributes_are_those_of_the_batch() -> None:
    env = adapter(3, workload=FEW)
    assert env.get_attr("codec", indices=[0, 2]) == [env.env.codec] * 2
    assert env.env_is_wrapped(object) == [False] * 3  # type: ignore[arg-type]
    assert not env.has_attr("step_plan")
    with pytest.raises(AttributeError, match="allowed: action_masks"):
        env.env_method("step_plan")
    with pytest.raises(AttributeError, match="cannot be set"):
        env.set_attr("render_mode", "ansi")


def test_maskable_ppo_learns_on_it() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    env = adapter(4, workload=FEW)
    model = contrib.MaskablePPO(
        "MultiInputPolicy", vec_env.VecMonitor(env), n_steps=16, batch_size=32, n_epochs=1, seed=0
    )
    model.learn(128)
    observation = env.reset()
    masks = masking.get_action_masks(env)
    actions, _ = model.predict(observation, action_masks=masks)
    assert masks[np.arange(4), actions].all()
