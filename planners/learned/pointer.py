"""A network that points: it scores (group, instance) pairs, whatever their number.

Groups, instances and models are encoded by functions shared among them; groups and instances then attend to each
other, with what holds between the two (is in its queue, its model is active there, warm, ...) as a bias. The logit of
an action is a function of the encodings of what it names. So the same weights run on clusters of any size, and on any
number of models, and permuting groups, instances or models permutes the logits and nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from planners.learned.base import Network
from qlm_env.features import CLUSTER_FEATURES, GROUP_FEATURES, INSTANCE_FEATURES, columns, width

PER_MODEL = ("active_model", "swap_target", "warm", "staging", "fits")
"""Instance features that say something of each model."""

PAIR_FEATURES = len(PER_MODEL) + 2
"""What holds between a group and an instance: those of the group's model, whether it is queued there, its position."""

FAR = -1e9
"""In place of an attention score to what is not there."""


class Shapes:
    """Columns of the observation arrays, for M models and C SLO classes."""

    def __init__(self, num_models: int, num_classes: int) -> None:
        group = columns(GROUP_FEATURES, num_models, num_classes)
        instance = columns(INSTANCE_FEATURES, num_models, num_classes)
        self.num_models = num_models
        self.queued, self.queue, self.position = (group[name].start for name in ("queued", "queue", "position"))
        # Of a group everything but its model and the number of its instance, which are told as relations.
        self.group_own = [
            column
            for name, part in group.items()
            if name not in ("model", "queue")
            for column in range(part.start, part.stop)
        ]
        self.instance_own = [part.start for name, part in instance.items() if name not in PER_MODEL]
        self.per_model = [instance[name] for name in PER_MODEL]
        self.cluster = width(CLUSTER_FEATURES, num_models, num_classes)


class Scene:
    """An observation taken apart. B observations, G groups, I instances, M models."""

    def __init__(self, observation: dict[str, Tensor], shapes: Shapes) -> None:
        used = max(1, int(observation["group_mask"].sum(1).max().item()))
        groups = observation["groups"][:, :used]  # rows are filled from the first on
        self.cluster = observation["cluster"]
        self.group_mask = observation["group_mask"][:, :used]
        self.instance_mask = observation["instance_mask"]
        self.groups = groups[:, :, shapes.group_own]
        instances = observation["instances"]
        self.instances = instances[:, :, shapes.instance_own]
        self.of_model = groups[:, :, : shapes.num_models]
        """(B, G, M) the share of a row's requests that are of a model"""
        self.flags = torch.stack([instances[:, :, part] for part in shapes.per_model], -1)
        """(B, I, M, 5)"""
        count = self.instance_mask.sum(1)[:, None]
        queue = torch.round(groups[:, :, shapes.queue] * count) - 1.0
        index = torch.arange(instances.shape[1], device=instances.device)
        own = (groups[:, :, shapes.queued] > 0.5).unsqueeze(-1) & (groups[:, :, shapes.position] > 0.0).unsqueeze(-1)
        here = ((queue[:, :, None] == index) & own).to(groups.dtype)
        flags = torch.einsum("bgm,bimf->bgif", self.of_model, self.flags)
        position = groups[:, :, shapes.position, None] * here
        self.pairs = torch.cat([flags, here[..., None], position[..., None]], -1)
        """(B, G, I, 7)"""


def mean_over(rows: Tensor, mask: Tensor) -> Tensor:
    """(B, H) the mean of the rows (B, N, H) whose mask (B, N) is 1."""
    return (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1.0)


