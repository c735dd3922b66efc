"""Scenarios around a given one: other rates, mixes and cluster sizes, for a policy that should stand them all."""

from __future__ import annotations

import numpy as np

from planners.learned.train_spec import VariantsSpec
from qlm_env.spec import BatchArrivals, ClusterSpec, ScenarioSpec, SyntheticWorkload, TraceWorkload


def draw_variants(scenario: ScenarioSpec, spec: VariantsSpec, rng: np.random.Generator) -> list[ScenarioSpec]:
    """The scenario itself and ``spec.count - 1`` others, drawn around it."""
    others = [_draw(scenario, spec, rng) for _ in range(spec.count - 1)]
    return [scenario, *others]


def _draw(scenario: ScenarioSpec, spec: VariantsSpec, rng: np.random.Generator) -> ScenarioSpec:
    workload = _at_rate(scenario.workload, float(rng.uniform(*spec.loads)))
    if spec.mix_concentration is not None:
        weights = np.array([entry.weight for entry in workload.mix])
        drawn = rng.dirichlet(spec.mix_concentration * len(weights) * weights / weights.sum())
        # A population that is all but absent must stay a positive weight.
        mix = [
            entry.model_copy(update={"weight": max(1e-3, float(weight))})
            for entry, weight in zip(workload.mix, drawn, strict=True)
        ]
        workload = workload.model_copy(update={"mix": tuple(mix)})
    size = float(rng.choice(spec.cluster_sizes))
    return scenario.model_copy(update={"workload": workload, "cluster": _of_size(scenario.cluster, size)})


def _at_rate(workload: SyntheticWorkload | TraceWorkload, factor: float) -> SyntheticWorkload | TraceWorkload:
    """The workload with its arrivals ``factor`` times as fast."""
    if isinstance(workload, TraceWorkload):
        return workload.model_copy(update={"time_scale": workload.time_scale / factor})
    arrivals = workload.arrivals
    if isinstance(arrivals, BatchArrivals):
        return workload
    faster = {name: factor * value for name in ("rate_per_s", "load") if (value := getattr(arrivals, name)) is not None}
    return workload.model_copy(update={"arrivals": arrivals.model_copy(update=faster)})


def _of_size(cluster: ClusterSpec, factor: float) -> ClusterSpec:
    """The cluster with ``factor`` times as many instances of each device, at least one."""
    instances = tuple(
        group.model_copy(update={"count": max(1, round(factor * group.count))}) for group in cluster.instances
    )
    total = sum(group.count for group in instances)
    failures = tuple(failure for failure in cluster.failures if failure.instance < total)
    return cluster.model_copy(update={"instances": instances, "failures": failures})
