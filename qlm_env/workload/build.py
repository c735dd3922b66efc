"""From a workload and a seed to the request table.

Every kind of random draw has its own stream, so that changing the mix, say, leaves the arrivals and
lengths as they were, bit by bit; and every stream is drawn request by request, so that a synthetic
workload of more requests begins with the one of fewer.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qlm_env.requests import RequestTable, make_request_table
from qlm_env.spec import (
    BatchArrivals,
    ConfigError,
    MegaPromptSpec,
    SloSpec,
    SyntheticWorkload,
    TraceWorkload,
    WorkloadBase,
)
from qlm_env.workload.arrivals import sample_arrivals
from qlm_env.workload.lengths import sample_lengths, truncate_lengths, uniform_tokens
from qlm_env.workload.trace_rows import Trace
from qlm_env.workload.traces import load_trace

STREAMS = ("arrivals", "lengths", "mix", "mega_prompts", "service_noise")
"""The random streams. Their order fixes every workload ever published: append, never reorder."""

Int = NDArray[np.int32]


def build_requests(
    workload: SyntheticWorkload | TraceWorkload,
    slo: SloSpec,
    seed: int,
    *,
    trace: Trace | None = None,
) -> RequestTable:
    """The requests of ``workload`` drawn with ``seed``: the same pair gives the same table, bit by bit.

    Synthetic lengths are cut to the ``context_tokens`` of the request's model. Lengths of a trace are
    cut to ``max_total_tokens`` only; what then exceeds a model's context is for the environment to
    reject. Of ``slo`` only the order of the class names matters.

    Args:
        trace: what ``load_trace(workload)`` returns, to save reading the file for every seed.

    Raises:
        ConfigError: the mix names an unknown SLO class, ``arrivals.load`` has not been resolved, or the
            trace cannot be read (``TraceError``), selects nothing or is dealt in turn with unequal weights.
    """
    children = np.random.SeedSequence(seed).spawn(len(STREAMS))
    rng = {name: np.random.default_rng(child) for name, child in zip(STREAMS, children, strict=True)}
    classes = slo_class_of_entries(workload, slo)
    models = model_of_entries(workload)
    if isinstance(workload, SyntheticWorkload):
        arrival_s = sample_arrivals(workload.arrivals, workload.num_requests, rng["arrivals"])
        prompt_tokens, output_tokens = sample_lengths(workload.lengths, workload.num_requests, rng["lengths"])
    else:
        trace = load_trace(workload) if trace is None else trace
        arrival_s, prompt_tokens, output_tokens = (
            trace.arrival_s,
            trace.prompt_tokens.copy(),
            trace.output_tokens.copy(),
        )

    entry = _deal_mix(workload, len(arrival_s), rng["mix"])
    _insert_mega_prompts(workload.mega_prompts, prompt_tokens, rng["mega_prompts"])
    limit = total_token_limits(workload)
    if limit is not None:
        truncate_lengths(prompt_tokens, output_tokens, limit[entry])
    return make_request_table(
        arrival_s,
        prompt_tokens,
        output_tokens,
        models[entry],
        classes[entry],
        _service_factors(workload.service_noise_cv, len(arrival_s), rng["service_noise"]),
    )


def resolve_load(
    workload: SyntheticWorkload | TraceWorkload, capacity_per_s: float
) -> SyntheticWorkload | TraceWorkload:
    """``workload`` with ``arrivals.load`` replaced by ``rate_per_s = load * capacity_per_s``.

    A workload that states no load (a rate, a batch, a trace) is returned as it is.

    Raises:
        ConfigError: the capacity needed is not a positive number.
    """
    if isinstance(workload, TraceWorkload) or isinstance(workload.arrivals, BatchArrivals):
        return workload
    load = workload.arrivals.load
    if load is None:
        return workload
    if not (math.isfinite(capacity_per_s) and capacity_per_s > 0):
        raise ConfigError(
            f"arrivals.load is a share of the cluster's capacity, which must be a positive number of "
            f"requests/s (got {capacity_per_s})"
        )
    arrivals = workload.arrivals.model_copy(update={"load": None, "rate_per_s": load * capacity_per_s})
    return workload.model_copy(update={"arrivals": arrivals})


def model_of_entries(workload: WorkloadBase) -> Int:
    """Index into ``workload.models`` of every mix entry, shape (M,)."""
    names = [model.name for model in workload.models]
    return np.array([names.index(entry.model) for entry in workload.mix], dtype=np.int32)


def slo_class_of_entries(workload: WorkloadBase, slo: SloSpec) -> Int:
    """Index into ``slo.classes`` of every mix entry, shape (M,).

    Raises:
        ConfigError: an entry names a class that ``slo`` lacks.
    """
    names = [c.name for c in slo.classes]
    for entry in workload.mix:
        if entry.slo_class not in names:
            raise ConfigError(f"workload.mix names slo_class {entry.slo_class!r}; allowed: {', '.join(names)}")
    return np.array([names.index(entry.slo_class) for entry in workload.mix], dtype=np.int32)


def total_token_limits(workload: SyntheticWorkload | TraceWorkload) -> Int | None:
    """The longest prompt + output of every mix entry, shape (M,), or ``None`` without a limit."""
    if isinstance(workload, SyntheticWorkload):
        contexts = np.array([min(model.context_tokens, 2**31 - 1) for model in workload.models], dtype=np.int32)
        return contexts[model_of_entries(workload)]
    if workload.max_total_tokens is None:
        return None
    return np.full(len(workload.mix), min(workload.max_total_tokens, 2**31 - 1), dtype=np.int32)


def _deal_mix(workload: SyntheticWorkload | TraceWorkload, num_requests: int, rng: np.random.Generator) -> Int:
    """The mix entry of every request, shape (num_requests,)."""
    weights = np.array([entry.weight for entry in workload.mix])
    if isinstance(workload, TraceWorkload) and workload.assign == "cycle":
        if np.any(weights != weights[0]):
            raise ConfigError(
                "workload.assign: cycle deals the mix in turn, so its weights must be equal; "
                "assign: random follows the weights"
            )
        return np.arange(num_requests, dtype=np.int32) % np.int32(len(weights))
    edges = np.cumsum(weights) / weights.sum()
    return np.searchsorted(edges[:-1], rng.random(num_requests), side="right").astype(np.int32)


def _insert_mega_prompts(mega: MegaPromptSpec, prompt_tokens: Int, rng: np.random.Generator) -> None:
    if mega.share == 0.0:
        return
    uniform = rng.random((len(prompt_tokens), 2))
    chosen = uniform[:, 0] < mega.share
    prompt_tokens[chosen] = uniform_tokens(mega.min_tokens, mega.max_tokens, uniform[chosen, 1])


def _service_factors(cv: float, num_requests: int, rng: np.random.Generator) -> NDArray[np.float64] | None:
    """Log-normal factors of mean 1 and coefficient of variation ``cv``; ``None`` for 1 everywhere."""
    if cv == 0.0:
        return None
    variance = math.log1p(cv * cv)
    factors = rng.standard_normal(num_requests)
    factors *= math.sqrt(variance)
    factors -= variance / 2
    return np.exp(factors, out=factors)
