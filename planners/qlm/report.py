"""What is known of a plan beside its queues, and what is counted over an episode."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class PlanReport:
    """How the plan of one solve came about."""

    cost: float
    """Of the plan adopted, in the planner's own objective."""
    layer: str
    """What produced it: ``present`` (the queues as they are, new groups inserted), ``edf``, ``batched_edf``,
    ``insertion``, ``sequencing`` or ``master``."""
    time_s: float
    """Wall-clock time of the solve."""
    iterations: int
    """Of the sequencing search."""
    bound: float | None = None
    """No plan costs less, if a layer has proven one."""
    failures: tuple[str, ...] = ()
    """What went wrong in solvers; the plan is then the best of the other layers."""

    @property
    def gap(self) -> float | None:
        """``(cost - bound) / cost``, at most what a better plan could save; None without a bound."""
        if self.bound is None:
            return None
        return max(0.0, self.cost - self.bound) / self.cost if self.cost > 0 else 0.0


@dataclass(slots=True)
class PlannerCounters:
    """Over an episode so far."""

    solves: int = 0
    adopted: int = 0
    """Solves whose plan replaced the present one."""
    failures: int = 0
    """Solver calls that raised an error or returned no plan."""
    timeouts: int = 0
    """Solver calls, or searches, that the clock stopped."""
    fallbacks: int = 0
    """Solves in which a solver failed or was late, so that the plan is the best of the other layers."""
    placements: int = 0
    """Solves of the placement program."""
    placement_failures: int = 0
    """Of these, those that raised an error."""

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)
