"""DQN keeps to legal actions and discounts by time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sb3_contrib", reason="needs the train extra")

from planners.learned.algorithms import make_algorithm, network_of
from planners.learned.masked_dqn import DISCOUNT_KEY, MASK_KEY, MaskInObservation
from planners.learned.networks import ILLEGAL
from planners.learned.planner import spaces_of
from planners.learned.spec import ActionSet, MlpSpec, PolicySpec
from planners.learned.train_spec import DqnSpec
from planners.learned.training_env import TrainingVecEnv
from qlm_env.vector import QLMVectorEnv

FEW: dict[str, Any] = {"preset": "smoke", "num_requests": 12}
PLACING = ActionSet(moves="new", hold=False, swaps="head", evict=False, warm_start=False)
GAMMA = 0.9


def training_env() -> TrainingVecEnv:
    vector = QLMVectorEnv(3, workload=FEW, environment={"max_drain_s": 60.0})
    env = TrainingVecEnv([vector], PLACING, GAMMA, 2.0)
    env.seed(0)
    return env


@pytest.fixture(scope="module")
def trained() -> Any:
    env = training_env()
    spec = DqnSpec(
        kind="dqn", network=MlpSpec(kind="mlp", hidden=(16,)), actions=PLACING, gamma=GAMMA, num_envs=3,
        buffer_size=600, batch_size=16, train_freq=2, gradient_steps=1, exploration_final_eps=0.5,
    )  # fmt: skip
    policy = PolicySpec(network=spec.network, actions=PLACING, spaces=spaces_of(env.parts[0].env.scenario))
    algorithm = make_algorithm(spec, policy, env, 0)
    algorithm.learn(450)
    return algorithm


def test_every_action_taken_was_legal(trained: Any) -> None:
    buffer = trained.replay_buffer
    assert buffer.pos > 100
    masks, actions = buffer.observations[MASK_KEY][: buffer.pos], buffer.actions[: buffer.pos]
    assert np.take_along_axis(masks, actions.astype(int), 2).all()
    chosen = np.unique(actions)
    assert len(chosen) > 5  # it explores


def test_steps_are_discounted_by_their_time(trained: Any) -> None:
    samples = trained.replay_buffer.sample(64)
    discounts = samples.discounts.numpy()
    assert discounts.shape == (64, 1)
    assert len(np.unique(discounts)) > 3
    assert (discounts <= 1).all()


def test_illegal_actions_are_worth_less_than_any_other(trained: Any) -> None:
    samples = trained.replay_buffer.sample(8)
    values, masks = trained.q_net(samples.observations), samples.observations[MASK_KEY] > 0
    assert (values[~masks] == ILLEGAL).all()
    assert (values[masks] > ILLEGAL / 2).all()
    assert network_of(trained) is trained.q_net.network


def test_the_discount_stands_beside_the_observation_it_led_to() -> None:
    env = MaskInObservation(training_env(), GAMMA)
    env.reset()
    for _ in range(40):
        actions = np.array([int(np.flatnonzero(mask)[0]) for mask in env.venv.action_masks()])
        observation, _, dones, infos = env.step(actions)
        np.testing.assert_allclose(observation[DISCOUNT_KEY][:, 0], GAMMA**env.dt_s, rtol=1e-6)
        np.testing.assert_array_equal(observation[MASK_KEY].astype(bool), env.venv.action_masks())
        for k in np.flatnonzero(dones):
            assert infos[k]["terminal_observation"][MASK_KEY].sum() == 1
