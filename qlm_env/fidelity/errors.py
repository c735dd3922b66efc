"""How far two runs of the same requests are apart: latencies, their percentiles, and SLO attainment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.fidelity.recorded_requests import RecordedRequests
from qlm_env.fidelity.replay import ReplayedRun
from qlm_env.spec import SloSpec

Float = NDArray[np.float64]

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "e2e": "end to end",
    "queueing": "until first scheduled",
}
"""The latencies compared, all in seconds. TTFT, end to end and queueing count from the request's arrival; the time
per output token is that between first and last token over the tokens after the first, and undefined (NaN) for a
request of one token."""


class Statistics(NamedTuple):
    """Of one latency, over the requests that have it."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class LatencyError:
    """One latency, recorded and emulated, in seconds."""

    recorded: Statistics
    emulated: Statistics
    mean_absolute_error_s: float
    """Mean over the requests of the distance between a request's two values."""

    @property
    def relative_error(self) -> Statistics:
        """Emulated over recorded, less 1, of each statistic; NaN where the recorded one is 0."""
        return Statistics(
            *(
                emulated / recorded - 1 if recorded > 0 else np.nan
                for recorded, emulated in zip(self.recorded, self.emulated, strict=True)
            )
        )


@dataclass(frozen=True)
class Attainment:
    """The share of ``num_requests`` requests that meet a target."""

    slo_class: str | None
    """``None`` for requests that were recorded without a class."""
    target_s: float
    num_requests: int
    recorded: float
    emulated: float


@dataclass(frozen=True)
class Comparison:
    """A recorded run beside its replay."""

    latencies: Mapping[str, LatencyError]
    """By the names of :data:`LATENCIES`; without those that were not recorded."""
    attainment: tuple[Attainment, ...]
    overall_attainment: tuple[float, float] | None
    """Of all requests that have an SLO class, each at its own target: recorded and emulated."""


def latencies_s(
    requests: RecordedRequests, scheduled_s: Float, first_token_s: Float, last_token_s: Float
) -> dict[str, Float]:
    """Every latency of :data:`LATENCIES` by name, arrays of shape (N,), NaN where a request does not have it."""
    decodes = np.maximum(1, requests.output_tokens - 1)
    return {
        "ttft": first_token_s - requests.arrival_s,
        "tpot": np.where(requests.output_tokens > 1, (last_token_s - first_token_s) / decodes, np.nan),
        "e2e": last_token_s - requests.arrival_s,
        "queueing": scheduled_s - requests.arrival_s,
    }


def recorded_latencies_s(requests: RecordedRequests) -> dict[str, Float]:
    """The latencies of the real engine, as :func:`latencies_s`."""
    return latencies_s(requests, requests.scheduled_s, requests.first_token_s, requests.last_token_s)


def emulated_latencies_s(requests: RecordedRequests, replayed: ReplayedRun) -> dict[str, Float]:
    """The latencies of the emulated engine, as :func:`latencies_s`."""
    return latencies_s(requests, replayed.scheduled_s, replayed.first_token_s, replayed.last_token_s)


def compare_runs(
    requests: RecordedRequests, replayed: ReplayedRun, slo: SloSpec, targets_s: Sequence[float]
) -> Comparison:
    """Compare a recorded run with its replay.

    Args:
        slo: the metric that targets are measured on, and the target of each class that requests may name.
        targets_s: the targets at which requests without a class are measured, each of them at each.
    """
    recorded, emulated = recorded_latencies_s(requests), emulated_latencies_s(requests, replayed)
    latencies = {}
    for name in LATENCIES:
        known = np.isfinite(recorded[name]) & np.isfinite(emulated[name])
        if known.any():
            latencies[name] = _latency_error(recorded[name][known], emulated[name][known])
    pair = recorded[slo.metric], emulated[slo.metric]
    own_target = {c.name: c.target_s for c in slo.classes}
    class_of = np.array(["" if name is None else name for name in requests.slo_class])
    rows = [
        _attainment(name, target_s, class_of == name, *pair)
        for name, target_s in own_target.items()
        if (class_of == name).any()
    ]
    overall = None
    if rows:
        total = sum(row.num_requests for row in rows)
        overall = (
            sum(row.num_requests * row.recorded for row in rows) / total,
            sum(row.num_requests * row.emulated for row in rows) / total,
        )
    if (class_of == "").any():
        rows += [_attainment(None, float(target_s), class_of == "", *pair) for target_s in targets_s]
    return Comparison(latencies, tuple(rows), overall)


def _latency_error(recorded: Float, emulated: Float) -> LatencyError:
    return LatencyError(_statistics(recorded), _statistics(emulated), float(np.abs(emulated - recorded).mean()))


def _statistics(values: Float) -> Statistics:
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return Statistics(float(values.mean()), float(p50), float(p90), float(p99))


def _attainment(
    name: str | None, target_s: float, chosen: NDArray[np.bool_], recorded: Float, emulated: Float
) -> Attainment:
    return Attainment(
        slo_class=name,
        target_s=target_s,
        num_requests=int(chosen.sum()),
        recorded=float((recorded[chosen] <= target_s).mean()),
        emulated=float((emulated[chosen] <= target_s).mean()),
    )
