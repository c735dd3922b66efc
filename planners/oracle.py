"""The oracle: the QLM planner with the true output lengths in place of expected ones.

This is the only policy that reads what is hidden from all others: the output lengths in the request table, through
the view's world. It tells what better length prediction could gain for the same planner; it is no upper bound on
what any policy can reach (:mod:`planners.attainable` is).
"""

from __future__ import annotations

from planners.qlm.planner import QlmPlanner
from planners.spec import OracleSpec
from qlm_env.requests import WAITING
from qlm_env.view import ClusterView, GroupView, OutputStatistics, plain


def true_outputs(view: ClusterView, group: GroupView) -> OutputStatistics:
    """Mean and variance of the output lengths of the group's waiting requests, as they will turn out."""
    requests = plain(view._world.requests)
    waiting = (requests["group"] == group.id) & (requests["state"] == WAITING)
    tokens = requests["output_tokens"][waiting]
    return OutputStatistics(int(waiting.sum()), float(tokens.mean()), float(tokens.var()))


class OraclePlanner(QlmPlanner):
    """QLM that knows how long each answer will be."""

    def __init__(self, spec: OracleSpec) -> None:
        super().__init__(spec.qlm, outputs=true_outputs)
