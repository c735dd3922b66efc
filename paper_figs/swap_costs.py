"""Figure 14: cold against warm model starts, and KV cache restored against recomputed."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style
from paper_figs.figure import Source
from qlm_env.backends.emulator.latency import step_time_s
from qlm_env.cluster import make_placements
from qlm_env.profiles import load_profile
from qlm_env.spec import ClusterSpec, EngineSpec, InstancesSpec, ModelSpec

EXPERIMENTS: tuple[str, ...] = ()
PLACEMENTS = (
    ("A10", "llama-2-7b", 1),
    ("A10", "llama-2-13b", 2),
    ("A100", "llama-2-7b", 1),
    ("A100", "llama-2-13b", 1),
    ("A100", "llama-3.1-70b", 4),
)
"""Device, architecture and GPUs: those of this project's clusters."""
CONTEXT_TOKENS = 2048
"""Of the request whose KV cache is restored or recomputed."""


def data(source: Source) -> pd.DataFrame:
    return pd.DataFrame([_costs(*placement) for placement in PLACEMENTS])


def _costs(device: str, architecture: str, tp: int) -> dict[str, float | str]:
    profile = load_profile(device, architecture, tp)
    cluster = ClusterSpec(instances=(InstancesSpec(device=device, tp=tp),))
    placement = make_placements(cluster, (ModelSpec(name=architecture, architecture=architecture),))[0, 0]
    chunk = EngineSpec().max_num_batched_tokens
    recompute_s, cached = 0.0, 0
    while cached < CONTEXT_TOKENS:
        new = min(chunk, CONTEXT_TOKENS - cached)
        recompute_s += float(step_time_s(placement, new, 0.0, 0.0, new * (cached + new / 2)))
        cached += new
    return {
        "name": f"{architecture}\n{tp} {device}",
        "cold_s": profile.cold_start_s.value,
        "warm_s": profile.wake_s.value,
        "restore_s": CONTEXT_TOKENS * profile.kv_bytes_per_token.value / profile.kv_swap_bytes_per_s.value,
        "recompute_s": recompute_s,
        "kinds": f"{profile.cold_start_s.kind}, {profile.wake_s.kind}, {profile.kv_swap_bytes_per_s.kind}",
    }


def plot(data: pd.DataFrame) -> Picture:
    picture, axes = style.panels(2, width=5.2)
    pairs = (
        (("cold_s", "cold start"), ("warm_s", "warm start")),
        (("recompute_s", "KV recomputed"), ("restore_s", "KV restored")),
    )
    for each, pair in zip(axes, pairs, strict=True):
        for offset, (column, what) in zip((-0.2, 0.2), pair, strict=True):
            bars = each.bar([k + offset for k in range(len(data))], data[column], 0.38, label=what)
            each.bar_label(bars, fmt="%.2g", fontsize="x-small")
        each.set_xticks(range(len(data)), data["name"], fontsize="x-small")
        each.set_yscale("log")
        each.set_ylabel("seconds")
        each.legend(frameon=False, fontsize="small")
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        "Seconds to start a model from storage (cold) and from host memory (warm), and to bring back the KV cache "
        f"of an evicted request of {CONTEXT_TOKENS:,} tokens, per model and device, from the latency profiles; `qlm "
        "profile show` gives the source of every number, and whether it was measured, fitted or estimated."
    )
