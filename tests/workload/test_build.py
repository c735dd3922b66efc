"""Building request tables: reproducibility, independent streams, the rules for lengths and the mix."""

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from qlm_env.requests import PENDING, WORKLOAD_FIELDS, RequestTable, workload_hash
from qlm_env.spec import (
    ConfigError,
    SloClassSpec,
    SloSpec,
    SyntheticWorkload,
    TraceWorkload,
    parse,
)
from qlm_env.workload import Trace, TraceError, build_requests, load_trace, resolve_load

SLO = SloSpec()
MODELS = [
    {"name": "small", "architecture": "a", "context_tokens": 2048},
    {"name": "large", "architecture": "b", "context_tokens": 8192},
]
MIX = [
    {"model": "large", "slo_class": "batch-2", "weight": 1},
    {"model": "small", "slo_class": "interactive", "weight": 3},
]


def synthetic(**options: Any) -> SyntheticWorkload:
    defaults = {
        "models": MODELS,
        "mix": MIX,
        "num_requests": 500,
        "arrivals": {"kind": "poisson", "rate_per_s": 2.0},
    }
    return parse(SyntheticWorkload, defaults | options)


def replay(**options: Any) -> TraceWorkload:
    defaults = {"kind": "trace", "format": "azure", "path": "trace.csv", "models": MODELS, "mix": MIX}
    return parse(TraceWorkload, defaults | options)


def some_trace(num_requests: int = 500) -> Trace:
    ramp = np.arange(1, num_requests + 1, dtype=np.int32)
    return Trace(np.arange(float(num_requests)), 10 * ramp, ramp, 0)


def same(a: RequestTable, b: RequestTable, *columns: str) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in columns)


COLUMNS = [name for name, _ in WORKLOAD_FIELDS]


# --------------------------------------------------------------------------- reproducibility
ARRIVAL_S = [0.5986705199589979, 0.6327695883773055, 1.7117475113599798, 3.1826838757022546]
SERVICE_FACTOR = [1.1276484546448653, 0.6727663426094721, 1.060355727825408, 0.5124179679166521]
PROMPT_TOKENS = [33, 2047, 3533, 21]
OUTPUT_TOKENS = [55, 1, 152, 540]
MODEL = [0, 0, 1, 0]
SLO_CLASS = [0, 0, 2, 0]


def test_the_first_requests_of_a_seed_never_change() -> None:
    """Published results name workloads by seed: these numbers may only change with the project's version."""
    requests = build_requests(synthetic(service_noise_cv=0.5, mega_prompts={"share": 0.3}), SLO, seed=7)
    assert requests.arrival_s[:4] == pytest.approx(ARRIVAL_S, rel=1e-12)
    assert requests.service_factor[:4] == pytest.approx(SERVICE_FACTOR, rel=1e-12)
    assert [requests[name][:4].tolist() for name in ("prompt_tokens", "output_tokens", "model", "slo_class")] == [
        PROMPT_TOKENS,
        OUTPUT_TOKENS,
        MODEL,
        SLO_CLASS,
    ]


