"""The planners there are and their settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from qlm_env.spec import ConfigError, NonNegativeFloat, PositiveFloat, PositiveInt, Spec, parse

Share = Annotated[float, Field(ge=0, le=1)]


class PlannerSettings(Spec):
    """What every planner has."""

    decision_s: NonNegativeFloat | None = None
    """Emulated time that each of its decisions takes where the environment charges a fixed time, such as its median
    measured on one machine; ``None`` takes the environment's own ``decision_time.fixed_s``."""


class FcfsSpec(PlannerSettings):
    """First come first served, each group to the instance expected to finish it first (vLLM behind a balancer)."""

    name: Literal["fcfs"] = "fcfs"


class EdfSpec(PlannerSettings):
    """Earliest deadline first, each group to the instance expected to finish it first."""

    name: Literal["edf"] = "edf"


class SjfSpec(PlannerSettings):
    """Shortest job first by expected tokens, each group to the instance expected to finish it first."""

    name: Literal["sjf"] = "sjf"


class RoundRobinSpec(PlannerSettings):
    """First come first served, groups dealt to instances in turn."""

    name: Literal["round_robin"] = "round_robin"


class LeastLoadedSpec(PlannerSettings):
    """First come first served, each group to the instance with the fewest requests."""

    name: Literal["least_loaded"] = "least_loaded"


class LeastLaxitySpec(PlannerSettings):
    """Least laxity first (deadline less expected service), each group to the instance expected to finish it first."""

    name: Literal["least_laxity"] = "least_laxity"


class EdfEvictSpec(PlannerSettings):
    """EDF that evicts less urgent running requests, KV kept, where that saves the next deadline."""

    name: Literal["edf_evict"] = "edf_evict"


class SwapAwareEdfSpec(PlannerSettings):
    """EDF within a model; another model's groups go first only where that gains more than the swap costs."""

    name: Literal["swap_aware_edf"] = "swap_aware_edf"


class ShepherdSpec(PlannerSettings):
    """SHEPHERD-style (NSDI 2023): the largest feasible batch of one model, preempting a much smaller one."""

    name: Literal["shepherd"] = "shepherd"
    preemption_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.03
    """A batch preempts the running one if it is worth more than this many times as much (lambda)."""


class LlumnixSpec(PlannerSettings):
    """Llumnix-style (OSDI 2024): dispatch and migration of waiting groups to where most KV memory is free."""

    name: Literal["llumnix"] = "llumnix"


class VtcSpec(PlannerSettings):
    """Virtual token counters (OSDI 2024): the (model, SLO class) that has been served least goes next."""

    name: Literal["vtc"] = "vtc"
    prompt_weight: PositiveFloat = 1.0
    """Service that one prompt token counts for."""
    output_weight: PositiveFloat = 2.0
    """Service that one output token counts for."""


class RandomSpec(PlannerSettings):
    """Groups to random instances and places; random swaps, evictions and warm starts."""

    name: Literal["random"] = "random"
    operation_probability: Share = 0.01
    """Chance per instance and epoch of each kind of operation that nothing asks for."""


class QlmSpec(PlannerSettings):
    """QLM: groups placed and ordered by estimated waiting time, by search over all virtual queues."""

    name: Literal["qlm"] = "qlm"
    time_limit_s: PositiveFloat = 0.5
    """Wall-clock guard of one decision; reproducible limits are ``iterations`` and ``node_limit``."""
    iterations: PositiveInt = 500
    """Of the search over all virtual queues."""
    polish: bool = False
    """Let SCIP combine the queues of all plans once more; of what is left of the time, the search then has 60 %."""
    node_limit: PositiveInt = 200
    """Of SCIP, with ``polish``."""
    bound_time_s: NonNegativeFloat = 0.0
    """Wall-clock seconds in which column generation may bound the cost of each solve's plan, in the background; 0 does
    not. Only the planner's report uses it."""
    window_groups: PositiveInt = 48
    """Most urgent groups that are planned; the rest is appended in order of deadline."""
    replan_interval_s: NonNegativeFloat = 1.0
    """Least emulated time between two solves; between them new groups are inserted greedily."""
    evict: bool = True
    keep_kv: bool = True
    warm_start: bool = True
    balance: bool = True
    """Without, a group stays in the virtual queue that it was first put in."""
    swap: bool = True
    """Without, instances are dedicated: each serves one model, chosen by the workload's mix, and never another."""
    cost: Literal["miss", "lateness", "chance", "point"] = "miss"
    """What a plan minimises: expected misses, expected lateness in SLO targets, requests that are not safe with
    ``confidence``, or misses of the expected completion without its distribution."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """With ``cost=chance``: the probability with which a request must meet its SLO."""
    hold_s: NonNegativeFloat = 10.0
    """A group may be left in no queue when running it now would make others miss; it is reconsidered after so long."""
    placement_interval_s: NonNegativeFloat = 0.0
    """Emulated time between two solves of the placement program, which loads and stages models ahead; 0 does not."""
    placement_horizon_s: PositiveFloat = 60.0
    """Arrivals within so much time are what it provides for."""
    swap_weight: NonNegativeFloat = 0.1
    """Cost of a swap: this many times the requests the instance could have served meanwhile."""


class QlmReleasedSpec(PlannerSettings):
    """QLM as its public code runs it: random queues, in order of deadline once something is predicted to be late."""

    name: Literal["qlm_released"] = "qlm_released"


class SlotProgramSpec(PlannerSettings):
    """What QLM's published programs have in common."""

    window_groups: PositiveInt = 6
    """Most urgent groups that a program takes; the rest follows in order of deadline."""
    node_limit: PositiveInt = 50
    """Reproducible limit of one SCIP solve."""
    time_limit_s: PositiveFloat = 5.0
    """Wall-clock guard of one decision, that of the relaxation included where the program has no solution."""
    replan_interval_s: NonNegativeFloat = 5.0
    """Least emulated time between two solves."""


