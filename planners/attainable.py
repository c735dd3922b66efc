"""An upper bound on the SLO attainment that any policy can reach on a workload.

Take any episode, by whatever policy, and the requests that met their SLO in it. Each had its work, at least
:func:`planners.least_work.least_work`, done between its arrival and its deadline, and no instance worked for longer
than it was up. So the episode gives a feasible point of this linear program, whose optimum is therefore a bound.
Time is cut into cells ``k``; ``z_r`` in [0, 1] says how much of request ``r`` is met, ``y_{r,i,k}`` which share of
it instances of kind ``i`` do in cell ``k``:

``max  sum_r w_r z_r``
``s.t. sum_{i,k in window(r)} y_{r,i,k} = z_r``  for every request,
``     sum_r W_{r,i} y_{r,i,k} <= seconds for which instances of kind i are up in cell k``.

Two further steps keep it small, each a relaxation:

- Cells are coarse. A request's window is every cell that its time from arrival to deadline touches.
- Requests alike in model and class, that arrive together and use kinds of instances in like proportion, are
  *bundled*: their window is the union of theirs, and their work is counted in seconds ``V_r`` on one kind of
  instance. On kind ``i`` each takes at least ``ratio_i = min_r W_{r,i}/V_r`` times that. With the flow ``f_{i,k} =
  sum_r V_r y_{r,i,k}`` of a bundle, ``sum f >= sum_r V_r z_r`` and ``ratio_i * f_{i,k} <= sum_r W_{r,i} y_{r,i,k}``
  hold for every feasible point above.

Beyond that, a request that cannot be in time even if all its steps are its own counts as missed, and no kind of
instance serves a model before the model can be there: at the beginning where an instance has it on its GPU, else
the shortest loading time after the first arrival, when decisions begin.

Later swaps, the order of service, blocked batches and what policies cannot know are ignored. So the bound is near
what is possible where the cluster is short of time, and says little where many models share few instances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from planners.least_work import least_work
from qlm_env.backends.emulator.state import GPU, HOST
from qlm_env.cluster import make_cluster, make_failures
from qlm_env.requests import RequestTable
from qlm_env.spec import ScenarioSpec

Float = NDArray[np.float64]
Index = NDArray[np.int64]

CELLS = 160
"""Cells of time up to the last arrival, at most."""
CELLS_PER_TARGET = 6
"""Cells within the shortest latency target, where their number allows."""
CELL_GROWTH = 1.15
"""After the last arrival each cell is this much longer than the one before."""
BUCKETS_PER_TARGET = 8
"""Requests of a class that arrive within so much of their target are bundled."""
RATIO_CLASSES = 3
"""Bundles by how requests use the kinds of instances, where there are several."""
SOLVER_TOLERANCE = 1e-6
"""Added to the optimum, which HiGHS finds to about 1e-7."""


@dataclass(frozen=True)
class AttainableBound:
    """No policy attains more."""

    slo_attainment: float
    """Share of the requests that meet their target."""
    slo_attainment_weighted: float
    """The same, each request counted by the weight of its class."""


@dataclass(frozen=True)
class _Bundles:
    """B bundles of the requests that can be met at all."""

    of_request: Index
    """(n,) bundle of each"""
    unit_s: Float
    """(n,) its work on the reference kind of instance"""
    ratio: Float
    """(T, B) least work on a kind per second on the reference one; inf where the model does not fit"""
    first_cell: Index
    """(T, B)"""
    end_cell: Index
    """(B,) one after the last"""


def attainable(scenario: ScenarioSpec, requests: RequestTable) -> AttainableBound:
    """The bound for one workload.

    Args:
        scenario: with its arrival rate resolved or not; only cluster, models and SLOs count.
        requests: the whole workload, output lengths included.

    Raises:
        ConfigError: a profile is malformed.
        RuntimeError: the linear program was not solved.
    """
    work = least_work(scenario, requests)
    targets_s = np.array([c.target_s for c in scenario.slo.classes])[requests["slo_class"]]
    weights = np.array([c.weight for c in scenario.slo.classes])[requests["slo_class"]]
    ready_s = _model_ready_s(scenario, float(requests["arrival_s"][0]))
    start_s = np.maximum(requests["arrival_s"], ready_s.min(axis=0)[requests["model"]])
    possible = np.flatnonzero(start_s + work.latency_s <= requests["arrival_s"] + targets_s)
    if not len(possible):
        return AttainableBound(0.0, 0.0)
    arrival_s = requests["arrival_s"][possible]
    deadline_s = arrival_s + targets_s[possible]
    edges_s = _cells(arrival_s, deadline_s, targets_s[possible])
    bundles = _bundle(requests[possible], work.work_s[:, possible], arrival_s, deadline_s, edges_s, ready_s)
    up_s = _up_s(scenario, edges_s)

    def share(value: Float) -> float:
        best = _most_served(bundles, value[possible], up_s) / value.sum()
        return float(min(1.0, best + SOLVER_TOLERANCE))

    weighted = share(weights)
    alike = bool((weights == weights[0]).all())
    return AttainableBound(weighted if alike else share(np.ones(len(requests))), weighted)


def _cells(arrival_s: Float, deadline_s: Float, targets_s: Float) -> Float:
    """(K + 1,) edges from the first arrival to the last deadline, finest where requests arrive."""
    start_s, last_s, end_s = float(arrival_s[0]), float(arrival_s[-1]), float(deadline_s.max())
    width_s = max(float(targets_s.min()) / CELLS_PER_TARGET, (last_s - start_s) / CELLS)
    edges = list(np.arange(start_s, last_s, width_s))
    # No deadline of the last requests should be rounded up.
    edges += [last_s, end_s, *(last_s + np.unique(targets_s))]
    growing_s = last_s
    while growing_s < end_s:
        edges.append(growing_s)
        growing_s += width_s
        width_s *= CELL_GROWTH
    return np.unique(np.array(edges, np.float64))


def _model_ready_s(scenario: ScenarioSpec, first_arrival_s: float) -> Float:
    """(T, M) time before which no instance of a kind has a model on its GPU."""
    fleet = make_cluster(scenario.cluster, scenario.workload.models)
    placement = fleet.placement.view(np.ndarray)
    load_s = np.where(
        placement["residency"] == HOST,
        placement["wake_s"],
        np.minimum(placement["cold_start_s"], placement["stage_s"] + placement["wake_s"]),
    )
    ready_s = np.where(placement["residency"] == GPU, 0.0, first_arrival_s + load_s)
    kinds = np.cumsum([0, *(group.count for group in scenario.cluster.instances)])[:-1]
    return np.minimum.reduceat(ready_s, kinds, axis=0)


def _bundle(
    requests: NDArray[np.void], work_s: Float, arrival_s: Float, deadline_s: Float, edges_s: Float, ready_s: Float
) -> _Bundles:
    """Put requests together; arguments are those of the requests that can be met, and ``ready_s`` (T, M)."""
    target_s = deadline_s - arrival_s
    cell = np.diff(edges_s).min()
    bucket = np.floor((arrival_s - edges_s[0]) / np.maximum(cell, target_s / BUCKETS_PER_TARGET))
    reference = np.argmax(np.isfinite(work_s), axis=0)
    unit_s = work_s[reference, np.arange(len(requests))]
    relative = work_s / unit_s
    ratio_class = np.zeros(len(requests))
    for model in np.unique(requests["model"]):
        of_model = requests["model"] == model
        finite = relative[np.isfinite(relative[:, of_model]).all(axis=1)][:, of_model]
        if len(finite) > 1:
            # The kind that differs most from the reference separates requests best.
            widest = finite[np.argmax(np.ptp(np.log(finite), axis=1))]
            bounds = np.quantile(widest, np.arange(1, RATIO_CLASSES) / RATIO_CLASSES)
            ratio_class[of_model] = np.searchsorted(bounds, widest)
    keys = np.column_stack([requests["model"], requests["slo_class"], bucket, ratio_class])
    _, of_request = np.unique(keys, axis=0, return_inverse=True)
    of_request = of_request.ravel().astype(np.int64)
    num_bundles = int(of_request.max()) + 1
    ratio = np.full((len(work_s), num_bundles), np.inf)
    for kind in range(len(work_s)):
        np.minimum.at(ratio[kind], of_request, relative[kind])
    model = np.zeros(num_bundles, np.int64)
    model[of_request] = requests["model"]
    first_s = np.full(num_bundles, np.inf)
    end_s = np.full(num_bundles, -np.inf)
    np.minimum.at(first_s, of_request, arrival_s)
    np.maximum.at(end_s, of_request, deadline_s)
    start_s = np.maximum(first_s, ready_s[:, model])
    return _Bundles(
        of_request=of_request,
        unit_s=unit_s,
        ratio=ratio,
        first_cell=np.maximum(0, np.searchsorted(edges_s, start_s, side="right") - 1),
        end_cell=np.minimum(len(edges_s) - 1, np.searchsorted(edges_s, end_s, side="left")),
    )


def _up_s(scenario: ScenarioSpec, edges_s: Float) -> Float:
    """(T, K) seconds for which instances of each kind are up in each cell, summed over them."""
    counts = [group.count for group in scenario.cluster.instances]
    kind_of = np.repeat(np.arange(len(counts)), counts)
    up_s = np.array(counts, np.float64)[:, None] * np.diff(edges_s)
    down_since_s: dict[int, float] = {}
    for event in make_failures(scenario.cluster.failures):
        instance = int(event.instance)
        if not event.up:
            down_since_s[instance] = float(event.time_s)
            continue
        start = np.clip(edges_s, down_since_s.pop(instance), event.time_s)
        up_s[kind_of[instance]] -= np.diff(start)
    return up_s


def _most_served(bundles: _Bundles, value: Float, up_s: Float) -> float:
    """The optimum of the linear program: the largest total ``value`` of requests served."""
    num_kinds, num_cells = up_s.shape
    num_requests, num_bundles = len(value), len(bundles.end_cell)
    cells = bundles.end_cell - bundles.first_cell
    kind, bundle = np.nonzero(np.isfinite(bundles.ratio) & (cells > 0))
    repeats = cells[kind, bundle]
    flow_kind, flow_bundle = np.repeat(kind, repeats), np.repeat(bundle, repeats)
    starts = np.repeat(np.cumsum(repeats) - repeats, repeats)
    flow_cell = bundles.first_cell[flow_kind, flow_bundle] + np.arange(len(flow_kind)) - starts
    num_flows = len(flow_kind)
    flow_column = num_requests + np.arange(num_flows)
    capacity_row = num_bundles + flow_kind * num_cells + flow_cell
    rows = np.concatenate([bundles.of_request, flow_bundle, capacity_row])
    columns = np.concatenate([np.arange(num_requests), flow_column, flow_column])
    entries = np.concatenate([bundles.unit_s, -np.ones(num_flows), bundles.ratio[flow_kind, flow_bundle]])
    num_rows = num_bundles + num_kinds * num_cells
    bounds = np.zeros((num_requests + num_flows, 2))
    bounds[:num_requests, 1] = 1.0
    bounds[num_requests:, 1] = np.inf
    solution = linprog(
        np.concatenate([-value, np.zeros(num_flows)]),
        A_ub=coo_array((entries, (rows, columns)), shape=(num_rows, num_requests + num_flows)).tocsr(),
        b_ub=np.concatenate([np.zeros(num_bundles), up_s.ravel()]),
        bounds=bounds,
        method="highs",
    )
    if not solution.success:
        raise RuntimeError(f"the attainment program was not solved: {solution.message}")
    return float(-solution.fun)
