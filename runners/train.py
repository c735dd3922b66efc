"""`qlm train`: a policy trained on one workload, or on many around it.

A killed training goes on where its last checkpoint was when the same command is given again, and ends as it would have
without the interruption: networks, optimizers, environments and generators stand in ``state.pt``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from planners.learned.algorithms import make_algorithm, network_of
from planners.learned.base import Network
from planners.learned.checkpoint import load_checkpoint
from planners.learned.evaluation import HeldOut, make_vector_env
from planners.learned.planner import check_spaces, spaces_of
from planners.learned.spec import PolicySpec
from planners.learned.train_spec import ImitationSpec, TrainingSpec
from planners.learned.training_env import TrainingVecEnv
from planners.learned.variants import draw_variants
from qlm_env.spec import ConfigError, ScenarioSpec
from runners import tracking, train_log
from runners.episode import check_scenario
from runners.errors import CommandFailed, CommandInterrupted
from runners.progress import CountedProgress
from runners.train_config import TrainConfig
from runners.train_log import CHECKPOINT, TrainingLog
from runners.train_state import State, algorithm_state, read_state, restore_algorithm, write_state

STATE = "state.pt"


def train(config: TrainConfig) -> float:
    """Train, or go on with, what ``config`` says, until its last step or a reason to stop.

    Returns:
        the best SLO attainment of all evaluations, which a sweeper may maximise.

    Raises:
        ConfigError: something is set up wrongly, or ``out`` holds a training of other settings.
        CommandFailed: weights that are not numbers; the last good checkpoint is kept.
        CommandInterrupted: Ctrl-C; the last checkpoint is kept.
    """
    spec, out = config.options.train, config.out
    tracking.check(config.options.tracking)
    check_scenario(config.scenario, 0)
    policy = PolicySpec(network=spec.network, actions=spec.actions, spaces=spaces_of(config.scenario))
    if config.options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("'tensorboard': it is not installed; pip install 'qlm-env[train]', or tensorboard=false")
    config_hash = train_log.claim(config)
    state = read_state(out / STATE) if (out / STATE).exists() else None
    if state is not None and state["steps"] >= spec.total_steps:
        print(f"this training is over: its checkpoint is {out / CHECKPOINT}", file=sys.stderr)
        return max(float(row["slo_attainment"]) for row in state["curve"])
    config = dataclasses.replace(config, scenario=cut_off(config.scenario, spec.max_drain_s))
    held_out = HeldOut(config.scenario, spec.actions, spec.evaluation_seeds)
    log = TrainingLog(config, policy, held_out, config_hash)
    if state is not None:
        log.go_on_from(state["curve"])
        print(f"resuming at step {state['steps']} of {spec.total_steps}", file=sys.stderr)
    try:
        if isinstance(spec, ImitationSpec):
            from runners.train_imitation import imitate

            imitate(config, spec, policy, log, state)
        else:
            _train_in_environments(config, policy, log, state)
    except KeyboardInterrupt:
        raise CommandInterrupted(f"interrupted; the same command goes on from the last checkpoint in {out}") from None
    finally:
        held_out.close()
    log.finish()
    best = max(log.curve, key=lambda row: row["slo_attainment"])
    print(
        f"{log.reason_to_stop() or 'done'}: {100 * best['slo_attainment']:.1f} % at step {best['steps']}; "
        f"use it as planner=learned planner.learned.path={out / CHECKPOINT}",
        file=sys.stderr,
    )
    return float(best["slo_attainment"])


def _train_in_environments(config: TrainConfig, policy: PolicySpec, log: TrainingLog, state: State | None) -> None:
    """Reinforcement learning."""
    spec: Any = config.options.train
    torch.set_num_threads(spec.torch_threads)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(config.options.seed).spawn(2)]
    scenarios = draw_variants(config.scenario, spec.variants, streams[0])
    env = make_training_env(scenarios, spec)
    env.seed(int(streams[1].integers(1 << 30, (1 << 31) - spec.num_envs)))
    widest = policy.spaces.model_copy(update={"instances": env.codec.num_instances})
    algorithm = make_algorithm(spec, policy.model_copy(update={"spaces": widest}), env, config.options.seed)
    formats = ["tensorboard"] if config.options.tensorboard else []
    algorithm.set_logger(configure(str(config.out / "tensorboard"), formats))
    if state is not None:
        restore_algorithm(algorithm, env, state)
    elif spec.initial is not None:
        begin_with(network_of(algorithm), spec, config.scenario)
    checkpoints = _Checkpoints(config, spec, log, env)
    with contextlib.closing(env), checkpoints.progress, _divergence_told(algorithm, config):
        algorithm.learn(
            spec.total_steps - algorithm.num_timesteps, callback=checkpoints, reset_num_timesteps=False, log_interval=1
        )
        checkpoints.keep()


def cut_off(scenario: ScenarioSpec, max_drain_s: float) -> ScenarioSpec:
    """The scenario with episodes that end at most ``max_drain_s`` after the last arrival."""
    environment = scenario.environment
    shorter = environment.model_copy(update={"max_drain_s": min(max_drain_s, environment.max_drain_s)})
    return scenario.model_copy(update={"environment": shorter})


def make_training_env(scenarios: list[ScenarioSpec], spec: Any) -> TrainingVecEnv:
    """``spec.num_envs`` environments, dealt to the scenarios.

    Raises:
        ConfigError: there are more scenarios than environments.
    """
    share, more = divmod(spec.num_envs, len(scenarios))
    if share == 0:
        raise ConfigError(f"'train.num_envs': {spec.num_envs} environments for {len(scenarios)} scenarios")
    envs = [make_vector_env(s, share + (k < more), spec.env_threads) for k, s in enumerate(scenarios)]
    return TrainingVecEnv(envs, spec.actions, spec.gamma, spec.reward_scale)


def begin_with(network: Network, spec: TrainingSpec, scenario: ScenarioSpec) -> None:
    """Give a network the weights of ``spec.initial``.

    Raises:
        ConfigError: that policy is of another kind or for other spaces.
    """
    assert spec.initial is not None
    initial, trained = load_checkpoint(spec.initial)
    if initial.network != spec.network:
        raise ConfigError(f"'train.initial': that policy's network is {initial.network}, this one's {spec.network}")
    check_spaces(initial, scenario, spec.initial)
    network.load_state_dict(trained.state_dict())


def require_numbers(network: Network, config: TrainConfig) -> None:
    """Make sure that all weights are numbers.

    Raises:
        CommandFailed: they are not.
    """
    if not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
        raise CommandFailed(
            "the training has diverged: weights are no numbers any more; "
            f"the last good checkpoint is {config.out / CHECKPOINT}, try a smaller train.learning_rate"
        )


@contextlib.contextmanager
def _divergence_told(algorithm: BaseAlgorithm, config: TrainConfig) -> Iterator[None]:
    """torch refuses distributions of what is not a number with a ValueError of many lines."""
    try:
        yield
    except (ValueError, RuntimeError):
        require_numbers(network_of(algorithm), config)
        raise


class _Checkpoints(BaseCallback):
    """Evaluates between rollouts, writes the state, and stops where there is a reason to."""

    def __init__(self, config: TrainConfig, spec: TrainingSpec, log: TrainingLog, env: TrainingVecEnv) -> None:
        super().__init__()
        self._config = config
        self._every = spec.evaluate_steps
        self._log = log
        self._env = env
        done = len(log.curve)
        self.progress = CountedProgress("evaluations", 2 + (spec.total_steps - 1) // spec.evaluate_steps, done)
        self._kept_at = int(log.curve[-1]["steps"]) if log.curve else -1
        self._stop = False

    def _on_rollout_start(self) -> None:
        # Weights that are no numbers must not be written over good ones.
        if self._kept_at < 0 or self.num_timesteps >= self._kept_at + self._every:
            self.keep()
            self._stop = self._log.reason_to_stop() is not None

    def _on_step(self) -> bool:
        return not self._stop

    def keep(self) -> None:
        """Evaluate, and write the state, unless that was just done."""
        steps = self.model.num_timesteps
        if steps == self._kept_at:
            return
        network = network_of(self.model)
        require_numbers(network, self._config)
        self.progress.advance(self._log.evaluate(network, steps))
        self.model.logger.record("evaluation/slo_attainment", self._log.curve[-1]["slo_attainment"])
        write_state(self._config.out / STATE, algorithm_state(self.model, self._env) | {"curve": self._log.curve})
        self._kept_at = steps
