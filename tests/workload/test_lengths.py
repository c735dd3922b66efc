"""Length distributions against the figures of the data they stand for."""

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import spearmanr

from qlm_env.spec import EmpiricalLengths, Lengths, LognormalLengths, UniformLengths
from qlm_env.workload import sample_lengths
from qlm_env.workload.length_table import load_length_table
from qlm_env.workload.lengths import MAX_TOKENS, truncate_lengths
from qlm_env.workload.quantiles import PUBLISHED, read_lengths
from tests.workload.published_data import published_file

N = 400_000

# Mean, p50, p90, p99 of the published files (see the tables' sources).
PUBLISHED_FIGURES = {
    ("sharegpt", "prompt"): (245.75, 35, 761, 2862),
    ("sharegpt", "output"): (325.63, 286, 681, 1000),
    ("azure_conv", "prompt"): (1154.70, 1020, 2734, 4142),
    ("azure_conv", "output"): (211.13, 129, 424, 601),
}


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed))


def figures(tokens: NDArray[np.integer]) -> tuple[float, ...]:
    return (tokens.mean(), *np.quantile(tokens, (0.5, 0.9, 0.99)))


@pytest.mark.parametrize("table", ["sharegpt", "azure_conv"])
def test_shipped_tables_have_the_figures_of_their_source(table: Literal["sharegpt", "azure_conv"]) -> None:
    prompt, output = sample_lengths(EmpiricalLengths(table=table), N, rng())
    # 1.5 %: twice the standard error of the largest, the mean ShareGPT prompt (cv 2.2), is 0.7 %.
    assert figures(prompt) == pytest.approx(PUBLISHED_FIGURES[table, "prompt"], rel=0.015)
    assert figures(output) == pytest.approx(PUBLISHED_FIGURES[table, "output"], rel=0.015)


@pytest.mark.parametrize(
    ("table", "file"),
    [("sharegpt", "lengths/sharegpt_10k_llama2.csv"), ("azure_conv", "traces/azure_2023_conv.csv")],
)
def test_shipped_tables_keep_the_dependence_of_output_on_prompt(
    table: Literal["sharegpt", "azure_conv"], file: str
) -> None:
    data_prompt, data_output = read_lengths(published_file(file), PUBLISHED[table])
    prompt, output = sample_lengths(EmpiricalLengths(table=table), N, rng())
    assert figures(prompt) == pytest.approx(figures(data_prompt), rel=0.015)
    assert figures(output) == pytest.approx(figures(data_output), rel=0.015)
    assert figures(prompt + output) == pytest.approx(figures(data_prompt + data_output), rel=0.015)
    correlation = spearmanr(data_prompt, data_output).statistic
    assert spearmanr(prompt, output).statistic == pytest.approx(correlation, abs=0.01)
    for share in (0.25, 0.5, 0.75):
        cut = np.quantile(data_prompt, share)
        assert output[prompt <= cut].mean() == pytest.approx(data_output[data_prompt <= cut].mean(), rel=0.03)


def test_length_tables_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_length_table("sharegpt").prompt_tokens[0] = 7


def test_lognormal_lengths_have_the_mean_and_variation_asked_for_and_are_independent() -> None:
    spec = LognormalLengths(
        kind="lognormal", prompt_mean_tokens=800, prompt_cv=1.0, output_mean_tokens=300, output_cv=0.5
    )
    prompt, output = sample_lengths(spec, N, rng())
    assert prompt.mean() == pytest.approx(800, rel=4 * 1.0 / math.sqrt(N))
    assert output.mean() == pytest.approx(300, rel=4 * 0.5 / math.sqrt(N))
    # A log-normal of cv 1 has a kurtosis of 41, so its variance a standard error of 1 %.
    assert prompt.std() / prompt.mean() == pytest.approx(1.0, rel=0.03)
    assert output.std() / output.mean() == pytest.approx(0.5, rel=0.03)
    assert abs(np.corrcoef(prompt, output)[0, 1]) < 4 / math.sqrt(N)


def test_uniform_lengths_take_every_value_of_the_range_equally_often() -> None:
    spec = UniformLengths(
        kind="uniform", prompt_min_tokens=5, prompt_max_tokens=8, output_min_tokens=1, output_max_tokens=2
    )
    prompt, output = sample_lengths(spec, N, rng())
    for tokens, low, size in ((prompt, 5, 4), (output, 1, 2)):
        counts = np.bincount(tokens - low, minlength=size)
        assert counts == pytest.approx(np.full(size, N / size), abs=4 * math.sqrt(N / size))
        assert len(counts) == size


def test_truncation_keeps_the_prompt_and_leaves_the_output_what_remains() -> None:
    prompt = np.array([10, 90, 99, 100, 500, 60], np.int32)
    output = np.array([20, 20, 20, 1, 500, 40], np.int32)
    truncate_lengths(prompt, output, 100)
    assert prompt.tolist() == [10, 90, 99, 99, 99, 60]
    assert output.tolist() == [20, 10, 1, 1, 1, 40]


def test_truncation_to_a_limit_per_request() -> None:
    prompt, output = np.array([50, 50], np.int32), np.array([50, 50], np.int32)
    truncate_lengths(prompt, output, np.array([60, 40], np.int32))
    assert prompt.tolist() == [50, 39]
    assert output.tolist() == [10, 1]


distributions: st.SearchStrategy[Lengths] = st.one_of(
    st.sampled_from([EmpiricalLengths(table="sharegpt"), EmpiricalLengths(table="azure_conv")]),
    st.builds(
        lambda p, pc, o, oc: LognormalLengths(
            kind="lognormal", prompt_mean_tokens=p, prompt_cv=pc, output_mean_tokens=o, output_cv=oc
        ),
        st.floats(0.01, 1e12),
        st.floats(0.01, 50),
        st.floats(0.01, 1e12),
        st.floats(0.01, 50),
    ),
    st.builds(
        lambda p, pw, o, ow: UniformLengths(
            kind="uniform",
            prompt_min_tokens=p,
            prompt_max_tokens=p + pw,
            output_min_tokens=o,
            output_max_tokens=o + ow,
        ),
        st.integers(1, 10**10),
        st.integers(0, 10**10),
        st.integers(1, 10**10),
        st.integers(0, 10**10),
    ),
)


@settings(deadline=None, derandomize=True)
@given(distributions, st.integers(1, 200), st.integers(0, 2**32), st.integers(2, 5000))
def test_lengths_are_at_least_one_and_a_prefix_of_longer_workloads(
    spec: Lengths, num_requests: int, seed: int, limit: int
) -> None:
    prompt, output = sample_lengths(spec, num_requests, rng(seed))
    longer = sample_lengths(spec, 2 * num_requests, rng(seed))
    for tokens, more in zip((prompt, output), longer, strict=True):
        assert tokens.shape == (num_requests,)
        assert tokens.dtype == np.int32
        assert tokens.min() >= 1
        assert tokens.max() <= MAX_TOKENS
        assert np.array_equal(tokens, more[:num_requests])
    truncate_lengths(prompt, output, limit)
    assert min(prompt.min(), output.min()) >= 1
    assert np.max(prompt + output) <= limit
