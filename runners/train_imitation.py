"""Behaviour cloning: a network learns what a planner did, and what came of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from planners.learned.base import Network
from planners.learned.demonstrations import batches, read_demonstration, read_index, returns, within
from planners.learned.networks import ILLEGAL, make_network
from planners.learned.spec import MlpSpec, PolicySpec
from planners.learned.train_spec import ImitationSpec
from qlm_env.spec import ConfigError
from runners.progress import CountedProgress
from runners.train import STATE, begin_with, require_numbers
from runners.train_config import TrainConfig
from runners.train_log import TrainingLog
from runners.train_state import State, write_state


class Decisions:
    """The decisions of several episodes that a policy could learn. T in all.

    Args:
        paths: the episodes' files.
        spec: which actions count, and how returns are discounted.
        policy: the sizes of the observations.
    """

    def __init__(self, paths: list[Path], spec: ImitationSpec, policy: PolicySpec) -> None:
        observations: dict[str, list[np.ndarray]] = {}
        masks, actions, values = [], [], []
        self.skipped = 0
        for path in paths:
            demonstration = read_demonstration(path)
            allowed, usable = within(demonstration, spec.actions, policy.spaces)
            self.skipped += int((~usable).sum())
            for name, array in demonstration.observations.items():
                observations.setdefault(name, []).append(array[usable])
            masks.append(allowed[usable])
            actions.append(demonstration.actions[usable])
            values.append(returns(demonstration, spec.gamma, spec.reward_scale)[usable])
        self._observations = {name: torch.from_numpy(np.concatenate(a)) for name, a in observations.items()}
        self._masks = torch.from_numpy(np.concatenate(masks))
        self._actions = torch.from_numpy(np.concatenate(actions))
        self._values = torch.from_numpy(np.concatenate(values))

    def __len__(self) -> int:
        return len(self._actions)

    def losses(self, network: Network, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of the actions, squared error of the returns, and the share of actions guessed right."""
        rows = torch.from_numpy(chosen)
        observation = {name: array[rows] for name, array in self._observations.items()}
        logits = network.logits(observation).masked_fill(~self._masks[rows], ILLEGAL)
        actions = self._actions[rows]
        values = network.value(observation).squeeze(1)
        right = (logits.argmax(1) == actions).float().mean()
        return (
            torch.nn.functional.cross_entropy(logits, actions),
            torch.nn.functional.mse_loss(values, self._values[rows]),
            right,
        )


def imitate(
    config: TrainConfig, spec: ImitationSpec, policy: PolicySpec, log: TrainingLog, state: State | None
) -> None:
    """Train on recorded episodes.

    Raises:
        ConfigError: there are none, or they are of other spaces.
        CommandFailed: weights that are not numbers.
    """
    torch.set_num_threads(spec.torch_threads)
    folder = Path(spec.dataset)
    spaces, paths = read_index(folder)
    if spaces.classes != policy.spaces.classes or (isinstance(spec.network, MlpSpec) and spaces != policy.spaces):
        raise ConfigError(f"'train.dataset': recorded with {spaces}, not {policy.spaces}")
    held_out = max(1, round(spec.validation_share * len(paths)))
    if held_out >= len(paths):
        raise ConfigError(f"'train.dataset': '{folder}' needs at least two episodes (one is held out)")
    recorded = policy.model_copy(update={"spaces": spaces})
    decisions = Decisions(paths[held_out:], spec, recorded)
    unseen = Decisions(paths[:held_out], spec, recorded)
    if not len(decisions) or not len(unseen):
        raise ConfigError("'train.actions': none of the recorded decisions could be taken with these")
    torch.manual_seed(config.options.seed)
    rng = np.random.default_rng(config.options.seed)
    network = make_network(spec.network, spaces)
    optimizer = torch.optim.Adam(network.parameters(), lr=spec.learning_rate)
    step = 0
    if state is not None:
        network.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["steps"])
    elif spec.initial is not None:
        begin_with(network, spec, config.scenario)
    samples = batches(len(decisions), spec.batch_size, rng)
    for _ in range(step):
        next(samples)
    progress = CountedProgress("evaluations", 1 + (spec.total_steps - 1) // spec.evaluate_steps, len(log.curve))
    with progress:
        while step < spec.total_steps and log_goes_on(log):
            guess, error, _ = decisions.losses(network, next(samples))
            optimizer.zero_grad()
            (guess + spec.value_coef * error).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % spec.evaluate_steps == 0 or step == spec.total_steps:
                require_numbers(network, config)
                with torch.no_grad():
                    likelihood, value_error, right = unseen.losses(network, np.arange(len(unseen)))
                more = {
                    "validation_loss": float(likelihood),
                    "validation_accuracy": float(right),
                    "validation_value_error": float(value_error),
                    "decisions": len(decisions),
                    "skipped": decisions.skipped,
                }
                line = log.evaluate(network, step, **more)
                progress.advance(f"{line}; {100 * float(right):.1f} % of unseen decisions alike")
                write_state(
                    config.out / STATE,
                    {
                        "steps": step,
                        "policy": network.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "curve": log.curve,
                    },
                )


def log_goes_on(log: TrainingLog) -> bool:
    """Whether no evaluation has given a reason to stop."""
    return not log.curve or log.reason_to_stop() is None
