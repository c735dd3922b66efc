"""Random decisions: the floor of every comparison, and a stress test of the environment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planners.base import Planner
from planners.dispatch import candidates, swap_to_head
from planners.spec import RandomSpec
from qlm_env.lso import Balance, Evict, Lso, SwapModel, WarmStart
from qlm_env.view import ClusterView


class RandomPlanner(Planner):
    """New groups anywhere; now and then an operation that nothing asks for."""

    def __init__(self, spec: RandomSpec) -> None:
        self._spec = spec

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        self._rng = rng

    def act(self, view: ClusterView) -> Sequence[Lso]:
        lsos: list[Lso] = []
        queued: set[int] = set()
        for group in view.groups:
            options = candidates(view, group)
            if not group.queued and options:
                choice = int(self._rng.integers(len(options)))
                lsos.append(Balance(group.id, options[choice].index, bool(self._rng.random() < 0.5)))
                queued.add(options[choice].index)
        for instance in view.instances:
            model = int(self._rng.integers(len(view.models)))
            for lso in (
                Evict(instance.index, bool(self._rng.random() < 0.5)),
                SwapModel(instance.index, model),
                WarmStart(instance.index, model),
            ):
                if self._rng.random() < self._spec.operation_probability and view.is_legal(lso):
                    lsos.append(lso)
            queue = instance.queue
            if queue and not any(isinstance(lso, SwapModel) and lso.instance == instance.index for lso in lsos):
                lsos += swap_to_head(view, instance, queue[0])
        return lsos
