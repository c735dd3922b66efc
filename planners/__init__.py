"""Policies: whatever decides LSOs from the observable state.

To add a planner: a :class:`~planners.base.Planner` in a module of its own, its settings in
:mod:`planners.spec`, a line in :func:`make_planner`, and a file ``configs/planner/<name>.yaml``.
"""

from planners.as_released import ReleasedPlanner
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
from planners.edf_evict import EdfEvictPlanner
from planners.least_laxity import by_laxity
from planners.llumnix import LlumnixPlanner
from planners.random_planner import RandomPlanner
from planners.shepherd import ShepherdPlanner
from planners.spec import (
    EdfEvictSpec,
    EdfSpec,
    FcfsSpec,
    LearnedSpec,
    LeastLaxitySpec,
    LeastLoadedSpec,
    LlumnixSpec,
    OracleSpec,
    PlannerSpec,
    QlmReleasedSpec,
    QlmSpec,
    QlmV1Spec,
    QlmV2Spec,
    RandomSpec,
    RoundRobinSpec,
    ShepherdSpec,
    SjfSpec,
    SwapAwareEdfSpec,
    VtcSpec,
)
from planners.swap_aware_edf import SwapAwareEdfPlanner
from planners.vtc import VtcPlanner


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
        case LeastLaxitySpec():
            return ListPlanner(by_laxity, EarliestCompletion(), steal=True)
        case EdfEvictSpec():
            return EdfEvictPlanner()
        case SwapAwareEdfSpec():
            return SwapAwareEdfPlanner()
        case ShepherdSpec():
            return ShepherdPlanner(spec)
        case LlumnixSpec():
            return LlumnixPlanner()
        case VtcSpec():
            return VtcPlanner(spec)
        case RandomSpec():
            return RandomPlanner(spec)
        case QlmSpec():
            # SCIP is loaded only where it is used.
            from planners.qlm.planner import QlmPlanner

            return QlmPlanner(spec)
        case OracleSpec():
            from planners.oracle import OraclePlanner

            return OraclePlanner(spec)
        case QlmReleasedSpec():
            return ReleasedPlanner()
        case QlmV1Spec() | QlmV2Spec():
            from planners.qlm.published.planner import PublishedPlanner

            return PublishedPlanner(spec)
        case LearnedSpec():
            # So is torch.
            from planners.learned.planner import LearnedPlanner

            return LearnedPlanner(spec)