class SetEncoder(nn.Module):
    """Encodings of groups, instances and models, each (B, rows, H)."""

    def __init__(self, shapes: Shapes, hidden: int) -> None:
        super().__init__()
        self.group = nn.Linear(len(shapes.group_own) + shapes.cluster, hidden)
        self.instance = nn.Linear(len(shapes.instance_own) + shapes.cluster, hidden)
        self.model = nn.Linear(hidden + len(PER_MODEL), hidden)
        self.group_of_model = nn.Linear(hidden, hidden)
        self.instance_of_models = nn.Linear(2 * hidden, hidden)

    def forward(self, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
        """Groups, instances, models."""
        group = torch.relu(self.group(_beside(scene.groups, scene.cluster))) * scene.group_mask[..., None]
        of_model = torch.einsum("bgm,bgh->bmh", scene.of_model, group) / 8.0
        count = scene.instance_mask.sum(1)[:, None, None]
        model = torch.relu(self.model(torch.cat([of_model, scene.flags.sum(1) / count], -1)))
        group = torch.relu(group + self.group_of_model(torch.einsum("bgm,bmh->bgh", scene.of_model, model)))
        active, coming = (torch.einsum("bim,bmh->bih", scene.flags[..., f], model) for f in (0, 1))
        instance = self.instance(_beside(scene.instances, scene.cluster))
        instance = torch.relu(instance + self.instance_of_models(torch.cat([active, coming], -1)))
        return group, instance, model


def _beside(rows: Tensor, context: Tensor) -> Tensor:
    """Rows (B, N, F) with the context (B, K) beside each."""
    return torch.cat([rows, context[:, None].expand(-1, rows.shape[1], -1)], -1)


class PointerNetwork(Network):
    """Logits of all actions, and the value of a state.

    Args:
        num_models, num_classes: of the observations; weights do not depend on the number of models.
        hidden: width H of all encodings.
    """

    def __init__(self, num_models: int, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.shapes = shapes = Shapes(num_models, num_classes)
        self.encode = SetEncoder(shapes, hidden)
        self.query, self.key = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.bias = nn.Linear(PAIR_FEATURES, 1, bias=False)
        self.to_group, self.to_instance = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.context = nn.Linear(2 * hidden + shapes.cluster, hidden)
        self.pair_group, self.pair_instance = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
        self.pair_relation = nn.Linear(PAIR_FEATURES, hidden, bias=False)
        self.pair_context = nn.Linear(hidden, hidden, bias=False)
        self.pair_score = nn.Linear(hidden, 2)
        self.model_instance, self.model_model = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
        self.model_flags = nn.Linear(len(PER_MODEL), hidden, bias=False)
        self.model_score = nn.Linear(hidden, 2)
        self.instance_hidden, self.instance_score = nn.Linear(2 * hidden, hidden), nn.Linear(hidden, 3)
        self.advance_score = nn.Linear(hidden, 1)
        # The value has encoders of its own: its errors are large at first and would drown the policy's gradient.
        self.value_encode = SetEncoder(shapes, hidden)
        self.value_hidden = nn.Linear(4 * hidden + shapes.cluster, 2 * hidden)
        self.value_score = nn.Linear(2 * hidden, 1)
        for score in (self.pair_score, self.model_score, self.instance_score, self.advance_score):
            nn.init.orthogonal_(score.weight, 0.01)
            nn.init.zeros_(score.bias)

    def logits(self, observation: dict[str, Tensor]) -> Tensor:
        """(B, n) in the layout of :class:`qlm_env.lso.ActionCodec`, of actions legal or not."""
        scene = Scene(observation, self.shapes)
        group, instance, model = self.encode(scene)
        scores = torch.einsum("bgh,bih->bgi", self.query(group), self.key(instance)) / math.sqrt(group.shape[-1])
        scores = scores + self.bias(scene.pairs).squeeze(-1)
        no_group, no_instance = scene.group_mask[:, :, None] == 0, scene.instance_mask[:, None] == 0
        seen = torch.softmax(scores.masked_fill(no_instance, FAR), 2)
        seeing = torch.softmax(scores.masked_fill(no_group, FAR), 1)
        with_instances = torch.relu(group + self.to_group(torch.einsum("bgi,bih->bgh", seen, instance)))
        with_groups = torch.relu(instance + self.to_instance(torch.einsum("bgi,bgh->bih", seeing, group)))
        group, instance = with_instances, with_groups
        pooled = [mean_over(group, scene.group_mask), mean_over(instance, scene.instance_mask), scene.cluster]
        context = torch.relu(self.context(torch.cat(pooled, -1)))

        pairs = self.pair_relation(scene.pairs) + self.pair_instance(instance)[:, None]
        pairs = pairs + (self.pair_group(group) + self.pair_context(context)[:, None])[:, :, None]
        balances = self.pair_score(torch.relu(pairs))
        missing = observation["groups"].shape[1] - group.shape[1]
        balances = nn.functional.pad(balances, (0, 0, 0, 0, 0, missing))
        # Of groups and models as of models alone: which model an instance should turn to.
        by_model = self.model_instance(instance)[:, :, None] + self.model_model(model)[:, None]
        by_model = self.model_score(torch.relu(by_model + self.model_flags(scene.flags)))
        alone = self.instance_score(torch.relu(self.instance_hidden(_beside(instance, context))))
        parts = (
            self.advance_score(context),
            balances.flatten(1),
            alone[..., 0],
            alone[..., 1:].flatten(1),
            by_model[..., 0].flatten(1),
            by_model[..., 1].flatten(1),
        )
        return torch.cat(parts, 1)

    def value(self, observation: dict[str, Tensor]) -> Tensor:
        """(B, 1) the expected return."""
        scene = Scene(observation, self.shapes)
        group, instance, _ = self.value_encode(scene)
        held = group * scene.group_mask[..., None]
        pooled = (
            mean_over(group, scene.group_mask),
            held.sum(1) / 8.0,
            mean_over(instance, scene.instance_mask),
            _largest(instance, scene.instance_mask),
            scene.cluster,
        )
        value: Tensor = self.value_score(torch.relu(self.value_hidden(torch.cat(pooled, -1))))
        return value


def _largest(rows: Tensor, mask: Tensor) -> Tensor:
    """(B, H) the largest of the rows (B, N, H), none of which is negative, whose mask (B, N) is 1."""
    return (rows * mask[..., None]).amax(1)
