"""From a validated scenario and a request table to the arrays an episode runs on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlm_env.backends.emulator.residency import fits, place_initially
from qlm_env.backends.emulator.state import (
    FCFS,
    GPU,
    HOST,
    PLACEMENT_DTYPE,
    PRIORITY,
    Fleet,
    make_fleet,
    size_prefix_cache,
)
from qlm_env.dynamics import (
    CLOCK_DTYPE,
    E2E,
    EVENT_DTYPE,
    FAILURE_DTYPE,
    SLO_DTYPE,
    TTFT,
    World,
    find_unservable,
)
from qlm_env.prefixes import NO_PREFIXES, PromptPrefixes
from qlm_env.profiles import Profile, fitting_profile, usable_kv_blocks
from qlm_env.queueing.groups import make_queues
from qlm_env.requests import Float, Int, Records, RequestTable, reset_state
from qlm_env.spec import ClusterSpec, EngineSpec, FailureSpec, GroupingSpec, ModelSpec, ScenarioSpec

COEFFICIENTS = ("c0", "c1", "n0", "c2", "c3", "c4", "c5", "c6")

LOG_ENTRIES = 1 << 14
"""Event log, at least; it always has room for several entries per batch slot, as one event may write."""


class InstanceName(NamedTuple):
    """What an instance is, for people."""

    name: str
    device: str
    tp: int


def instance_names(cluster: ClusterSpec) -> list[InstanceName]:
    """One entry per instance, in order of index."""
    names: list[InstanceName] = []
    for group in cluster.instances:
        for _ in range(group.count):
            suffix = f"x{group.tp}" if group.tp > 1 else ""
            names.append(InstanceName(f"{len(names)} {group.device}{suffix}", group.device, group.tp))
    return names


def fill_placement(row: np.void, profile: Profile, engine: EngineSpec) -> None:
    """Write what ``profile`` says into a PLACEMENT_DTYPE record."""
    values = profile.values()
    for coefficient, seconds in zip(COEFFICIENTS, profile.step_time, strict=True):
        row[coefficient] = seconds
    for name in PLACEMENT_DTYPE.names or ():
        if name in values:
            row[name] = values[name]
    row["num_blocks"] = usable_kv_blocks(profile, engine)
    row["num_knots"] = row["chunk_s"] = 0
    if profile.token_curve is not None:
        knots = profile.token_curve.knots
        row["num_knots"], row["chunk_s"] = len(knots.tokens), knots.chunk_s
        row["knot_tokens"][: len(knots.tokens)] = knots.tokens
        row["knot_s"][: len(knots.tokens)] = knots.seconds


def make_engines(placement: Records, engine: EngineSpec, host_memory_bytes: Float, host_kv_bytes: Float) -> Fleet:
    """Empty engines with these settings; the arrays are as :func:`make_fleet` takes them."""
    return make_fleet(
        placement,
        host_memory_bytes=host_memory_bytes,
        host_kv_bytes=host_kv_bytes,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
        chunked_prefill=engine.enable_chunked_prefill,
        scheduling_policy=PRIORITY if engine.scheduling_policy == "priority" else FCFS,
        async_scheduling=engine.async_scheduling,
        prefix_caching=engine.enable_prefix_caching,
    )


def make_placements(cluster: ClusterSpec, models: tuple[ModelSpec, ...], profile_folder: Path | None = None) -> Records:
    """The (instance, model) table, shape (I, M): latency, memory and loading costs from the profiles.

    Where a model does not fit (:func:`qlm_env.profiles.fitting_profile`) ``num_blocks`` is 0.

    Args:
        profile_folder: profiles that are looked up first; ``None`` takes the cluster's own folder.
    """
    profile_folder = profile_folder or cluster.profile_path
    rows = []
    for group in cluster.instances:
        row = np.zeros(len(models), PLACEMENT_DTYPE)
        for m, model in enumerate(models):
            profile = fitting_profile(group, cluster.engine, model, profile_folder)
            if profile is None:
                continue
            fill_placement(row[m], profile, cluster.engine)
            row[m]["context_tokens"] = model.context_tokens
        rows.extend([row] * group.count)
    return np.stack(rows).view(np.recarray)


def make_cluster(cluster: ClusterSpec, models: tuple[ModelSpec, ...], profile_folder: Path | None = None) -> Fleet:
    """The cluster's engines with their initial models loaded; every model must fit somewhere.

    An instance that no model fits starts, and stays, empty.
    """
    placement = make_placements(cluster, models, profile_folder)
    groups = [group for group in cluster.instances for _ in range(group.count)]
    fleet = make_engines(
        placement,
        cluster.engine,
        np.array([group.host_memory_gb * 1e9 for group in groups]),
        np.array([group.host_kv_gb * 1e9 for group in groups]),
    )
    names = [model.name for model in models]
    dealt = 0
    for i, group in enumerate(groups):
        if group.initial_model is not None:
            initial = names.index(group.initial_model)
        elif placement["num_blocks"][i].any():
            initial = dealt % len(models)
            while not fits(fleet, i, initial):
                initial = (initial + 1) % len(models)
            dealt = initial + 1
        else:
            continue
        place_initially(fleet, i, initial, GPU)
        for name in group.warm_models:
            if names.index(name) != initial:
                place_initially(fleet, i, names.index(name), HOST)
    return fleet


def max_group_members(fleet: Fleet, grouping: GroupingSpec) -> Int:
    """(M,) the size at which a model's group closes: ``delta`` times its average batch, at least 1."""
    blocks = fleet.placement["num_blocks"]
    batch = np.minimum(fleet.max_num_seqs, blocks * fleet.block_size / grouping.typical_request_tokens)
    average = batch.sum(axis=0) / np.maximum(1, (blocks > 0).sum(axis=0))
    members: Int = np.maximum(1, np.round(grouping.delta * average)).astype(np.int32)
    return members


