"""The settings of a training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from planners.learned.spec import ActionSet, NetworkSpec
from qlm_env.spec import NonNegativeFloat, PositiveFloat, PositiveInt, Share, Spec

Discount = Annotated[float, Field(gt=0, lt=1)]


class VariantsSpec(Spec):
    """Scenarios drawn around the given one, to train on together."""

    count: PositiveInt = 1
    """1 is the given scenario alone; the first of several is the given one, too."""
    loads: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Bounds of a uniform factor on the arrival rate."""
    mix_concentration: PositiveFloat | None = None
    """Of the Dirichlet distribution that mixes are drawn from, around the given one; ``None`` keeps that."""
    cluster_sizes: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    """Factors on the number of instances of each device, one of which is drawn."""


class TrainingSpec(Spec):
    """What every training has."""

    network: NetworkSpec
    actions: ActionSet = ActionSet()
    variants: VariantsSpec = VariantsSpec()
    initial: str | None = None
    """Checkpoint whose weights to begin with."""
    gamma: Discount = 0.97
    """Discount a second."""
    reward_scale: PositiveFloat = 3.0
    """About the discounted return of meeting every SLO."""
    learning_rate: PositiveFloat = 1e-3
    max_drain_s: PositiveFloat = 1800.0
    """In training and its evaluations an episode is cut off this long after the last arrival, or sooner if the
    environment says so: what a policy forgets should not take hours of every episode."""
    total_steps: PositiveInt = 1_000_000
    """Decisions of all environments together; for imitation, minibatches."""
    evaluate_steps: PositiveInt = 100_000
    """Steps between two evaluations, each of which leaves a checkpoint."""
    evaluation_seeds: PositiveInt = 8
    """Held-out workloads of an evaluation."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations without a better one."""
    stop_at: Share | None = None
    """Stop at this SLO attainment in an evaluation."""


class OnPolicySpec(TrainingSpec):
    """What PPO and A2C have in common."""

    num_envs: PositiveInt = 64
    env_threads: PositiveInt = 1
    torch_threads: PositiveInt = 1
    n_steps: PositiveInt = 96
    """Decisions of each environment in a rollout."""
    gae_lambda: Discount = 0.9
    """A second, as ``gamma``."""
    ent_coef: NonNegativeFloat = 0.001
    vf_coef: NonNegativeFloat = 0.5
    max_grad_norm: PositiveFloat = 0.5
    final_learning_rate: NonNegativeFloat = 1e-4
    """The learning rate falls linearly to this."""


class PpoSpec(OnPolicySpec):
    """MaskablePPO."""

    kind: Literal["ppo"]
    batch_size: PositiveInt = 768
    n_epochs: PositiveInt = 4
    clip_range: PositiveFloat = 0.2
    target_kl: PositiveFloat | None = None


class A2cSpec(OnPolicySpec):
    """A2C, as a check that PPO is worth its trouble."""

    kind: Literal["a2c"]


class DqnSpec(TrainingSpec):
    """DQN whose maxima and explorations keep to what is legal."""

    kind: Literal["dqn"]
    num_envs: PositiveInt = 16
    env_threads: PositiveInt = 1
    torch_threads: PositiveInt = 1
    buffer_size: PositiveInt = 50_000
    batch_size: PositiveInt = 256
    train_freq: PositiveInt = 4
    gradient_steps: PositiveInt = 4
    target_update_interval: PositiveInt = 5_000
    exploration_fraction: Share = 0.3
    exploration_final_eps: Share = 0.02


class ImitationSpec(TrainingSpec):
    """Behaviour cloning of a planner, from episodes written by `qlm record`."""

    kind: Literal["imitation"]
    dataset: str
    """Folder of the recorded episodes."""
    batch_size: PositiveInt = 512
    validation_share: Share = 0.1
    """Of the episodes, at least one; kept out of the training."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the error in the planner's return, which prepares the value for PPO."""
    torch_threads: PositiveInt = 1


TrainSpec = Annotated[PpoSpec | A2cSpec | DqnSpec | ImitationSpec, Field(discriminator="kind")]
