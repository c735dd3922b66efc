"""A copy of the cluster on which operations can be tried before they are given.

A policy that chooses one operation at a time needs to see what the earlier ones have done to the queues. Operations
take no time and engines act on them only when time passes, so a copy shows it exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.dynamics import World
from qlm_env.epoch import decide
from qlm_env.lso import ActionCodec, Advance, Lso
from qlm_env.observation import Float32, Panel, make_panel, observation_space
from qlm_env.view import ClusterView


class Choice(NamedTuple):
    """What a policy sees, and what it may do."""

    observation: dict[str, Float32]
    """As of the environment; overwritten by the next one."""
    action_mask: NDArray[np.int8]
    """(n,) likewise"""


class Preview:
    """Sees the cluster of a view as the environment shows it, and tries operations on a copy."""

    def __init__(self, view: ClusterView) -> None:
        environment = view.scenario.environment
        num_models, num_classes = len(view.scenario.workload.models), len(view.scenario.slo.classes)
        self.codec = ActionCodec(environment.max_groups, len(view.instances), num_models)
        space = observation_space(environment.max_groups, len(view.instances), num_models, num_classes)
        self._view = view
        self._limit = environment.max_actions_per_epoch
        self._panel: Panel = make_panel(space, view.num_requests, self.codec.num_actions)
        self._names = tuple(space)

    def begin(self) -> Choice:
        """Copy the cluster as it is now."""
        self._world: World = self._view.copy_world()
        self._actions = 0
        return self._decide(Advance())

    def take(self, action: int) -> tuple[Lso, Choice]:
        """Try an action, which is legal and not ``advance``; returns its operation, and what there is to do next."""
        lso = self.codec.decode(action, self._panel.row_groups)
        self._actions += 1
        return lso, self._decide(lso)

    def _decide(self, lso: Lso) -> Choice:
        """``advance`` up to this very moment changes nothing: it only shows the copy."""
        now_s = self._view.now_s
        only_advance = self._actions >= self._limit
        decide(self._world, self._panel, *lso.code(), now_s, False, np.inf, only_advance)
        panel: Any = self._panel
        return Choice({name: getattr(panel, name) for name in self._names}, self._panel.action_mask)
