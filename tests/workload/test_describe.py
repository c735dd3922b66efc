"""Workload figures against numbers worked out by hand, and the Parquet file against the table."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_env.requests import WORKLOAD_FIELDS, RequestTable, make_request_table, workload_hash
from qlm_env.spec import SloSpec, SyntheticWorkload, parse
from qlm_env.workload import LengthSummary, build_requests, describe, read_trace, to_parquet
from qlm_env.workload.describe import index_of_dispersion
from tests.workload.published_data import published_file
from tests.workload.test_build import SLO, synthetic


def table(arrival_s: list[float]) -> RequestTable:
    n = len(arrival_s)
    ramp = np.arange(1, n + 1)
    return make_request_table(np.array(arrival_s), ramp, 2 * ramp, ramp % 2, np.full(n, 2))


def test_figures_of_a_small_table() -> None:
    requests = table([10.0, 20.0, 50.0, 60.0, 110.0])
    described = describe(requests, synthetic(name="five"), SLO)
    assert described.name == "five"
    assert described.workload_hash == workload_hash(requests)
    assert described.num_requests == 5
    assert described.span_s == 100.0
    assert described.mean_rate_per_s == 0.04
    assert described.peak_rate_per_s == 4 / 60  # 10, 20, 50 and 60 s
    assert described.gap_cv == pytest.approx(math.sqrt(275) / 25)
    assert described.dispersion_1s == pytest.approx(0.96)  # 4 arrivals in 100 windows
    assert math.isnan(described.dispersion_60s)  # only one whole window
    assert described.prompt_tokens == LengthSummary(3.0, 1.04, 1.4, 3.0, 4.6, 4.96, 5.0)
    assert described.output_tokens.mean == 6.0
    assert described.num_by_model == {"small": 2, "large": 3}
    assert described.num_by_slo_class == {"interactive": 0, "batch-1": 0, "batch-2": 5}


def test_what_is_undefined_is_nan() -> None:
    for arrival_s in ([3.0], [3.0, 3.0, 3.0]):
        described = describe(table(arrival_s), synthetic(), SLO)
        assert described.span_s == 0.0
        undefined = (
            described.mean_rate_per_s,
            described.peak_rate_per_s,
            described.gap_cv,
            described.dispersion_1s,
            described.dispersion_60s,
        )
        assert all(math.isnan(figure) for figure in undefined)


def test_an_empty_table_has_no_description() -> None:
    with pytest.raises(ValueError, match="empty"):
        describe(table([]), synthetic(), SLO)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 50), min_size=2, max_size=60), st.sampled_from([0.5, 1.0, 4.0]))
def test_index_of_dispersion_is_variance_over_mean_of_window_counts(times: list[float], window_s: float) -> None:
    arrival_s = np.sort(np.array(times))
    since_first_s = arrival_s - arrival_s[0]
    num_windows = math.floor(since_first_s[-1] / window_s)
    counts = [sum(k * window_s <= time < (k + 1) * window_s for time in since_first_s) for k in range(num_windows)]
    expected = np.var(counts) / np.mean(counts) if num_windows >= 2 else math.nan
    assert index_of_dispersion(arrival_s, window_s) == pytest.approx(expected, nan_ok=True)


def test_long_idle_spans_cost_no_memory() -> None:
    # All but the last of 1e12 windows counted: one arrival in one of them.
    assert index_of_dispersion(np.array([0.0, 1e12]), 1.0) == pytest.approx(1.0)


def test_figures_of_the_azure_2023_conversation_trace() -> None:
    trace = read_trace(published_file("traces/azure_2023_conv.csv"), "azure")
    zeros = np.zeros(len(trace.arrival_s), np.int32)
    requests = make_request_table(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, zeros, zeros)
    described = describe(requests, synthetic(), SLO)
    assert described.mean_rate_per_s == pytest.approx(5.53, abs=0.01)
    assert described.gap_cv == pytest.approx(1.09, abs=0.01)
    assert described.dispersion_60s == pytest.approx(16.1, abs=0.1)
    assert described.prompt_tokens.p50 == 1020
    assert described.output_tokens.p99 == 601


def test_parquet_holds_readable_columns_and_what_made_them(tmp_path: Path) -> None:
    path = tmp_path / "made" / "workload.parquet"
    workload = synthetic(service_noise_cv=0.3)
    requests = build_requests(workload, SLO, 11)
    to_parquet(requests, path, workload, SLO, 11)
    assert [file.name for file in path.parent.iterdir()] == ["workload.parquet"]

    stored = pq.read_table(path)
    assert sorted(stored.column_names) == sorted(name for name, _ in WORKLOAD_FIELDS)
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "service_factor"):
        assert np.array_equal(stored[name].to_numpy(), requests[name])
    names = [model.name for model in workload.models]
    assert stored["model"].to_pylist() == [names[k] for k in requests.model]
    assert stored["slo_class"].to_pylist() == [SLO.classes[k].name for k in requests.slo_class]

    metadata = {key.decode(): value.decode() for key, value in stored.schema.metadata.items()}
    again = build_requests(
        parse(SyntheticWorkload, json.loads(metadata["workload"])),
        parse(SloSpec, json.loads(metadata["slo"])),
        int(metadata["seed"]),
    )
    assert workload_hash(again) == metadata["workload_hash"] == workload_hash(requests)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "workload.parquet"
    path.write_text("old")

    def write_half(stored: object, where: Path) -> None:
        where.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", write_half)
    with pytest.raises(OSError, match="disk full"):
        to_parquet(build_requests(synthetic(), SLO, 1), path, synthetic(), SLO, 1)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