arrivals = st.sampled_from(
    [
        {"kind": "poisson", "rate_per_s": 2.0},
        {"kind": "gamma", "rate_per_s": 0.5, "cv": 3.0},
        {"kind": "markov", "rate_per_s": 5.0},
        {"kind": "batch"},
    ]
)
lengths = st.sampled_from(
    [
        {"kind": "empirical", "table": "sharegpt"},
        {"kind": "empirical", "table": "azure_conv"},
        {"kind": "lognormal", "prompt_mean_tokens": 3000, "prompt_cv": 3},
    ]
)
mixes = st.sampled_from([MIX, MIX[::-1], MIX[:1], [{**MIX[0], "weight": 9}, MIX[1]]])
options = st.fixed_dictionaries(
    {
        "arrivals": arrivals,
        "lengths": lengths,
        "mix": mixes,
        "mega_prompts": st.sampled_from([{"share": 0.0}, {"share": 0.4}, {"share": 1.0, "max_tokens": 9000}]),
        "service_noise_cv": st.sampled_from([0.0, 0.3, 2.0]),
    }
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(options, st.integers(1, 300), st.integers(0, 2**63))
def test_a_workload_and_a_seed_fix_the_table_and_every_table_is_valid(
    values: dict[str, Any], num_requests: int, seed: int
) -> None:
    workload = synthetic(num_requests=num_requests, **values)
    requests = build_requests(workload, SLO, seed)
    assert workload_hash(requests) == workload_hash(build_requests(workload, SLO, seed))
    assert len(requests) == num_requests
    assert np.all(np.diff(requests.arrival_s) >= 0)
    assert min(requests.prompt_tokens.min(), requests.output_tokens.min()) >= 1
    context = np.array([model.context_tokens for model in workload.models])
    assert np.all(requests.prompt_tokens + requests.output_tokens <= context[requests.model])
    dealt = set(zip(requests.model.tolist(), requests.slo_class.tolist(), strict=True))
    assert dealt <= {(1, 2), (0, 0)}
    assert np.all(requests.service_factor > 0)
    assert np.all(requests.state == PENDING)

    longer = build_requests(synthetic(num_requests=2 * num_requests, **values), SLO, seed)
    assert all(np.array_equal(requests[name], longer[name][:num_requests]) for name in COLUMNS)


AFFECTED = {
    "arrivals": {"arrival_s"},
    "lengths": {"prompt_tokens", "output_tokens"},
    # A request of another model is cut to another context.
    "mix": {"model", "slo_class", "prompt_tokens", "output_tokens"},
    # A longer prompt leaves less of the context for the output.
    "mega_prompts": {"prompt_tokens", "output_tokens"},
    "service_noise_cv": {"service_factor"},
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(options, options, st.sampled_from(sorted(AFFECTED)), st.integers(0, 2**32))
def test_changing_one_thing_leaves_every_other_column_bit_identical(
    values: dict[str, Any], others: dict[str, Any], key: str, seed: int
) -> None:
    before = build_requests(synthetic(**values), SLO, seed)
    after = build_requests(synthetic(**values | {key: others[key]}), SLO, seed)
    assert same(before, after, *(set(COLUMNS) - AFFECTED[key]))


def test_seeds_and_streams_differ() -> None:
    workload = synthetic(service_noise_cv=0.5, mega_prompts={"share": 0.5})
    one, two = build_requests(workload, SLO, 1), build_requests(workload, SLO, 2)
    assert not any(same(one, two, name) for name in COLUMNS)


def test_columns_drawn_from_different_streams_are_uncorrelated() -> None:
    n = 4000
    roomy = [{**model, "context_tokens": 10**6} for model in MODELS]
    requests = build_requests(synthetic(num_requests=n, models=roomy, service_noise_cv=0.5), SLO, 1)
    gaps_s = np.diff(requests.arrival_s, prepend=0.0)
    streams = [gaps_s, requests.prompt_tokens, requests.model, requests.service_factor]
    correlations = spearmanr(np.column_stack(streams)).statistic
    assert np.max(np.abs(correlations - np.eye(len(streams)))) < 4 / math.sqrt(n)


def test_slo_targets_and_weights_do_not_matter_but_the_order_of_classes_does() -> None:
    requests = build_requests(synthetic(), SLO, 3)
    strict = SloSpec(
        metric="ttft",
        classes=tuple(SloClassSpec(name=c.name, target_s=c.target_s / 9, weight=5.0) for c in SLO.classes),
    )
    assert workload_hash(build_requests(synthetic(), strict, 3)) == workload_hash(requests)
    reverse = build_requests(synthetic(), SloSpec(classes=SLO.classes[::-1]), 3)
    assert np.array_equal(reverse.slo_class, 2 - requests.slo_class)
    assert same(reverse, requests, *(set(COLUMNS) - {"slo_class"}))


# --------------------------------------------------------------------------- what is drawn
def test_the_mix_follows_its_weights() -> None:
    n = 100_000
    requests = build_requests(synthetic(num_requests=n), SLO, 5)
    assert np.mean(requests.model == 0) == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / n))
    assert np.array_equal(requests.model == 0, requests.slo_class == 0)


def test_mega_prompts_replace_their_share_of_prompts_and_keep_outputs() -> None:
    n = 100_000
    large = {"models": MODELS[1:], "mix": MIX[:1], "num_requests": n}
    plain = build_requests(synthetic(**large), SLO, 5)
    mega = build_requests(
        synthetic(**large, mega_prompts={"share": 0.1, "min_tokens": 6000, "max_tokens": 6001}), SLO, 5
    )
    replaced = mega.prompt_tokens >= 6000  # no ShareGPT prompt is that long
    assert np.mean(replaced) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / n))
    assert np.array_equal(mega.prompt_tokens[~replaced], plain.prompt_tokens[~replaced])
    assert np.array_equal(mega.output_tokens, plain.output_tokens)
    halves = np.bincount(mega.prompt_tokens[replaced] - 6000)
    assert len(halves) == 2
    assert halves[0] == pytest.approx(halves.sum() / 2, abs=4 * math.sqrt(halves.sum() / 4))


def test_service_noise_is_lognormal_with_mean_one() -> None:
    n = 200_000
    factors = build_requests(synthetic(num_requests=n, service_noise_cv=0.5), SLO, 5).service_factor
    assert factors.mean() == pytest.approx(1.0, abs=4 * 0.5 / math.sqrt(n))
    assert factors.std() == pytest.approx(0.5, rel=0.02)
    assert np.log(factors).std() == pytest.approx(math.sqrt(math.log(1.25)), rel=4 / math.sqrt(2 * n))
    assert np.all(build_requests(synthetic(), SLO, 5).service_factor == 1.0)


