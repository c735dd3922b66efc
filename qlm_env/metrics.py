"""The table of results at the end of an episode: attainment, throughput, latency, use and operations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlm_env.backends.emulator.state import NEVER
from qlm_env.dynamics import World
from qlm_env.requests import FINISHED, MET, NOWHERE, REJECTED

Metrics = dict[str, Any]


def episode_metrics(world: World, class_names: list[str]) -> Metrics:
    """Every metric of a finished or truncated episode, as plain Python values that JSON can hold.

    ``None`` stands where there is nothing to measure. The *episode* is the time from the first arrival to the
    end, and every rate and share of time refers to it.

    Requests:

    - ``requests``, and of them ``finished``, ``rejected`` (can never run) and ``unfinished`` (the rest).
    - ``slo_attainment``: share of all requests that met their target, on the latency of ``slo.metric``.
      Rejected requests and those not served by the end have missed; under ``ttft`` a request whose first
      token came in time has met its target even if it did not finish.
    - ``slo_attainment_weighted``: the same with each request counted by the weight of its class. The return
      of the episode, operation costs aside, is ``2 * slo_attainment_weighted - 1``.
    - ``slo_attainment_per_class``: by class name, for the classes that have requests.

    Throughput, per second of the episode:

    - ``request_throughput_per_s``: finished requests.
    - ``token_throughput_per_s``: output tokens of finished requests.
    - ``goodput_per_s``: requests that met their target.

    Latency in seconds, 50th and 99th percentile (linear interpolation) over finished requests, such as
    ``ttft_p50_s``; ``latency_per_class`` holds the same by class name:

    - ``ttft``: arrival to first token.
    - ``tpot``: first to last token, over the output tokens after the first; requests with one output token
      have none. Waits after an eviction or preemption are part of it, as a client sees them.
    - ``e2e``: arrival to last token.
    - ``queueing``: arrival to first entry into a batch.

    Waiting and use:

    - ``hol_blocking_s``: head-of-line blocking, the time in which an instance's next request had no room in
      the batch while a request with a longer target was running there; summed over instances.
    - ``utilisation``: share of instance time spent in engine steps; failed instances count as not used.
      ``utilisation_per_instance`` lists each.
    - ``kv_occupancy``: KV blocks in use, averaged over the time in engine steps, over the blocks an instance
      has with the model that leaves it most; so it stays below 1 where other models run. A leap of decode
      steps is counted with the blocks in use at its end.

    Operations, summed over instances:

    - ``swaps``: model swaps begun; ``warm_hits`` of them found the weights in host memory, ``cold_starts``
      loaded them from storage. ``swapping_s``: instance time spent in them.
    - ``warm_starts``: stagings of weights into host memory begun.
    - ``evictions``: requests an ``evict`` took out of a batch; ``preemptions``: those the engine took out
      because KV blocks ran out.
    - ``recomputed_tokens``: tokens whose KV cache was computed and lost before its request finished.
    - ``kv_swapped_bytes``: KV cache moved between GPU and host memory, both ways added.
    - ``emulated_s``: length of the episode.

    Args:
        class_names: names of the SLO classes, by index.
    """
    # Plain arrays: their fields are several times faster to read than those of records.
    requests = world.requests.view(np.ndarray)
    engine = world.fleet.engine.view(np.ndarray)
    end_s = float(world.clock[0].now_s)
    episode_s = end_s - float(requests["arrival_s"][0])
    finished = requests["state"] == FINISHED
    rejected = int((requests["state"] == REJECTED).sum())
    met = requests["settled"] == MET
    count_of_class = np.bincount(requests["slo_class"], minlength=len(class_names))
    met_of_class = np.bincount(requests["slo_class"][met], minlength=len(class_names))
    weight = world.slo["reward_weight"]
    classes = [(c, name) for c, name in enumerate(class_names) if count_of_class[c]]
    most_blocks = world.fleet.placement["num_blocks"].max(axis=1)
    busy_block_s = float(most_blocks @ engine["busy_s"])
    return {
        "requests": len(requests),
        "finished": int(finished.sum()),
        "rejected": rejected,
        "unfinished": len(requests) - int(finished.sum()) - rejected,
        "slo_attainment": float(met.mean()),
        "slo_attainment_weighted": float(weight @ met_of_class / (weight @ count_of_class)),
        "slo_attainment_per_class": {name: float(met_of_class[c] / count_of_class[c]) for c, name in classes},
        "request_throughput_per_s": _over(finished.sum(), episode_s),
        "token_throughput_per_s": _over(requests["output_tokens"][finished].sum(), episode_s),
        "goodput_per_s": _over(met.sum(), episode_s),
        **_latencies(requests[finished]),
        "latency_per_class": {
            name: _latencies(requests[finished & (requests["slo_class"] == c)]) for c, name in classes
        },
        "hol_blocking_s": _hol_blocking_s(world),
        "utilisation": _over(engine["busy_s"].mean(), episode_s),
        "utilisation_per_instance": [_over(busy_s, episode_s) for busy_s in engine["busy_s"]],
        "kv_occupancy": float(engine["kv_block_s"].sum()) / busy_block_s if busy_block_s > 0 else None,
        "swaps": int(engine["swaps"].sum()),
        "warm_hits": int(engine["warm_hits"].sum()),
        "cold_starts": int(engine["cold_starts"].sum()),
        "warm_starts": int(engine["warm_starts"].sum()),
        "swapping_s": _swapping_s(world),
        "evictions": int(engine["evictions"].sum()),
        "preemptions": int(engine["preemptions"].sum()),
        "recomputed_tokens": int(requests["recomputed_tokens"].sum(dtype=np.int64)),
        "kv_swapped_bytes": float(engine["kv_swapped_bytes"].sum()),
        "emulated_s": episode_s,
    }


def _over(amount: float | np.number[Any], episode_s: float) -> float:
    """An amount per second of the episode. One of no length, all rejected at once, has served nothing."""
    return float(amount) / episode_s if episode_s > 0 else 0.0


def _percentiles(name: str, seconds: NDArray[np.float64]) -> Metrics:
    if len(seconds) == 0:
        return {f"{name}_p50_s": None, f"{name}_p99_s": None}
    ascending = np.sort(seconds)
    return {f"{name}_p50_s": _quantile(ascending, 0.5), f"{name}_p99_s": _quantile(ascending, 0.99)}


def _quantile(ascending: NDArray[np.float64], share: float) -> float:
    """What ``np.quantile`` gives, bit for bit, at a fraction of its cost: an episode has dozens of quantiles."""
    place = (len(ascending) - 1) * share
    below = int(place)
    low, high = float(ascending[below]), float(ascending[min(below + 1, len(ascending) - 1)])
    weight = place - below
    # Weighed from the nearer end.
    return high - (high - low) * (1 - weight) if weight >= 0.5 else low + (high - low) * weight


def _latencies(finished: NDArray[np.void]) -> Metrics:
    """Percentiles over finished requests."""
    arrival_s = finished["arrival_s"]
    later_tokens = finished["output_tokens"] - 1
    has_later = later_tokens > 0
    decode_s = finished["finish_s"] - finished["first_token_s"]
    return (
        _percentiles("ttft", finished["first_token_s"] - arrival_s)
        | _percentiles("tpot", decode_s[has_later] / later_tokens[has_later])
        | _percentiles("e2e", finished["finish_s"] - arrival_s)
        | _percentiles("queueing", finished["first_scheduled_s"] - arrival_s)
    )


def _hol_blocking_s(world: World) -> float:
    """What has been added up, and the blocking that a truncated episode breaks off."""
    clock = world.clock[0]
    since_s = world.queues.queue["blocked_since_s"]
    return float(clock.hol_blocking_s + (clock.now_s - since_s[since_s != NEVER]).sum())


def _swapping_s(world: World) -> float:
    """Swaps are booked whole when they begin; what is left of them at the end has not happened."""
    engine = world.fleet.engine
    loading = engine["swap_target"] != NOWHERE
    return float(engine["swapping_s"].sum() - (engine["next_event_s"][loading] - world.clock[0].now_s).sum())
