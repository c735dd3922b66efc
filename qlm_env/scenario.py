"""A scenario made ready to run: what it lacks is worked out once, and each seed gives its requests."""

from __future__ import annotations

from qlm_env.prefixes import NO_PREFIXES
from qlm_env.profiles import ModelLoad, check_placement, cluster_capacity_per_s, list_profiles
from qlm_env.requests import RequestTable
from qlm_env.spec import ClusterSpec, ConfigError, ScenarioSpec, SyntheticWorkload, TraceWorkload
from qlm_env.workload import build_requests, expected_lengths, load_prefixes, load_trace, resolve_load


def capacity_per_s(cluster: ClusterSpec, workload: SyntheticWorkload | TraceWorkload) -> float:
    """Requests per second of this mix and these lengths that the cluster can serve, swaps being free.

    Raises:
        ConfigError: a model fits no instance, or a profile or trace file cannot be read.
    """
    loads = [
        ModelLoad(entry.model, entry.weight, *lengths)
        for entry, lengths in zip(workload.mix, expected_lengths(workload), strict=True)
    ]
    return cluster_capacity_per_s(cluster, workload.models, loads, cluster.profile_path)


def _check_profiled(cluster: ClusterSpec) -> None:
    """Refuse an instance without any profile: it would never serve a request. Mostly a misspelt device."""
    known = sorted({(key.device, key.tp) for key in list_profiles(cluster.profile_path)})
    for index, group in enumerate(cluster.instances):
        if (group.device, group.tp) not in known:
            allowed = ", ".join(f"{device} tp={tp}" for device, tp in known)
            raise ConfigError(
                f"'cluster.instances.{index}': no profile for {group.device} tp={group.tp}; allowed: {allowed}"
            )


class Episodes:
    """The episodes of a scenario, one per seed.

    A load given as a share of the capacity has become a rate, and a trace is read once.

    Raises:
        ConfigError: the cluster cannot serve the workload, or a profile or trace file cannot be read.
    """

    def __init__(self, scenario: ScenarioSpec) -> None:
        _check_profiled(scenario.cluster)
        check_placement(scenario.cluster, scenario.workload, scenario.cluster.profile_path)
        workload = scenario.workload
        self._trace = load_trace(workload) if isinstance(workload, TraceWorkload) else None
        if isinstance(workload, SyntheticWorkload):
            workload = resolve_load(workload, capacity_per_s(scenario.cluster, workload))
        self.prefixes = NO_PREFIXES
        """Which prompts begin alike, where the engines have a prefix cache and the trace tells."""
        if isinstance(workload, TraceWorkload) and scenario.cluster.engine.enable_prefix_caching:
            self.prefixes = load_prefixes(workload)
        self.scenario = scenario.model_copy(update={"workload": workload})
        """The scenario with its arrival rate in requests per second."""

    def requests(self, seed: int) -> RequestTable:
        """The requests of a seed: a function of workload and seed alone."""
        return build_requests(self.scenario.workload, self.scenario.slo, seed, trace=self._trace)