def test_synthetic_lengths_are_cut_to_the_context_of_their_model() -> None:
    long = {"kind": "uniform", "prompt_min_tokens": 3000, "prompt_max_tokens": 3000}
    requests = build_requests(synthetic(lengths=long | {"output_min_tokens": 100, "output_max_tokens": 100}), SLO, 5)
    small = requests.model == 0
    assert set(zip(requests.prompt_tokens[small], requests.output_tokens[small], strict=True)) == {(2047, 1)}
    assert set(zip(requests.prompt_tokens[~small], requests.output_tokens[~small], strict=True)) == {(3000, 100)}


# --------------------------------------------------------------------------- traces
def test_a_trace_keeps_arrivals_and_lengths_even_beyond_the_context() -> None:
    trace = some_trace()
    requests = build_requests(replay(), SLO, 5, trace=trace)
    assert np.array_equal(requests.arrival_s, trace.arrival_s)
    assert np.array_equal(requests.prompt_tokens, trace.prompt_tokens)
    assert np.array_equal(requests.output_tokens, trace.output_tokens)
    assert np.any(requests.prompt_tokens[requests.model == 0] > 2048)
    assert 0.65 < np.mean(requests.model == 0) < 0.85


def test_a_trace_is_cut_to_max_total_tokens_after_mega_prompts() -> None:
    trace = some_trace()
    workload = replay(max_total_tokens=1000, mega_prompts={"share": 0.5})
    requests = build_requests(workload, SLO, 5, trace=trace)
    assert np.max(requests.prompt_tokens + requests.output_tokens) == 1000
    mega = requests.prompt_tokens == 999
    assert np.mean(mega[:90]) == pytest.approx(0.5, abs=0.2)
    assert np.array_equal(requests.prompt_tokens[:90][~mega[:90]], trace.prompt_tokens[:90][~mega[:90]])
    assert trace.prompt_tokens[-1] == 5000  # the trace given is not changed


def test_a_trace_is_dealt_in_turn() -> None:
    equal = [{**entry, "weight": 2} for entry in MIX]
    requests = build_requests(replay(assign="cycle", mix=equal), SLO, 5, trace=some_trace(5))
    assert requests.model.tolist() == [1, 0, 1, 0, 1]
    assert requests.slo_class.tolist() == [2, 0, 2, 0, 2]


def test_a_trace_is_read_from_its_file_when_none_is_given(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n")
    workload = replay(path=str(path), max_total_tokens=400)
    requests = build_requests(workload, SLO, 5)
    assert same(requests, build_requests(workload, SLO, 5, trace=load_trace(workload)), *COLUMNS)
    assert (requests.prompt_tokens.tolist(), requests.output_tokens.tolist()) == ([374], [26])


# --------------------------------------------------------------------------- errors
def test_errors_name_the_key() -> None:
    with pytest.raises(ConfigError, match=r"arrivals\.load"):
        build_requests(synthetic(arrivals={"kind": "poisson", "load": 0.9}), SLO, 1)
    with pytest.raises(ConfigError, match="slo_class 'batch-2'; allowed: interactive"):
        build_requests(synthetic(), SloSpec(classes=SLO.classes[:1]), 1)
    with pytest.raises(ConfigError, match="weights must be equal"):
        build_requests(replay(assign="cycle"), SLO, 1, trace=some_trace())
    with pytest.raises(TraceError, match=r"no-such\.csv"):
        build_requests(replay(path="no-such.csv"), SLO, 1)


# --------------------------------------------------------------------------- load
@pytest.mark.parametrize("kind", ["poisson", "gamma", "markov"])
def test_load_becomes_a_share_of_capacity(kind: str) -> None:
    workload = synthetic(arrivals={"kind": kind, "load": 0.8})
    resolved = resolve_load(workload, 5.0)
    assert isinstance(resolved, SyntheticWorkload)
    assert resolved == synthetic(arrivals={"kind": kind, "rate_per_s": 4.0})
    assert parse(SyntheticWorkload, resolved.model_dump()) == resolved


@pytest.mark.parametrize("workload", [synthetic(), synthetic(arrivals={"kind": "batch"}), replay()])
def test_a_workload_without_load_is_returned_as_it_is(workload: SyntheticWorkload | TraceWorkload) -> None:
    assert resolve_load(workload, math.nan) is workload


@pytest.mark.parametrize("capacity_per_s", [0.0, -1.0, math.nan, math.inf])
def test_a_load_needs_a_positive_capacity(capacity_per_s: float) -> None:
    with pytest.raises(ConfigError, match=r"arrivals\.load is a share of the cluster's capacity"):
        resolve_load(synthetic(arrivals={"kind": "poisson", "load": 0.8}), capacity_per_s)


# --------------------------------------------------------------------------- scale
def test_memory_stays_near_that_of_the_table() -> None:
    n = 2_000_000
    workload = synthetic(num_requests=n, service_noise_cv=0.5, mega_prompts={"share": 0.1})
    build_requests(synthetic(), SLO, 1)
    tracemalloc.start()
    requests = build_requests(workload, SLO, 1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes - requests.nbytes < 100 * n
