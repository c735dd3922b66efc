"""Random problems look like those of episodes."""

from __future__ import annotations

import numpy as np
import pytest

from planners.qlm.problem import LATENESS
from planners.qlm.synthetic import LOAD_WINDOW_S, Shares, random_problem
from planners.spec import QlmSpec
from qlm_env.spec import ConfigError


@pytest.mark.parametrize(("groups", "instances", "models"), [(1, 1, 1), (6, 2, 3), (40, 8, 5), (120, 64, 10)])
def test_shapes_and_magnitudes(groups: int, instances: int, models: int) -> None:
    problem = random_problem(np.random.default_rng(groups), groups, instances, models)
    assert problem.allowed.shape == problem.interval_s.shape == (groups, instances)
    assert problem.load_s.shape == problem.unload_s.shape == (instances, models)
    assert (problem.requests >= 1).all()
    assert (problem.requests == np.round(problem.requests)).all()
    assert problem.model.max() < models
    for array in (problem.interval_s, problem.latency_s, problem.batch):
        assert (array[problem.allowed] > 0).all()
        assert np.isfinite(array).all()
    assert problem.latency_s[problem.allowed].max() < 60
    assert (problem.latency_growth_s[problem.allowed] >= 0).all()
    assert (problem.last_slack_s >= problem.first_slack_s).all()
    assert (problem.drain_s[problem.present > 0] > 0).all()
    assert (problem.present[problem.ready_s > 0] == 0).all()


def test_special_cases_occur() -> None:
    problem = random_problem(np.random.default_rng(1), 200, 64, 10)
    assert (problem.first_slack_s < 0).any()
    assert (problem.first_slack_s > 3000).any()
    assert (problem.start_model == -1).any()
    assert (problem.ready_s > 0).any()
    assert (~problem.allowed.any(axis=0)).any()
    assert (problem.allowed.sum(axis=1) == 1).any()
    assert len(np.unique(problem.batch[0])) > 1


def test_a_load_is_minutes_of_work() -> None:
    shares = Shares(started=0.0, down=0.0)
    for load in (0.5, 1.0, 2.0):
        problem = random_problem(np.random.default_rng(2), 60, 6, 4, load=load, shares=shares)
        assert problem.hold_s - QlmSpec().hold_s == pytest.approx(load * LOAD_WINDOW_S, rel=0.1)


def test_equal_seeds_give_equal_problems() -> None:
    first, second = (random_problem(np.random.default_rng(5), 20, 4, 3, form=LATENESS) for _ in range(2))
    assert first.form == LATENESS
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_to_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs groups, instances, models and a load above 0 \(got 0, 1, 1, 1\)"):
        random_problem(np.random.default_rng(0), 0, 1, 1)
    with pytest.raises(ConfigError, match="load above 0"):
        random_problem(np.random.default_rng(0), 1, 1, 1, load=0.0)