def make_failures(failures: tuple[FailureSpec, ...]) -> Records:
    """Down and up events in order of time; failures of an instance that overlap or touch are one."""
    outages: dict[int, list[list[float]]] = {}
    for failure in sorted(failures, key=lambda failure: failure.at_s):
        of_instance = outages.setdefault(failure.instance, [])
        up_s = failure.at_s + failure.duration_s
        if of_instance and failure.at_s <= of_instance[-1][1]:
            of_instance[-1][1] = max(of_instance[-1][1], up_s)
        else:
            of_instance.append([failure.at_s, up_s])
    events = [
        event for i, times in outages.items() for down_s, up_s in times for event in ((down_s, i, 0), (up_s, i, 1))
    ]
    return np.array(sorted(events), FAILURE_DTYPE).view(np.recarray)


def make_world(
    scenario: ScenarioSpec,
    requests: RequestTable,
    *,
    logging: bool,
    prefixes: PromptPrefixes = NO_PREFIXES,
    profile_folder: Path | None = None,
    fleet: Fleet | None = None,
) -> World:
    """A fresh episode of ``scenario`` on ``requests``, whose state is reset.

    Args:
        logging: keep the event log that timelines are drawn from.
        prefixes: which prompts begin alike, for engines with prefix caching.
        fleet: what :func:`make_cluster` gives for the scenario, still untouched, to save making it.
    """
    reset_state(requests)
    if fleet is None:
        fleet = make_cluster(scenario.cluster, scenario.workload.models, profile_folder)
    fleet = size_prefix_cache(fleet, requests, prefixes)
    classes = scenario.slo.classes
    weights = np.array([c.weight for c in classes])
    counts = np.bincount(requests["slo_class"], minlength=len(classes))
    slo = np.zeros(len(classes), SLO_DTYPE).view(np.recarray)
    slo["target_s"] = [c.target_s for c in classes]
    slo["reward_weight"] = weights / (weights @ counts)
    slo["end_row"] = np.cumsum(counts)
    slo["next_row"] = slo["end_row"] - counts
    world = World(
        requests=requests,
        fleet=fleet,
        queues=make_queues(
            len(requests),
            scenario.cluster.num_instances,
            len(classes),
            max_group_members(fleet, scenario.environment.grouping),
            scenario.environment.grouping.max_clusters,
        ),
        clock=np.zeros(1, CLOCK_DTYPE).view(np.recarray),
        failures=make_failures(scenario.cluster.failures),
        log=np.zeros(max(LOG_ENTRIES, 16 * fleet.max_num_seqs) if logging else 0, EVENT_DTYPE).view(np.recarray),
        slo=slo,
        class_rows=np.argsort(requests["slo_class"], kind="stable").astype(np.int32),
        finished=np.zeros(fleet.max_num_seqs, np.int32),
        slo_metric=TTFT if scenario.slo.metric == "ttft" else E2E,
        auto_pull=scenario.environment.auto_pull,
        logging=logging,
    )
    find_unservable(world)
    return world
