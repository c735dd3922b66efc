"""Mean lengths against the means of large samples."""

from typing import Any

import numpy as np
import pytest

from qlm_env.spec import ConfigError
from qlm_env.workload import Trace, build_requests, expected_lengths
from tests.workload.test_build import MIX, MODELS, SLO, replay, some_trace, synthetic

WORKLOADS: dict[str, dict[str, Any]] = {
    "sharegpt": {},
    "azure": {"lengths": {"kind": "empirical", "table": "azure_conv"}},
    "mega prompts": {"mega_prompts": {"share": 0.3}},
    "lognormal": {
        "lengths": {
            "kind": "lognormal",
            "prompt_mean_tokens": 900,
            "prompt_cv": 2,
            "output_mean_tokens": 500,
            "output_cv": 1,
        }
    },
    "uniform": {
        "lengths": {
            "kind": "uniform",
            "prompt_min_tokens": 1,
            "prompt_max_tokens": 3000,
            "output_min_tokens": 1,
            "output_max_tokens": 9,
        }
    },
}


@pytest.mark.parametrize("options", WORKLOADS.values(), ids=WORKLOADS)
def test_expected_lengths_are_the_means_of_the_requests_of_each_mix_entry(options: dict[str, Any]) -> None:
    workload = synthetic(num_requests=600_000, **options)
    requests = build_requests(workload, SLO, 1)
    for entry, expected in zip(MIX, expected_lengths(workload), strict=True):
        of_entry = requests.model == [model["name"] for model in MODELS].index(entry["model"])
        for name in ("prompt_tokens", "output_tokens"):
            tokens = requests[name][of_entry]
            error = 4 * tokens.std() / np.sqrt(tokens.size)
            assert getattr(expected, name) == pytest.approx(tokens.mean(), rel=0.001, abs=error), name


def test_entries_differ_by_what_their_context_cuts() -> None:
    large, small = expected_lengths(synthetic(mega_prompts={"share": 1.0}))
    assert large.prompt_tokens == pytest.approx(3500, rel=1e-3)
    assert (small.prompt_tokens, small.output_tokens) == (2047.0, 1.0)


def test_the_order_of_entries_does_not_matter() -> None:
    forward, backward = expected_lengths(synthetic()), expected_lengths(synthetic(mix=MIX[::-1]))
    assert forward == backward[::-1]
    assert forward[0] != forward[1]


def test_a_trace_has_the_means_of_its_requests_for_every_entry() -> None:
    trace = some_trace(100)
    # Prompts 10k, outputs k for k = 1..100: E[k * 10.5k] / E[k] = 10.5 * 3383.5 / 50.5.
    assert expected_lengths(replay(), trace=trace) == (pytest.approx((505.0, 50.5, 703.5)),) * 2


def test_a_trace_is_cut_and_mixed_with_mega_prompts() -> None:
    trace = Trace(np.zeros(2), np.array([50, 5000], np.int32), np.array([100, 100], np.int32), 0)
    workload = replay(max_total_tokens=1000, mega_prompts={"share": 0.5})
    # Half the requests: (50, 100) and (999, 1); the other half all (999, 1).
    resident = (0.25 * 100 * (50 + 50) + 0.75 * 1 * (999 + 0.5)) / 25.75
    assert expected_lengths(workload, trace=trace)[0] == pytest.approx((761.75, 25.75, resident))
    assert trace.prompt_tokens.tolist() == [50, 5000]


def test_a_missing_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no-such\.csv"):
        expected_lengths(replay(path="no-such.csv"))
