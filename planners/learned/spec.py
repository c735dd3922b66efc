"""What a learned policy is made of, as plain values: they stand in every checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qlm_env.spec import PositiveInt, Spec


class PointerSpec(Spec):
    """Scores (group, instance) pairs with shared weights; runs on clusters of any size."""

    kind: Literal["pointer"] = "pointer"
    hidden: PositiveInt = 32


class MlpSpec(Spec):
    """One network for the actions and one for the value, on the flattened observation; of one cluster size only."""

    kind: Literal["mlp"]
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (128, 128)


NetworkSpec = Annotated[PointerSpec | MlpSpec, Field(discriminator="kind")]


class SpacesSpec(Spec):
    """Sizes of observations and actions."""

    max_groups: PositiveInt
    instances: PositiveInt
    models: PositiveInt
    classes: PositiveInt


class ActionSet(Spec):
    """A policy's choice among legal actions. ``advance`` is always in it, except as ``hold`` says."""

    moves: Literal["new", "all"] = "all"
    """Balances: only of groups that stand in no virtual queue, or of all groups."""
    hold: bool = True
    """Whether time may pass while a group that stands in no queue could be put into one."""
    swaps: Literal["none", "head", "all"] = "all"
    """Swaps: none, only to the model of the instance's head group, or all."""
    evict: bool = True
    warm_start: bool = True


class PolicySpec(Spec):
    """Everything about a policy but its weights."""

    network: NetworkSpec
    actions: ActionSet
    spaces: SpacesSpec
