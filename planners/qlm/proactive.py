"""Placement at work: which model each instance should come to hold, before the requests are there.

Every few seconds the placement program (:mod:`planners.qlm.placement`) is solved for the backlog and for arrivals drawn
around those of the last minutes. Its answer is advice: what is staged ahead, and what an instance without work loads.
Queues stay the search's business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from planners.qlm.placement import NO_MODEL, Int, PlacementLimits, assign_instances, solve_placement
from planners.qlm.placement_demand import RecentArrivals, backlog_requests, draw_demand
from planners.qlm.placement_view import cluster_placement
from planners.qlm.report import PlannerCounters
from planners.spec import QlmSpec
from qlm_env.lso import Lso, SwapModel, WarmStart
from qlm_env.view import ClusterView

ARRIVALS_WINDOW_S = 120.0
NUM_SCENARIOS = 16
NODE_LIMIT = 100
RELATIVE_GAP = 0.01
SWAP_PENALTY_PER_S = 1e-2
"""In missed requests; a swap that would save less is not worth asking for."""
LEAST_SOLVE_S = 0.01
"""With less time left in a decision, the program is not solved."""

_log = logging.getLogger(__name__)


class Proactive:
    """Keeps a wanted model for every instance; to be shown the cluster at every decision.

    Args:
        counters: solves and failures are counted there.
        rng: draws the scenarios.
    """

    def __init__(self, view: ClusterView, spec: QlmSpec, counters: PlannerCounters, rng: np.random.Generator) -> None:
        self._spec = spec
        self._rng = rng
        self._counters = counters
        self._arrivals = RecentArrivals(ARRIVALS_WINDOW_S)
        self._solved_at_s = -np.inf
        self._wanted: Int = np.full(len(view.instances), NO_MODEL, np.int64)

    @property
    def wanted(self) -> Int:
        """(I,) the model each instance should hold; NO_MODEL for one that nothing is asked of."""
        return self._wanted

    def update(self, view: ClusterView, time_limit_s: float) -> None:
        """Note what has arrived, and solve again when it is time to; what fails is counted, and advises nothing."""
        self._arrivals.observe(view)
        due = view.now_s - self._solved_at_s >= self._spec.placement_interval_s
        if not due or time_limit_s < LEAST_SOLVE_S or not any(instance.up for instance in view.instances):
            return
        self._solved_at_s = view.now_s
        horizon_s = self._spec.placement_horizon_s
        self._counters.placements += 1
        try:
            demand = draw_demand(
                self._rng,
                backlog_requests(view),
                self._arrivals.counts,
                self._arrivals.span_s,
                horizon_s,
                NUM_SCENARIOS,
            )
            cluster = cluster_placement(view, demand, horizon_s, SWAP_PENALTY_PER_S)
            limits = PlacementLimits(time_limit_s, NODE_LIMIT, RELATIVE_GAP)
            holding = solve_placement(cluster.problem, limits).holding(cluster.problem)
            self._wanted = assign_instances(holding, cluster.class_of, cluster.swap_s)
        # Whatever a solver raises, the episode goes on without advice.
        except Exception as error:
            self._counters.placement_failures += 1
            self._wanted = np.full(len(view.instances), NO_MODEL, np.int64)
            _log.warning("placement failed (%s: %s); nothing is loaded ahead", type(error).__name__, error)

    def operations(self, view: ClusterView, queues: dict[int, list[int]], decided: Sequence[Lso]) -> list[Lso]:
        """Swaps of instances that have nothing to do, and staging of the models that others will swap to.

        Args:
            queues: the groups wanted on each instance.
            decided: operations that come first; an instance they swap is left alone.
        """
        swapping = {lso.instance for lso in decided if isinstance(lso, SwapModel)}
        lsos: list[Lso] = []
        for instance in view.instances:
            model = int(self._wanted[instance.index])
            if model in (NO_MODEL, instance.serving_model) or not instance.up or instance.index in swapping:
                continue
            idle = not instance.num_running and not instance.engine_queue_length and not queues[instance.index]
            swap, stage = SwapModel(instance.index, model), WarmStart(instance.index, model)
            if idle and self._spec.swap and view.is_legal(swap):
                lsos.append(swap)
            elif (
                self._spec.warm_start
                and not instance.staging
                and instance.cold(model)
                and instance.has_host_memory_for(model)
                and view.is_legal(stage)
            ):
                lsos.append(stage)
        return lsos
