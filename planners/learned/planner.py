"""A trained policy as a planner: the same interface as all others, in comparisons and on any backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from planners.base import Planner
from planners.learned.action_set import choose_from, make_layout, make_rules
from planners.learned.checkpoint import load_checkpoint
from planners.learned.networks import ILLEGAL, likeliest, make_network
from planners.learned.spec import MlpSpec, PolicySpec, SpacesSpec
from planners.spec import LearnedSpec
from qlm_env.lso import Lso
from qlm_env.preview import Choice, Preview
from qlm_env.spec import ConfigError, ScenarioSpec
from qlm_env.view import ClusterView


def spaces_of(scenario: ScenarioSpec) -> SpacesSpec:
    """The sizes of a scenario's observations and actions."""
    return SpacesSpec(
        max_groups=scenario.environment.max_groups,
        instances=scenario.cluster.num_instances,
        models=len(scenario.workload.models),
        classes=len(scenario.slo.classes),
    )


def check_spaces(policy: PolicySpec, scenario: ScenarioSpec, path: str) -> SpacesSpec:
    """The sizes of the scenario, if the policy can be used there.

    Raises:
        ConfigError: it was made for others.
    """
    spaces = spaces_of(scenario)
    fixed = tuple(SpacesSpec.model_fields) if isinstance(policy.network, MlpSpec) else ("classes",)
    for name in fixed:
        made, here = getattr(policy.spaces, name), getattr(spaces, name)
        if made != here:
            raise ConfigError(
                f"checkpoint '{path}' was made for other spaces: {name} is {made} there and {here} here"
                + ("; a pointer policy runs on clusters of any size" if isinstance(policy.network, MlpSpec) else "")
            )
    return spaces


class LearnedPlanner(Planner):
    """Takes its policy's likeliest action, sees what has become of the queues, and so on until that is ``advance``.

    Raises:
        ConfigError: the checkpoint cannot be used.
    """

    def __init__(self, spec: LearnedSpec) -> None:
        self._spec = spec
        self._policy, self._trained = load_checkpoint(spec.path)

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        """An episode begins.

        Raises:
            ConfigError: the policy was made for other spaces.
        """
        spaces = check_spaces(self._policy, view.scenario, self._spec.path)
        self._network = make_network(self._policy.network, spaces).requires_grad_(False)
        self._network.load_state_dict(self._trained.state_dict())
        self._rng = rng
        self._preview = Preview(view)
        self._layout = make_layout(spaces.max_groups, spaces.instances, spaces.models, spaces.classes)
        self._rules = make_rules(self._policy.actions)
        self._mask = np.zeros((1, self._preview.codec.num_actions), bool)
        self._forced = np.zeros(1, bool)
        self._scratch = np.zeros(spaces.instances, np.int64)
        self._choices = 0

    def statistics(self) -> Mapping[str, int]:
        """How often the network was asked."""
        return {"choices": self._choices}

    def act(self, view: ClusterView) -> Sequence[Lso]:
        """The operations to carry out now, in order."""
        lsos: list[Lso] = []
        choice = self._preview.begin()
        while action := self._choose(choice):
            lso, choice = self._preview.take(action)
            lsos.append(lso)
        return lsos

    def _choose(self, choice: Choice) -> int:
        groups = choice.observation["groups"][None]
        choose_from(
            self._rules, self._layout, choice.action_mask[None], groups, self._mask, self._forced, self._scratch
        )
        if self._forced[0]:
            return 0
        self._choices += 1
        observation = {name: torch.from_numpy(array[None]) for name, array in choice.observation.items()}
        logits, mask = self._network.logits(observation), torch.from_numpy(self._mask)
        if self._spec.greedy:
            return int(likeliest(logits, mask))
        probabilities = torch.softmax(logits.masked_fill(~mask, ILLEGAL)[0].double(), 0).numpy()
        return int(self._rng.choice(len(probabilities), p=probabilities / probabilities.sum()))
