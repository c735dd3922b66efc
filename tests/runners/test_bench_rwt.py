"""`qlm bench rwt` looks at the queues it says it looks at, and its figures are those of the errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planners.waiting import WaitingTimes
from qlm_env.env import QLMEnv
from qlm_env.scenario import Episodes
from runners.bench_rwt import Prediction, accuracy, known_lengths, look_at_queue, measure
from runners.cli import main
from runners.config import BenchRwtOptions

SMALL = BenchRwtOptions(queues=(12,), histories=(4,), episodes=2, max_num_seqs=8, profile_factors=(1.2,), seed=3)


def prediction(mean_s: list[float], std_s: float, actual_s: list[float]) -> Prediction:
    count = len(mean_s)
    variance = np.full(count, std_s**2)
    waits = WaitingTimes(np.zeros(count, int), np.array(mean_s), variance, 0 * variance, variance, variance)
    return Prediction({1.0: waits}, waits, np.array(actual_s))


def test_accuracy_is_worked_out_over_all_looks() -> None:
    looks = [prediction([1.0, 2.0], 1.0, [1.0, 4.0]), prediction([3.0, 6.0], 1.0, [3.5, 3.5])]
    found = accuracy(looks, 1.0)
    actual, error = np.array([1, 4, 3.5, 3.5]), np.array([0, 2, 0.5, 2.5])
    assert found.r2 == pytest.approx(1 - (error**2).sum() / ((actual - actual.mean()) ** 2).sum())
    assert found.relative_error == pytest.approx(error.sum() / actual.sum())
    assert found.relative_rms == pytest.approx(np.sqrt((error**2).sum() / 50))
    # 0.67, 1.64 and 2.58 standard deviations.
    assert found.coverage == (0.5, 0.5, 1.0)


def test_one_look_sees_the_queue_and_knows_what_came_of_it() -> None:
    look = look_at_queue(SMALL, 12, 4, seed=3)
    assert 8 <= len(look.actual_s) <= 12
    assert set(look.predicted) == {1.0, 1.2}
    assert np.all(np.diff(look.actual_s) >= 0)
    assert np.all(look.actual_s > -1e-9)
    again = look_at_queue(SMALL, 12, 4, seed=3)
    assert np.array_equal(again.actual_s, look.actual_s)
    assert np.array_equal(again.predicted[1.0].mean_s, look.predicted[1.0].mean_s)


def test_the_figures_cover_every_queue_and_factor() -> None:
    figures = measure(SMALL)
    names = [figure["name"] for figure in figures]
    assert len(set(names)) == len(names) == 9
    assert sum("profile x 1.2" in name for name in names) == 2


def test_known_lengths_are_those_of_other_seeds() -> None:
    scenario = QLMEnv({"instances": [{"device": "A100"}]}, {"preset": "w_a", "num_requests": 4000}).scenario
    requests = Episodes(scenario).requests(9)
    for slo_class, known in known_lengths(scenario).items():
        lengths = requests["output_tokens"][requests["slo_class"] == slo_class]
        assert known.mean_tokens == pytest.approx(lengths.mean(), rel=0.1)
        assert known.variance_tokens2 == pytest.approx(lengths.var(), rel=0.2)
        assert known.mean_variance_tokens2 == 0.0


def test_a_device_without_a_profile_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rwt", "device=B7", f"out={tmp_path}"]) == 2
    assert "no profile for B7 tp=1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
