"""From rows of episodes to plotted numbers: interquartile means with intervals, and words for captions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from runners.stats import Interval, normalised_score, paired_difference, relative_gain
from runners.summary import bootstrap_rng, interval_over_seeds

INTERVALS = "interquartile means with 95 % bootstrap intervals over seeds"


def means(rows: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """One row per group of ``by`` and metric: the columns of ``by``, ``metric``, ``value``, ``lo``, ``hi`` and ``n``.

    Seeds in which there is nothing to measure do not count.
    """
    found = []
    for place, group in rows.groupby(list(by), sort=False):
        for metric in metrics:
            known = group[metric].dropna().to_numpy(float)
            if known.size:
                iqm, lo, hi = interval_over_seeds(known)
                found.append(dict(zip(by, place, strict=True)) | _entry(metric, Interval(iqm, lo, hi), known.size))
    return pd.DataFrame(found)


def gains(
    rows: pd.DataFrame, by: Sequence[str], metric: str, planner: str, baselines: Sequence[str], *, relative: bool
) -> pd.DataFrame:
    """What ``planner`` has over each baseline, paired by seed, with columns as :func:`means` and ``baseline``.

    Args:
        relative: over the baseline's mean; else as a difference.
    """
    found = []
    for place, group in rows.groupby(list(by), sort=False):
        scores = {
            name: dict(zip(of_planner["seed"], of_planner[metric], strict=True))
            for name, of_planner in group.groupby("planner")
        }
        for baseline in baselines:
            ours, theirs = scores[planner], scores[baseline]
            gain = (
                relative_gain({"": (ours, theirs)}, bootstrap_rng())
                if relative
                else paired_difference(ours, theirs, bootstrap_rng())
            )
            found.append(
                dict(zip(by, place, strict=True))
                | {"baseline": baseline}
                | _entry(metric, gain, len(ours.keys() & theirs.keys()))
            )
    return pd.DataFrame(found)


def normalised(rows: pd.DataFrame, metric: str) -> str:
    """QLM's score in words, where FCFS under the same seed is 0 and the oracle 1; a dash where these two are equal."""
    scores = rows.pivot(index="seed", columns="planner", values=metric)
    known = normalised_score(scores["qlm"], scores["fcfs"], scores["oracle"])
    known = known[np.isfinite(known)]
    if not known.size:
        return "-"
    value, lo, hi = interval_over_seeds(known)
    return f"{value:.2f} [{lo:.2f}, {hi:.2f}]"


def _entry(metric: str, interval: Interval, n: int) -> dict[str, Any]:
    return {"metric": metric, "value": interval.iqm, "lo": interval.lo, "hi": interval.hi, "n": n}


def setting(rows: pd.DataFrame) -> str:
    """Workloads, clusters, seeds and what a decision is charged, in words."""
    scenarios = [json.loads(text) for text in rows["scenario"].unique()]
    workloads = sorted({scenario["workload"]["name"] for scenario in scenarios})
    # Traces say what was served.
    requests = sorted({int(n) for n in rows["requests"]})
    clusters = sorted({_cluster(scenario["cluster"]) for scenario in scenarios})
    seeds = sorted({int(seed) for seed in rows["seed"]})
    charged = {_charged(scenario["environment"]["decision_time"]) for scenario in scenarios}
    metric = {scenario["slo"]["metric"] for scenario in scenarios}
    latency = {"e2e": "end to end", "ttft": "to the first token"}
    return (
        f"Workload {', '.join(workloads)} ({_range(requests)} requests an episode); cluster {'; '.join(clusters)}; "
        f"seeds {_range(seeds)} (n = {len(seeds)}); {', '.join(sorted(charged))}; SLOs measured "
        f"{', '.join(latency[name] for name in sorted(metric))}."
    )


def _range(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return (
        f"{first:,}" if first == last else f"{first:,} to {last:,}" if len(numbers) > 2 else f"{first:,} and {last:,}"
    )


def _cluster(cluster: Mapping[str, Any]) -> str:
    groups = [
        f"{group['count']} {group['device']}" + (f" (tp={group['tp']})" if group["tp"] > 1 else "")
        for group in cluster["instances"]
    ]
    return " + ".join(groups)


def _charged(decision_time: Mapping[str, Any]) -> str:
    if decision_time["mode"] == "fixed":
        return f"every decision takes {1000 * decision_time['fixed_s']:g} ms"
    return {"zero": "decisions take no time", "measured": "decisions take their measured time"}[decision_time["mode"]]
