"""The placement problem of a cluster as it is: classes of instances, what they can do, and how fast they serve."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planners.qlm.placement import NO_MODEL, PlacementProblem
from planners.rwt import full_batch, remaining_s, service_of_batch
from qlm_env.view import ClusterView, InstanceView

Float = NDArray[np.float64]
Int = NDArray[np.int64]

DRAIN_LOSS = 0.5
"""Share of the time a batch takes to drain that is lost for serving: it empties about evenly."""


class ClusterPlacement(NamedTuple):
    """A placement problem and the instances behind its classes."""

    problem: PlacementProblem
    class_of: Int
    """(I,) class of each instance, -1 for one that is down"""
    swap_s: Float
    """(I, M) seconds an instance needs until it serves a model, infinite where that cannot be; 0 for the one it has"""


def cluster_placement(
    view: ClusterView, demand: Float, horizon_s: float, swap_penalty_per_s: float
) -> ClusterPlacement:
    """The placement problem for given demand scenarios.

    A missed request of a class counts its weight, times the share of the horizon in its target if that is longer:
    what is due much later can still be served after the horizon.

    Args:
        demand: (S, M, K) requests, as :func:`planners.qlm.placement_demand.draw_demand` gives.
        swap_penalty_per_s: cost of a second spent on a swap, beside the service it displaces, so that swaps which save
            nothing are not made.
    """
    devices = _devices(view)
    num_models = len(view.models)
    swap_s = np.full((len(view.instances), num_models), np.inf)
    class_of = np.full(len(view.instances), -1, np.int64)
    members: dict[tuple[int, int, bool], list[InstanceView]] = {}
    for instance in view.instances:
        if instance.up:
            loaded = instance.serving_model
            key = (devices[instance.index], NO_MODEL if loaded is None else loaded, instance.coming_model is not None)
            members.setdefault(key, []).append(instance)
            swap_s[instance.index] = _swap_times(view, instance)
    options: list[tuple[int, int, int, float, bool]] = []
    keep = np.full(len(members), NO_MODEL, np.int64)
    for c, ((_, loaded, loading), of_class) in enumerate(members.items()):
        class_of[[instance.index for instance in of_class]] = c
        if loaded != NO_MODEL:
            keep[c] = len(options)
            wait_s = float(np.mean([instance.loading_left_s for instance in of_class]))
            options.append((c, loaded, len(of_class), wait_s, True))
        if not loading:
            options += _swap_options(c, loaded, of_class, swap_s)
    option_lost_s = np.array([lost_s for *_, lost_s, _ in options])
    keeps = np.array([keeping for *_, keeping in options], bool)
    classes = view.scenario.slo.classes
    speed, work = _speed_and_work(view, devices)
    problem = PlacementProblem(
        instances=np.array([len(of_class) for of_class in members.values()], np.int64),
        device=np.array([device for device, _, _ in members], np.int64),
        keep=keep,
        option_class=np.array([c for c, *_ in options], np.int64),
        option_model=np.array([model for _, model, *_ in options], np.int64),
        option_limit=np.array([limit for _, _, limit, *_ in options], np.int64),
        option_lost_s=option_lost_s,
        option_cost=np.where(keeps, 0.0, swap_penalty_per_s * option_lost_s),
        speed=speed,
        work=work,
        demand=demand,
        penalty=np.array([c.weight * min(1.0, horizon_s / c.target_s) for c in classes]),
        horizon_s=horizon_s,
    )
    return ClusterPlacement(problem, class_of, swap_s)


def _devices(view: ClusterView) -> list[int]:
    """Index of each instance's (device, tp), in order of first appearance."""
    kinds = [(name.device, name.tp) for name in view.instance_names]
    known = list(dict.fromkeys(kinds))
    return [known.index(kind) for kind in kinds]


def _swap_times(view: ClusterView, instance: InstanceView) -> Float:
    """(M,) as in :class:`ClusterPlacement`: half the drain, unloading, loading."""
    drain_s = DRAIN_LOSS * remaining_s(view, instance)
    return np.array(
        [
            np.inf
            if not instance.fits(model)
            else 0.0
            if model == instance.serving_model
            else drain_s + instance.swap_s(model)
            for model in view.models
        ]
    )


def _swap_options(
    c: int, loaded: int, of_class: list[InstanceView], swap_s: Float
) -> list[tuple[int, int, int, float, bool]]:
    """The swaps of a class: from host memory for those that are warm, from storage for the others."""
    options = []
    for model in range(swap_s.shape[1]):
        if model == loaded or not of_class[0].fits(model):
            continue
        warm = [instance.index for instance in of_class if instance.warm(model)]
        cold = [instance.index for instance in of_class if not instance.warm(model)]
        for instances in (warm, cold):
            if instances:
                options.append((c, model, len(instances), float(swap_s[instances, model].mean()), False))
    return options


def _speed_and_work(view: ClusterView, devices: list[int]) -> tuple[Float, Float]:
    """(D, M) work a second, and (M, K) work of a request, such that their ratio comes closest to the full batch's rate.

    The time between admissions is taken as a product of one number per (device, model) and one per (model, class): the
    geometric means. It is exact where classes differ in length by a factor that is the same on every device.
    """
    num_models, num_classes = len(view.models), len(view.scenario.slo.classes)
    prompt_tokens = _prompt_tokens(view)
    outputs = [[view.output_statistics(m, k) for k in range(num_classes)] for m in range(num_models)]
    mean = np.array([[o.mean_tokens for o in of_model] for of_model in outputs])
    variance = np.array([[o.variance_tokens2 for o in of_model] for of_model in outputs])
    engine = view.scenario.cluster.engine
    # One instance of each device stands for all; its records are a column beside the K classes.
    placement = view.placements[[devices.index(d) for d in range(max(devices) + 1)]][:, :, None]
    fits = placement["num_blocks"] > 0
    batch = full_batch(engine, placement, prompt_tokens, mean, variance)
    interval_s = np.where(fits, service_of_batch(placement, batch, prompt_tokens, mean).interval_s, 1.0)
    log_s = np.log(interval_s)
    of_device = log_s.mean(axis=2)
    fitting = fits[:, :, 0]
    work = (fits * (log_s - of_device[:, :, None])).sum(axis=0) / np.maximum(1, fitting.sum(axis=0))[:, None]
    return np.where(fitting, np.exp(-of_device), 0.0), np.exp(work)


def _prompt_tokens(view: ClusterView) -> Float:
    """(M, K) mean prompt of what waits, of its model where a class has nothing waiting, or of everything."""
    shape = (len(view.models), len(view.scenario.slo.classes))
    total, count = np.zeros(shape), np.zeros(shape)
    for group in view.groups:
        total[group.model, group.slo_class] += group.mean_prompt_tokens * group.waiting
        count[group.model, group.slo_class] += group.waiting
    grouping = view.scenario.environment.grouping
    anything = total.sum() / count.sum() if count.any() else grouping.typical_request_tokens / 2.0
    of_model = np.where(count.sum(axis=1) > 0, total.sum(axis=1) / np.maximum(1.0, count.sum(axis=1)), anything)
    mean: Float = np.where(count > 0, total / np.maximum(1.0, count), of_model[:, None])
    return mean
