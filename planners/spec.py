"""The planners there are and their settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from qlm_env.spec import ConfigError, NonNegativeFloat, PositiveFloat, PositiveInt, Spec, parse

Share = Annotated[float, Field(ge=0, le=1)]


class FcfsSpec(Spec):
    """First come first served, each group to the instance expected to finish it first (vLLM behind a balancer)."""

    name: Literal["fcfs"] = "fcfs"


class EdfSpec(Spec):
    """Earliest deadline first, each group to the instance expected to finish it first."""

    name: Literal["edf"] = "edf"


class SjfSpec(Spec):
    """Shortest job first by expected tokens, each group to the instance expected to finish it first."""

    name: Literal["sjf"] = "sjf"


class RoundRobinSpec(Spec):
    """First come first served, groups dealt to instances in turn."""

    name: Literal["round_robin"] = "round_robin"


class LeastLoadedSpec(Spec):
    """First come first served, each group to the instance with the fewest requests."""

    name: Literal["least_loaded"] = "least_loaded"


class RandomSpec(Spec):
    """Groups to random instances and places; random swaps, evictions and warm starts."""

    name: Literal["random"] = "random"
    operation_probability: Share = 0.01
    """Chance per instance and epoch of each kind of operation that nothing asks for."""


class QlmSpec(Spec):
    """QLM: groups placed and ordered by estimated waiting time, plans combined on SCIP."""

    name: Literal["qlm"] = "qlm"
    time_limit_s: PositiveFloat = 0.5
    """Wall-clock guard of one SCIP solve; reproducible limits are ``node_limit`` and ``trial_plans``."""
    node_limit: PositiveInt = 200
    trial_plans: PositiveInt = 16
    """Plans drawn by randomised insertion for SCIP to recombine."""
    window_groups: PositiveInt = 48
    """Most urgent groups that are planned; the rest is appended in order of deadline."""
    replan_interval_s: NonNegativeFloat = 5.0
    """Least emulated time between two solves; between them new groups are inserted greedily."""
    evict: bool = True
    keep_kv: bool = True
    warm_start: bool = True
    hold_s: NonNegativeFloat = 10.0
    """A group may be left in no queue when running it now would make others miss; it is reconsidered after so long."""
    swap_weight: NonNegativeFloat = 0.1
    """Cost of a swap: this many times the requests the instance could have served meanwhile."""


PlannerSpec: TypeAlias = FcfsSpec | EdfSpec | SjfSpec | RoundRobinSpec | LeastLoadedSpec | RandomSpec | QlmSpec

_SPECS: dict[str, type[Spec]] = {
    "fcfs": FcfsSpec,
    "edf": EdfSpec,
    "sjf": SjfSpec,
    "round_robin": RoundRobinSpec,
    "least_loaded": LeastLoadedSpec,
    "random": RandomSpec,
    "qlm": QlmSpec,
}

PLANNER_NAMES = tuple(_SPECS)


def parse_planner(name: str, options: Mapping[str, Any]) -> PlannerSpec:
    """The validated settings of a planner.

    Raises:
        ConfigError: there is no such planner or option; one line naming what is allowed.
    """
    if name not in _SPECS:
        close = difflib.get_close_matches(name, PLANNER_NAMES, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ConfigError(f"no planner named '{name}'; allowed: {', '.join(PLANNER_NAMES)}{hint}")
    spec = parse(_SPECS[name], {"name": name, **options}, prefix=f"planner.{name}")
    return spec  # type: ignore[return-value]
