"""Random planning problems of the magnitudes that episodes have, for benchmarks and tests.

Service times, batch sizes and loading times come from the profiles of two kinds of instances, 2 A10 and 4 A100, and of
7B, 13B and 70B models (the largest fits only the A100s); waiting groups have the SLO classes of the default settings,
and some are past their deadline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planners.qlm.problem import DELAY_COST, MISS, Flag, Float, Problem
from planners.rwt import full_batch, service_of_batch
from planners.spec import QlmSpec
from qlm_env.cluster import make_placements
from qlm_env.spec import ClusterSpec, ConfigError, GroupingSpec, InstancesSpec, ModelSpec, SloSpec

KINDS = (InstancesSpec(device="A10", tp=2), InstancesSpec(device="A100", tp=4))
ARCHITECTURES = ("llama-2-7b", "llama-2-13b", "llama-2-7b", "llama-3.1-70b", "llama-2-13b")
LOAD_WINDOW_S = 60.0
"""A load of 1 is work for so long on all instances together."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How often a random problem has its special cases."""

    started: float = 0.1
    """Groups of which a part runs already, so that they cannot move."""
    down: float = 0.03
    """Instances that take nothing."""
    empty: float = 0.05
    """Instances without a model."""
    loading: float = 0.15
    """Instances that are loading one."""
    idle: float = 0.15
    """Instances with nothing to do."""
    warm: float = 0.6
    """Models in host memory, per instance."""


