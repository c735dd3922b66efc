"""Which of the legal actions a learned policy chooses from.

All of them is a lot: hundreds of balances a decision, most of which only shuffle queues. A smaller set makes learning
faster, and what it leaves out is left out when the policy is used, too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planners.learned.spec import ActionSet
from qlm_env.compiled import compiled
from qlm_env.features import GROUP_FEATURES, columns

SWAPS = ("none", "head", "all")


class Layout(NamedTuple):
    """Where actions and features stand; G rows of groups, I instances, M models."""

    num_rows: int
    num_instances: int
    num_models: int
    queued: int
    """Columns of ``groups``."""
    queue: int
    position: int


def make_layout(num_rows: int, num_instances: int, num_models: int, num_classes: int) -> Layout:
    """The layout of an environment's actions and observations."""
    at = columns(GROUP_FEATURES, num_models, num_classes)
    starts = (at[name].start for name in ("queued", "queue", "position"))
    return Layout(num_rows, num_instances, num_models, *starts)


class Rules(NamedTuple):
    """An action set as numbers, for compiled code."""

    only_new: bool
    hold: bool
    swaps: int
    """Index into SWAPS."""
    evict: bool
    warm_start: bool


def make_rules(actions: ActionSet) -> Rules:
    """The same as numbers."""
    return Rules(actions.moves == "new", actions.hold, SWAPS.index(actions.swaps), actions.evict, actions.warm_start)


@compiled
def choose_from(
    rules: Rules,
    layout: Layout,
    legal: NDArray[np.int8],
    groups: NDArray[np.float32],
    masks: NDArray[np.bool_],
    forced: NDArray[np.bool_],
    head_model: NDArray[np.int64],
) -> None:
    """Write which actions of each environment are in the set and legal.

    Args:
        legal: (N, n) the environments' masks.
        groups: (N, G, F) their observations.
        masks: (N, n) to fill; no row is empty.
        forced: (N,) to fill: whether ``advance`` is all there is.
        head_model: (I,) scratch.
    """
    num_instances, num_models = layout.num_instances, layout.num_models
    balances = 1 + 2 * layout.num_rows * num_instances
    pulls = balances + num_instances
    evicts = pulls + 2 * num_instances
    swaps = evicts + num_instances * num_models
    for k in range(len(legal)):
        choices = 0
        placeable = False
        head_model[:] = -1
        for row in range(layout.num_rows):
            queued = groups[k, row, layout.queued] > 0.5
            if queued and groups[k, row, layout.position] == 1.0:
                i = round(groups[k, row, layout.queue] * num_instances) - 1
                for model in range(num_models):
                    if groups[k, row, model] == 1.0:
                        head_model[i] = model
            for a in range(1 + 2 * row * num_instances, 1 + 2 * (row + 1) * num_instances):
                allowed = legal[k, a] != 0 and not (rules.only_new and queued)
                masks[k, a] = allowed
                choices += allowed
                placeable = placeable or (allowed and not queued)
        for a in range(balances, len(legal[k])):
            allowed = legal[k, a] != 0
            if pulls <= a < evicts:
                allowed = allowed and rules.evict
            elif evicts <= a < swaps:
                i, model = divmod(a - evicts, num_models)
                allowed = allowed and (rules.swaps == 2 or (rules.swaps == 1 and head_model[i] == model))
            elif a >= swaps:
                allowed = allowed and rules.warm_start
            masks[k, a] = allowed
            choices += allowed
        forced[k] = choices == 0
        masks[k, 0] = legal[k, 0] != 0 and (rules.hold or not placeable)
