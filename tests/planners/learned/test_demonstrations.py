"""A planner's episodes as single decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra")

from planners import make_planner
from planners.learned.demonstrations import (
    batches,
    read_demonstration,
    read_index,
    record_episode,
    returns,
    within,
    write_demonstration,
)
from planners.learned.planner import spaces_of
from planners.learned.spec import ActionSet
from planners.spec import parse_planner
from qlm_env.env import QLMEnv
from qlm_env.spec import ConfigError

FEW: dict[str, Any] = {"preset": "smoke", "num_requests": 40}


@pytest.fixture(scope="module")
def recorded() -> Any:
    return record_episode(QLMEnv(workload=FEW), make_planner(parse_planner("edf", {})), 5, np.random.default_rng(0))


def test_the_recorded_episode_is_the_planners_own(recorded: Any) -> None:
    """Operation by operation it ends as when the planner's whole plans are carried out."""
    env, planner = QLMEnv(workload=FEW), make_planner(parse_planner("edf", {}))
    _, info = env.reset(seed=5)
    planner.reset(env.view, np.random.default_rng(0))
    epochs = 0
    while "metrics" not in info:
        info = env.step_plan(planner.act(env.view))[-1]
        epochs += 1
    ours = recorded.metrics
    assert recorded.left_out == 0
    assert {n: v for n, v in ours.items() if n != "decisions"} == {
        n: v for n, v in info["metrics"].items() if n != "decisions"
    }
    demonstration = recorded.demonstration
    assert (demonstration.actions == 0).sum() == epochs
    assert len(demonstration) == ours["decisions"] > epochs
    assert demonstration.masks[np.arange(len(demonstration)), demonstration.actions].all()
    assert demonstration.rewards.sum() == pytest.approx(ours["episode_return"])


def test_returns_worked_out_by_hand(recorded: Any) -> None:
    demonstration = recorded.demonstration
    found = returns(demonstration, 0.9, 1.0)
    times = np.concatenate([[0.0], np.cumsum(demonstration.dt_s)[:-1]])
    scale = max(1.0, demonstration.dt_s.sum() * -np.log(0.9))
    for t in (0, 7, len(demonstration) - 1):
        expected = scale * float((0.9 ** (times[t:] - times[t]) * demonstration.rewards[t:]).sum())
        assert found[t] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_files_hold_what_was_written(recorded: Any, tmp_path: Path) -> None:
    path = tmp_path / "seed-5.npz"
    write_demonstration(path, recorded.demonstration)
    again = read_demonstration(path)
    np.testing.assert_array_equal(again.masks, recorded.demonstration.masks)
    np.testing.assert_array_equal(again.actions, recorded.demonstration.actions)
    for name, array in recorded.demonstration.observations.items():
        np.testing.assert_array_equal(again.observations[name], array)


def test_files_cut_short_are_refused(recorded: Any, tmp_path: Path) -> None:
    path = tmp_path / "seed-5.npz"
    write_demonstration(path, recorded.demonstration)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="cut short"):
        read_demonstration(path)
    with pytest.raises(ConfigError, match="no recorded episodes"):
        read_index(tmp_path)


def test_what_a_policy_of_fewer_actions_can_learn(recorded: Any) -> None:
    spaces = spaces_of(QLMEnv(workload=FEW).scenario)
    demonstration = recorded.demonstration
    placing = ActionSet(moves="new", hold=True, swaps="head", evict=False, warm_start=False)
    masks, usable = within(demonstration, placing, spaces)
    assert (masks <= demonstration.masks).all()
    assert masks[np.arange(len(masks)), demonstration.actions][usable].all()
    everything, all_usable = within(demonstration, ActionSet(), spaces)
    np.testing.assert_array_equal(everything, demonstration.masks)
    assert usable.sum() < all_usable.sum()


def test_minibatches_go_through_everything() -> None:
    drawn = batches(10, 3, np.random.default_rng(0))
    first = np.concatenate([next(drawn) for _ in range(3)])
    assert len(set(first.tolist())) == 9
    assert len(next(batches(2, 8, np.random.default_rng(0)))) == 2
