"""Plans of simple rules: what every plan is measured against, and where the search starts."""

from __future__ import annotations

import numpy as np

from planners.qlm.construct import insert_all, insert_batched
from planners.qlm.plan import Plan
from planners.qlm.problem import Int, Problem


def by_deadline(problem: Problem) -> Int:
    """(K,) groups in order of their first request's deadline."""
    return np.argsort(problem.first_slack_s, kind="stable").astype(np.int32)


def _empty(problem: Problem) -> Plan:
    num_groups, num_instances = problem.allowed.shape
    return Plan.empty(num_instances, num_groups)


def edf_plan(problem: Problem) -> Plan:
    """Earliest deadline first, each group at the end of the queue where it adds least."""
    plan = _empty(problem)
    plan.total = insert_all(problem, by_deadline(problem), True, plan.sequence, plan.length, plan.costs)
    return plan


def batched_edf_plan(problem: Problem) -> Plan:
    """Swap-aware EDF: as :func:`edf_plan`, but a group joins the last batch of its model in a queue."""
    plan = _empty(problem)
    plan.total = insert_batched(problem, by_deadline(problem), plan.sequence, plan.length, plan.costs)
    return plan


def inserted_plan(problem: Problem) -> Plan:
    """Greedy insertion in order of deadline: anywhere in any queue, or held back, whatever adds least."""
    plan = _empty(problem)
    plan.total = insert_all(problem, by_deadline(problem), False, plan.sequence, plan.length, plan.costs)
    return plan
