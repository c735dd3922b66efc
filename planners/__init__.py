"""Policies: whatever decides LSOs from the observable state.

To add a planner: a :class:`~planners.base.Planner` in a module of its own, its settings in
:mod:`planners.spec`, a line in :func:`make_planner`, and a file ``configs/planner/<name>.yaml``.
"""

from planners.base import Planner
from planners.dispatch import (
    EarliestCompletion,
    FewestRequests,
    InTurn,
    ListPlanner,
    by_arrival,
    by_deadline,
    by_expected_tokens,
)
from planners.random_planner import RandomPlanner
from planners.spec import (
    EdfSpec,
    FcfsSpec,
    LeastLoadedSpec,
    PlannerSpec,
    QlmSpec,
    RandomSpec,
    RoundRobinSpec,
    SjfSpec,
)


def make_planner(spec: PlannerSpec) -> Planner:
    """The planner of validated settings."""
    match spec:
        case FcfsSpec():
            return ListPlanner(by_arrival, EarliestCompletion(), steal=True)
        case EdfSpec():
            return ListPlanner(by_deadline, EarliestCompletion(), steal=True)
        case SjfSpec():
            return ListPlanner(by_expected_tokens, EarliestCompletion(), steal=True)
        case RoundRobinSpec():
            return ListPlanner(by_arrival, InTurn(), steal=False)
        case LeastLoadedSpec():
            return ListPlanner(by_arrival, FewestRequests(), steal=False)
        case RandomSpec():
            return RandomPlanner(spec)
        case QlmSpec():
            # SCIP is loaded only where it is used.
            from planners.qlm.planner import QlmPlanner

            return QlmPlanner(spec)
