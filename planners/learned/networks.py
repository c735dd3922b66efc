"""The networks of learned policies: logits of all actions, and the value of a state, from an observation."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from planners.learned.base import Network
from planners.learned.pointer import PointerNetwork
from planners.learned.spec import MlpSpec, NetworkSpec, SpacesSpec
from qlm_env.lso import ActionCodec
from qlm_env.observation import observation_space

ILLEGAL = -1e9
"""In place of the logit of an action that must not be taken."""

KEYS = ("groups", "group_mask", "instances", "instance_mask", "cluster")


def likeliest(logits: Tensor, masks: Tensor) -> Tensor:
    """(B,) the action to take: ``advance`` if it is likelier than all others together, else the likeliest other.

    The likeliest of all would be ``advance`` long before that, as the others share what is left among many targets.

    Args:
        logits: (B, n)
        masks: (B, n) what may be taken; no row is empty.
    """
    logits = logits.masked_fill(~masks, ILLEGAL)
    others = logits[:, 1:]
    waits = masks[:, 0] & (~masks[:, 1:].any(1) | (logits[:, 0] > others.logsumexp(1)))
    return torch.where(waits, 0, 1 + others.argmax(1))


class MlpNetwork(Network):
    """Two multilayer perceptrons on the flattened observation."""

    def __init__(self, inputs: int, actions: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.policy = _perceptron((inputs, *hidden, actions), 0.01)
        self.critic = _perceptron((inputs, *hidden, 1), 1.0)

    def logits(self, observation: dict[str, Tensor]) -> Tensor:
        """(B, n)"""
        logits: Tensor = self.policy(_flat(observation))
        return logits

    def value(self, observation: dict[str, Tensor]) -> Tensor:
        """(B, 1)"""
        value: Tensor = self.critic(_flat(observation))
        return value


def _flat(observation: dict[str, Tensor]) -> Tensor:
    return torch.cat([observation[key].flatten(1) for key in KEYS], 1)


def _perceptron(sizes: tuple[int, ...], last_gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k, (before, after) in enumerate(pairwise(sizes)):
        last = k == len(sizes) - 2
        linear = nn.Linear(before, after)
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2.0))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


def make_network(spec: NetworkSpec, spaces: SpacesSpec) -> Network:
    """A network with fresh weights, drawn from torch's generator."""
    if isinstance(spec, MlpSpec):
        space = observation_space(spaces.max_groups, spaces.instances, spaces.models, spaces.classes)
        inputs = sum(int(np.prod(box.shape or ())) for box in space.values())
        return MlpNetwork(inputs, codec_of(spaces).num_actions, spec.hidden)
    return PointerNetwork(spaces.models, spaces.classes, spec.hidden)


def codec_of(spaces: SpacesSpec) -> ActionCodec:
    """The action codec of these sizes."""
    return ActionCodec(spaces.max_groups, spaces.instances, spaces.models)
