"""A plan: which groups each instance runs, in which order, and which are in no queue for now."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planners.qlm.problem import Float, Int


@dataclass
class Plan:
    """Groups (rows of the problem) of each instance in order; the last row is held back."""

    sequence: Int
    """(I + 1, K)"""
    length: Int
    """(I + 1,)"""
    costs: Float
    """(I + 1,)"""
    total: float

    @classmethod
    def empty(cls, num_instances: int, num_groups: int) -> Plan:
        return cls(
            np.zeros((num_instances + 1, num_groups), np.int32),
            np.zeros(num_instances + 1, np.int32),
            np.zeros(num_instances + 1),
            0.0,
        )

    def copy(self) -> Plan:
        return Plan(self.sequence.copy(), self.length.copy(), self.costs.copy(), self.total)

    def queue(self, i: int) -> list[int]:
        return [int(g) for g in self.sequence[i, : self.length[i]]]