def random_problem(
    rng: np.random.Generator,
    num_groups: int,
    num_instances: int,
    num_models: int,
    load: float = 1.0,
    form: int = MISS,
    shares: Shares | None = None,
) -> Problem:
    """A random problem.

    Args:
        load: work that is waiting, in minutes of all instances together.
        form: what a request costs; see :class:`Problem`.

    Raises:
        ConfigError: there is nothing to plan, or the load is not positive.
    """
    if min(num_groups, num_instances, num_models) < 1 or load <= 0.0:
        raise ConfigError(
            f"a random problem needs groups, instances, models and a load above 0 "
            f"(got {num_groups}, {num_instances}, {num_models}, {load:g})"
        )
    shares = Shares() if shares is None else shares
    spec = QlmSpec()
    cluster = ClusterSpec(instances=KINDS)
    models = tuple(
        ModelSpec(name=f"model-{m}", architecture=ARCHITECTURES[m % len(ARCHITECTURES)]) for m in range(num_models)
    )
    # At least one of the kind that every model fits.
    kind = np.concatenate(([1], rng.integers(0, len(KINDS), num_instances - 1)))
    placement = np.asarray(make_placements(cluster, models))[rng.permuted(kind)]
    num_blocks = placement["num_blocks"]
    model = rng.integers(0, num_models, num_groups).astype(np.int32)

    of_group = placement[:, model].T
    prompt = rng.lognormal(5.2, 0.5, num_groups)[:, None]
    mean = rng.lognormal(5.4, 0.3, num_groups)[:, None]
    cv = rng.uniform(0.6, 1.2, num_groups)
    batch = full_batch(cluster.engine, of_group, prompt, mean, (cv[:, None] * mean) ** 2)
    full = service_of_batch(of_group, batch, prompt, mean)
    alone = service_of_batch(of_group, np.ones_like(batch), prompt, mean)
    up = rng.random(num_instances) >= shares.down
    allowed = _allowed(rng, (num_blocks[:, model].T > 0) & up, shares)
    rate = np.where(allowed, 1.0 / np.where(allowed, full.interval_s, 1.0), 0.0)

    largest = np.where(num_blocks > 0, num_blocks, np.nan)[:, model].T
    most = np.minimum(
        cluster.engine.max_num_seqs,
        np.nanmean(largest, axis=1) * cluster.engine.block_size / GroupingSpec().typical_request_tokens,
    )
    requests = np.minimum(most, rng.gamma(2.0, 1.0, num_groups))
    backlog_s = _backlog_s(requests, rate)
    scale = load * LOAD_WINDOW_S / backlog_s if backlog_s > 0.0 else 1.0
    requests = np.clip(np.round(scale * requests), 1.0, np.maximum(1.0, np.round(most)))

    classes = SloSpec().classes
    slo_class = rng.integers(0, len(classes), num_groups)
    target_s = np.array([c.target_s for c in classes])[slo_class]
    oldest_s = rng.uniform(0.0, np.minimum(1.4 * target_s, 300.0))
    weight = np.array([c.weight for c in classes])[slo_class]

    start_model = np.array([_start_model(rng, fits, shares) for fits in num_blocks > 0], np.int32)
    loading = (start_model >= 0) & (rng.random(num_instances) < shares.loading)
    idle = rng.random(num_instances) < shares.idle
    warm = rng.random(placement.shape) < shares.warm
    load_s = np.where(warm, placement["wake_s"], placement["cold_start_s"]).astype(np.float64)
    served = (np.arange(num_instances), np.maximum(0, start_model))
    serving, loading_s = placement[served], load_s[served]
    busy = (start_model >= 0) & ~loading & ~idle & up
    present = np.where(busy, np.round(rng.uniform(0.2, 1.0, num_instances) * np.nanmean(most)), 0.0)
    at_present = service_of_batch(serving, np.maximum(1.0, present), float(prompt.mean()), float(mean.mean()))
    # The last of B memoryless requests takes about ln(B) + 0.577 times the mean.
    drain_s = np.where(present > 0, at_present.latency_s * (np.log(np.maximum(1.0, present)) + 0.577), 0.0)
    least_batch = np.where(allowed, batch, np.inf).min(axis=0)
    return Problem(
        requests=requests,
        weight=weight,
        delay_cost=DELAY_COST / target_s,
        first_slack_s=target_s - oldest_s,
        last_slack_s=target_s - oldest_s * rng.uniform(0.3, 1.0, num_groups),
        model=model,
        output_cv=cv,
        allowed=allowed,
        interval_s=full.interval_s,
        batch=batch,
        latency_s=alone.latency_s,
        latency_growth_s=(full.latency_s - alone.latency_s) / np.maximum(1.0, batch - 1.0),
        start_model=start_model,
        ready_s=np.where(loading, rng.uniform(0.0, 1.0, num_instances) * loading_s, 0.0),
        present=present,
        drain_s=drain_s,
        evict_s=np.full(num_instances, np.inf),
        displaced_weight=np.zeros(num_instances),
        displaced_slack_s=np.zeros(num_instances),
        displaced_delay_cost=np.zeros(num_instances),
        load_s=load_s,
        unload_s=placement["sleep_s"].astype(np.float64),
        idle_s=np.where(present > 0, 0.0, rng.exponential(20.0, num_instances)),
        crowding_cost=np.zeros(allowed.shape),
        swap_cost=spec.swap_weight * rate.max(axis=0) * np.minimum(1.0, present / least_batch),
        hold_s=spec.hold_s + _backlog_s(requests, rate),
        form=form,
        confidence=spec.confidence,
    )


def _backlog_s(requests: Float, rate: Float) -> float:
    """Time to work off everything, were it spread over the instances that may take it."""
    total = rate.sum(axis=1)
    return float((requests[total > 0.0] / total[total > 0.0]).sum())


def _allowed(rng: np.random.Generator, possible: Flag, shares: Shares) -> Flag:
    """(K, I) ``possible``, with the groups that have started kept to one instance."""
    allowed = possible.copy()
    for g in np.flatnonzero(rng.random(len(possible)) < shares.started):
        options = np.flatnonzero(possible[g])
        if len(options):
            allowed[g] = False
            allowed[g, rng.choice(options)] = True
    return allowed


def _start_model(rng: np.random.Generator, fits: Flag, shares: Shares) -> int:
    """A model that fits, or -1."""
    options = np.flatnonzero(fits)
    return int(rng.choice(options)) if len(options) and rng.random() >= shares.empty else -1