class QlmV2Spec(SlotProgramSpec):
    """The slot program of QLM's paper (arXiv 2407.00047v2) on SCIP, for small clusters."""

    name: Literal["qlm_v2"] = "qlm_v2"


class QlmV1Spec(SlotProgramSpec):
    """The chance-constrained program of the paper's first version on SCIP, for small clusters."""

    name: Literal["qlm_v1"] = "qlm_v1"
    confidence: Annotated[float, Field(ge=0.5, le=0.9999)] = 0.9
    """Probability with which each group must meet its deadline."""


class OracleSpec(PlannerSettings):
    """QLM told the true output lengths of waiting requests, which no other planner can see."""

    name: Literal["oracle"] = "oracle"
    qlm: QlmSpec = QlmSpec()


class LearnedSpec(PlannerSettings):
    """A policy trained with `qlm train`."""

    name: Literal["learned"] = "learned"
    path: str
    """Folder of its checkpoint, or the name of one that comes with the package."""
    greedy: bool = True
    """Take the likeliest action; without, draw one."""
    sha256: str = ""
    """Hash of the weights, filled in: results of another training under the same path are not taken for these."""

    @model_validator(mode="after")
    def _name_the_weights(self) -> LearnedSpec:
        # safetensors and torch are loaded only where they are used.
        try:
            from planners.learned.checkpoint import checkpoint_hash
        except ImportError as error:
            raise ValueError(f"{error.name} is not installed; pip install 'qlm-env[train]'") from None
        found = checkpoint_hash(self.path)
        if self.sha256 not in ("", found):
            raise ValueError(f"sha256 is {self.sha256[:12]}, but the weights there have {found[:12]}")
        object.__setattr__(self, "sha256", found)
        return self


PlannerSpec: TypeAlias = (
    FcfsSpec
    | EdfSpec
    | SjfSpec
    | LeastLaxitySpec
    | EdfEvictSpec
    | SwapAwareEdfSpec
    | ShepherdSpec
    | LlumnixSpec
    | VtcSpec
    | OracleSpec
    | RoundRobinSpec
    | LeastLoadedSpec
    | RandomSpec
    | QlmSpec
    | QlmReleasedSpec
    | QlmV2Spec
    | QlmV1Spec
    | LearnedSpec
)

_SPECS: dict[str, type[Spec]] = {
    "fcfs": FcfsSpec,
    "edf": EdfSpec,
    "sjf": SjfSpec,
    "least_laxity": LeastLaxitySpec,
    "edf_evict": EdfEvictSpec,
    "swap_aware_edf": SwapAwareEdfSpec,
    "shepherd": ShepherdSpec,
    "llumnix": LlumnixSpec,
    "vtc": VtcSpec,
    "round_robin": RoundRobinSpec,
    "least_loaded": LeastLoadedSpec,
    "random": RandomSpec,
    "qlm": QlmSpec,
    "oracle": OracleSpec,
    "qlm_released": QlmReleasedSpec,
    "qlm_v2": QlmV2Spec,
    "qlm_v1": QlmV1Spec,
    "learned": LearnedSpec,
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
