"""The figures there are, in the order of the gallery."""

from __future__ import annotations

from paper_figs.figure import Entry
from qlm_env.spec import ConfigError
from runners.composition import hint

FIGURES = (
    Entry("0", "headline", "QLM over the state of the art"),
    Entry("1", "waiting_time", "Waiting times, predicted and actual"),
    Entry("2", "hol_blocking", "Head-of-line blocking, with and without eviction"),
    Entry("3", "edf_swaps", "EDF on several models"),
    Entry("4", "w_a_attainment", "One model: attainment against arrival rate"),
    Entry("5", "w_a_throughput", "One model: throughput"),
    Entry("6", "w_a_ablation", "One model: each operation left out"),
    Entry("7", "w_b_rate", "Five models: attainment and throughput against arrival rate"),
    Entry("8", "w_b_ablation", "Five models: each operation left out"),
    Entry("9", "w_c_share", "Mega prompts"),
    Entry("10", "device_mix", "Unlike devices"),
    Entry("11", "robustness", "Long queues and bursts"),
    Entry("12", "group_size", "Size of request groups"),
    Entry("13", "planner_time", "Planning time"),
    Entry("14", "swap_costs", "Cold and warm starts, KV restored and recomputed"),
    Entry("15", "learned_policies", "Learned policies"),
    Entry("16", "emulator_fidelity", "The emulator against real vLLM"),
    Entry("17", "traces", "Production traces"),
    Entry("18", "day_at_scale", "A day at scale"),
)

BY_NAME = {entry.name: entry for entry in FIGURES}


def find(names: tuple[str, ...] | None) -> list[Entry]:
    """The figures of these names in the order of the gallery; all for None.

    Raises:
        ConfigError: there is no figure of a name.
    """
    for name in names or ():
        if name not in BY_NAME:
            allowed = list(BY_NAME)
            raise ConfigError(f"'names': no figure named '{name}'; allowed: {', '.join(allowed)}{hint(name, allowed)}")
    return [entry for entry in FIGURES if names is None or entry.name in names]
