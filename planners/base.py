"""What a policy is: something that, at a decision epoch, says what the cluster should do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from qlm_env.lso import Lso
from qlm_env.view import ClusterView


class Planner(ABC):
    """Decides LSOs from the observable state."""

    @abstractmethod
    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        """An episode begins.

        Args:
            view: the cluster; stays valid, and current, throughout the episode.
            rng: the only source of randomness a planner may use.
        """

    def statistics(self) -> Mapping[str, int]:
        """What the planner counted since the start of the episode, by name, such as solvers that failed."""
        return {}

    @abstractmethod
    def act(self, view: ClusterView) -> Sequence[Lso]:
        """The operations to carry out now, in order; time then passes to the next decision epoch."""
