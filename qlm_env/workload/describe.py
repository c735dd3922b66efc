"""What a workload looks like: figures to print, and a Parquet file to keep."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qlm_env.requests import RequestTable, workload_hash
from qlm_env.spec import SloSpec, SyntheticWorkload, TraceWorkload
from qlm_env.workload.atomic import atomic_path

PEAK_WINDOW_S = 60.0


class LengthSummary(NamedTuple):
    """Mean and quantiles of a length, in tokens."""

    mean: float
    p1: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class WorkloadDescription:
    """Figures of a request table. What is undefined (a rate of one request, say) is NaN."""

    name: str
    workload_hash: str
    num_requests: int
    span_s: float
    """First to last arrival."""
    mean_rate_per_s: float
    """Gaps between arrivals per second of the span."""
    peak_rate_per_s: float
    """Most arrivals in any ``PEAK_WINDOW_S`` seconds, per second."""
    gap_cv: float
    """Coefficient of variation of the gaps between arrivals; 1 for Poisson arrivals."""
    dispersion_1s: float
    """Index of dispersion: variance over mean of the counts in consecutive 1 s windows; 1 for Poisson."""
    dispersion_60s: float
    """The same in 60 s windows."""
    prompt_tokens: LengthSummary
    output_tokens: LengthSummary
    num_by_model: dict[str, int]
    num_by_slo_class: dict[str, int]


def describe(requests: RequestTable, workload: SyntheticWorkload | TraceWorkload, slo: SloSpec) -> WorkloadDescription:
    """Summarise ``requests``, built from ``workload`` and ``slo``; reads the workload columns only.

    Raises:
        ValueError: the table is empty.
    """
    if len(requests.arrival_s) == 0:
        raise ValueError("an empty request table has no description")
    arrival_s: NDArray[np.float64] = np.ascontiguousarray(requests.arrival_s)
    gaps_s = np.diff(arrival_s)
    span_s = float(arrival_s[-1] - arrival_s[0])
    models = [model.name for model in workload.models]
    classes = [c.name for c in slo.classes]
    return WorkloadDescription(
        name=workload.name,
        workload_hash=workload_hash(requests),
        num_requests=len(arrival_s),
        span_s=span_s,
        mean_rate_per_s=_ratio(float(gaps_s.size), span_s),
        peak_rate_per_s=_peak_rate_per_s(arrival_s) if span_s >= PEAK_WINDOW_S else float("nan"),
        gap_cv=_ratio(float(gaps_s.std()), float(gaps_s.mean())) if gaps_s.size else np.nan,
        dispersion_1s=index_of_dispersion(arrival_s, 1.0),
        dispersion_60s=index_of_dispersion(arrival_s, 60.0),
        prompt_tokens=_summary(requests.prompt_tokens),
        output_tokens=_summary(requests.output_tokens),
        num_by_model=_counts(requests.model, models),
        num_by_slo_class=_counts(requests.slo_class, classes),
    )


def index_of_dispersion(arrival_s: NDArray[np.float64], window_s: float) -> float:
    """Variance over mean of the counts in consecutive whole windows from the first arrival on.

    ``arrival_s``: non-decreasing seconds, shape (N,). NaN with fewer than two whole windows.
    """
    window = np.floor((arrival_s - arrival_s[0]) / window_s)
    num_windows = float(window[-1])
    if num_windows < 2:
        return float("nan")
    # Only occupied windows are counted one by one: a sparse workload may span billions of empty ones.
    _, counts = np.unique(window[window < num_windows], return_counts=True)
    mean = counts.sum() / num_windows
    return float(np.square(counts).sum() / num_windows / mean - mean)


def to_parquet(
    requests: RequestTable,
    path: str | Path,
    workload: SyntheticWorkload | TraceWorkload,
    slo: SloSpec,
    seed: int,
) -> None:
    """Write the workload columns of ``requests`` to ``path``, one row per request, atomically.

    Models and SLO classes are written by name. The schema's metadata holds ``workload_hash``, ``seed``,
    and as JSON ``workload`` and ``slo``, from which :func:`~qlm_env.workload.build.build_requests` makes
    the same table again.

    Raises:
        OSError: the file cannot be written.
    """
    models = [model.name for model in workload.models]
    classes = [c.name for c in slo.classes]
    metadata = {
        "workload_hash": workload_hash(requests),
        "seed": str(seed),
        "workload": json.dumps(workload.model_dump(mode="json")),
        "slo": json.dumps(slo.model_dump(mode="json")),
    }
    table = pa.table(
        {
            "arrival_s": requests.arrival_s,
            "prompt_tokens": requests.prompt_tokens,
            "output_tokens": requests.output_tokens,
            "model": pa.DictionaryArray.from_arrays(requests.model, models),
            "slo_class": pa.DictionaryArray.from_arrays(requests.slo_class, classes),
            "service_factor": requests.service_factor,
        }
    ).replace_schema_metadata(metadata)
    with atomic_path(Path(path)) as temporary:
        pq.write_table(table, temporary)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")


def _peak_rate_per_s(arrival_s: NDArray[np.float64]) -> float:
    # The fullest window can be moved to begin with an arrival.
    ends = np.searchsorted(arrival_s, arrival_s + PEAK_WINDOW_S)
    return float(np.max(ends - np.arange(len(arrival_s)))) / PEAK_WINDOW_S


def _summary(tokens: NDArray[np.int32]) -> LengthSummary:
    quantiles = np.quantile(tokens, (0.01, 0.1, 0.5, 0.9, 0.99, 1.0))
    return LengthSummary(float(tokens.mean()), *(float(q) for q in quantiles))


def _counts(index: NDArray[np.int32], names: list[str]) -> dict[str, int]:
    counts = np.bincount(index, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}
