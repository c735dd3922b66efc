"""Stable-Baselines3's algorithms, set up for a training."""

from __future__ import annotations

from typing import Any

from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C
from stable_baselines3.common.base_class import BaseAlgorithm

from planners.learned.base import Network
from planners.learned.masked_dqn import MaskedDQN, MaskedDQNPolicy, MaskInObservation, SmdpReplayBuffer
from planners.learned.policies import ActorCriticPolicy
from planners.learned.smdp import SmdpDictRolloutBuffer, SmdpMaskableDictRolloutBuffer
from planners.learned.spec import PolicySpec
from planners.learned.train_spec import A2cSpec, DqnSpec, OnPolicySpec, PpoSpec
from planners.learned.training_env import TrainingVecEnv


def make_algorithm(
    spec: PpoSpec | A2cSpec | DqnSpec, policy: PolicySpec, env: TrainingVecEnv, seed: int
) -> BaseAlgorithm:
    """The algorithm of a training on ``env``, with fresh weights."""
    common: dict[str, Any] = {"gamma": spec.gamma, "seed": seed, "device": "cpu", "policy_kwargs": {"policy": policy}}
    if isinstance(spec, DqnSpec):
        return MaskedDQN(
            MaskedDQNPolicy,
            MaskInObservation(env, spec.gamma),
            learning_rate=spec.learning_rate,
            learning_starts=0,
            replay_buffer_class=SmdpReplayBuffer,
            **_of(spec, "buffer_size", "batch_size", "train_freq", "gradient_steps", "target_update_interval"),
            **_of(spec, "exploration_fraction", "exploration_final_eps"),
            **common,
        )
    common |= _of(spec, "n_steps", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")
    common |= {"learning_rate": falling(spec), "rollout_buffer_kwargs": {"clock": env}}
    if isinstance(spec, A2cSpec):
        masked = MaskInObservation(env, spec.gamma)
        network: Any = ActorCriticPolicy
        return A2C(network, masked, rollout_buffer_class=SmdpDictRolloutBuffer, **common)
    return MaskablePPO(
        ActorCriticPolicy,
        env,
        rollout_buffer_class=SmdpMaskableDictRolloutBuffer,
        **_of(spec, "batch_size", "n_epochs", "clip_range", "target_kl"),
        **common,
    )


def network_of(algorithm: BaseAlgorithm) -> Network:
    """The network that an algorithm trains."""
    policy: Any = algorithm.policy
    network: Network = policy.q_net.network if isinstance(algorithm, MaskedDQN) else policy.network
    return network


def falling(spec: OnPolicySpec) -> Any:
    """The learning rate by what remains of the training, from 1 to 0."""
    first, last = spec.learning_rate, spec.final_learning_rate
    return lambda remaining: last + (first - last) * remaining


def _of(spec: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in names}
