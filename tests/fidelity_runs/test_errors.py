"""Errors between two runs, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qlm_env.fidelity.errors import Attainment, compare_runs
from qlm_env.fidelity.recorded_requests import RecordedRequests
from qlm_env.fidelity.replay import ReplayedRun
from qlm_env.spec import SloClassSpec, SloSpec


def requests(slo_class: tuple[str | None, ...] = (None, None, None)) -> RecordedRequests:
    return RecordedRequests(
        prompt_tokens=np.array([10, 10, 10]),
        output_tokens=np.array([1, 3, 5]),
        arrival_s=np.array([0.0, 1.0, 2.0]),
        scheduled_s=np.array([0.0, 2.0, np.nan]),
        first_token_s=np.array([1.0, 3.0, 6.0]),
        last_token_s=np.array([1.0, 5.0, 8.0]),
        slo_class=slo_class,
        line=np.arange(1, 4),
    )


REPLAYED = ReplayedRun(
    scheduled_s=np.array([0.0, 1.5, 2.0]),
    first_token_s=np.array([2.0, 3.0, 5.0]),
    last_token_s=np.array([2.0, 5.0, 9.0]),
    preemptions=0,
    recomputed_tokens=0,
    engine_steps=9,
)


def test_latencies_and_their_errors() -> None:
    latencies = compare_runs(requests(), REPLAYED, SloSpec(), ()).latencies
    ttft = latencies["ttft"]
    assert ttft.recorded == pytest.approx((7 / 3, 2.0, 3.6, 3.96))
    assert ttft.emulated == pytest.approx((7 / 3, 2.0, 2.8, 2.98))
    assert ttft.relative_error == pytest.approx((0.0, 0.0, 2.8 / 3.6 - 1, 2.98 / 3.96 - 1))
    assert ttft.mean_absolute_error_s == pytest.approx(2 / 3)
    # Two gaps of 1 s, four of 0.5 s against four of 1 s; a single token has none.
    assert latencies["tpot"].recorded.mean == pytest.approx(0.75)
    assert latencies["tpot"].emulated.mean == pytest.approx(1.0)
    assert latencies["e2e"].recorded.mean == pytest.approx(11 / 3)
    assert latencies["e2e"].emulated.mean == pytest.approx(13 / 3)
    # Only requests whose scheduling was recorded.
    assert latencies["queueing"].recorded.mean == pytest.approx(0.5)
    assert latencies["queueing"].emulated.mean == pytest.approx(0.25)


def test_a_latency_that_was_not_recorded_is_left_out_and_zero_has_no_relative_error() -> None:
    unknown = requests()._replace(scheduled_s=np.full(3, np.nan))
    assert list(compare_runs(unknown, REPLAYED, SloSpec(), ()).latencies) == ["ttft", "tpot", "e2e"]
    at_once = requests()._replace(scheduled_s=requests().arrival_s)
    error = compare_runs(at_once, REPLAYED, SloSpec(), ()).latencies["queueing"]
    assert error.emulated.mean > 0
    assert np.isnan(error.relative_error).all()


@pytest.mark.parametrize(("metric", "recorded", "emulated"), [("e2e", 2 / 3, 2 / 3), ("ttft", 2 / 3, 2 / 3)])
def test_requests_without_a_class_are_measured_at_every_target(metric: str, recorded: float, emulated: float) -> None:
    slo = SloSpec.model_validate({"metric": metric})
    compared = compare_runs(requests(), REPLAYED, slo, (0.5, 4.0 if metric == "e2e" else 2.0, 100.0))
    assert [row.recorded for row in compared.attainment] == pytest.approx([0.0, recorded, 1.0])
    assert [row.emulated for row in compared.attainment] == pytest.approx([0.0, emulated, 1.0])
    assert compared.overall_attainment is None


def test_requests_with_a_class_are_measured_at_its_target() -> None:
    slo = SloSpec(classes=(SloClassSpec(name="a", target_s=1.5), SloClassSpec(name="b", target_s=6.5)))
    compared = compare_runs(requests(("a", "b", "b")), REPLAYED, slo, (100.0,))
    assert compared.attainment == (Attainment("a", 1.5, 1, 1.0, 0.0), Attainment("b", 6.5, 2, 1.0, 0.5))
    assert compared.overall_attainment == pytest.approx((1.0, 1 / 3))
    mixed = compare_runs(requests(("a", None, None)), REPLAYED, slo, (6.5,))
    assert mixed.attainment == (Attainment("a", 1.5, 1, 1.0, 0.0), Attainment(None, 6.5, 2, 1.0, 0.5))
    assert mixed.overall_attainment == pytest.approx((1.0, 0.0))
