"""A policy as a planner does what it does in the environments it was trained in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from planners import make_planner  # noqa: E402
from planners.learned.checkpoint import save_checkpoint  # noqa: E402
from planners.learned.evaluation import FIRST_SEED, HeldOut  # noqa: E402
from planners.learned.networks import likeliest, make_network  # noqa: E402
from planners.learned.planner import spaces_of  # noqa: E402
from planners.learned.spec import PolicySpec  # noqa: E402
from planners.spec import LearnedSpec  # noqa: E402
from qlm_env.env import QLMEnv  # noqa: E402
from qlm_env.presets import make_scenario  # noqa: E402
from qlm_env.preview import Preview  # noqa: E402
from qlm_env.spec import parse  # noqa: E402

FEW: dict[str, Any] = {"preset": "smoke", "num_requests": 30}

SETS: dict[str, dict[str, Any]] = {
    "placing": {"moves": "new", "hold": False, "swaps": "head", "evict": False, "warm_start": False},
    "holding": {"moves": "new", "hold": True, "swaps": "head", "evict": False, "warm_start": False},
    "everything": {},
}


@pytest.mark.parametrize("actions", SETS)
@pytest.mark.parametrize("kind", ["pointer", "mlp"])
def test_the_planner_acts_as_the_policy_does_in_training(tmp_path: Path, actions: str, kind: str) -> None:
    """Operations tried on a copy of the cluster lead where the environment's own steps lead."""
    scenario = make_scenario("smoke", FEW, environment={"max_actions_per_epoch": 5, "max_drain_s": 100.0})
    values = {"network": {"kind": kind}, "actions": SETS[actions], "spaces": spaces_of(scenario)}
    policy = parse(PolicySpec, values)
    torch.manual_seed(3)
    network = make_network(policy.network, policy.spaces)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3.0)
    save_checkpoint(tmp_path, policy, network, {})
    held_out = HeldOut(scenario, policy.actions, 2)
    expected = held_out.metrics(network)
    held_out.close()
    planner = make_planner(LearnedSpec(path=str(tmp_path)))
    for k, wanted in enumerate(expected):
        env = QLMEnv(
            "smoke", scenario.workload.model_dump(), environment=scenario.environment.model_dump() | {"strict": True}
        )
        _, info = env.reset(seed=FIRST_SEED + k)
        planner.reset(env.view, np.random.default_rng(0))
        while "metrics" not in info:
            info = env.step_plan(planner.act(env.view))[-1]
        # The planner gives all its operations as one decision.
        own = ("decisions",)
        assert {n: v for n, v in info["metrics"].items() if n not in own} == {
            n: v for n, v in wanted.items() if n not in own
        }
        assert planner.statistics()["choices"] > 5


def test_it_lives_through_failures(tmp_path: Path) -> None:
    failures = [{"instance": 0, "at_s": 3.0, "duration_s": 20.0}, {"instance": 1, "at_s": 5.0, "duration_s": 30.0}]
    cluster = {"instances": [{"device": "A100", "count": 2}], "failures": failures}
    environment = {"strict": True, "max_drain_s": 300.0}
    scenario = make_scenario(cluster, FEW, environment=environment)
    values = {"network": {"kind": "pointer"}, "actions": SETS["placing"], "spaces": spaces_of(scenario)}
    policy = parse(PolicySpec, values)
    save_checkpoint(tmp_path, policy, make_network(policy.network, policy.spaces), {})
    planner = make_planner(LearnedSpec(path=str(tmp_path), greedy=False))
    env = QLMEnv(cluster, FEW, environment=environment)
    _, info = env.reset(seed=0)
    planner.reset(env.view, np.random.default_rng(0))
    while "metrics" not in info:
        info = env.step_plan(planner.act(env.view))[-1]
    assert info["metrics"]["finished"] > 0


def test_trying_leaves_the_cluster_alone() -> None:
    env = QLMEnv(workload=FEW)
    env.reset(seed=0)
    preview = Preview(env.view)
    arrays = _arrays(env._world)
    before = [array.tobytes() for array in arrays]
    choice = preview.begin()
    np.testing.assert_array_equal(choice.action_mask.astype(bool), env.action_masks())
    lso, after = preview.take(int(np.flatnonzero(choice.action_mask)[1]))
    assert [array.tobytes() for array in arrays] == before
    observation, _, _, _, info = env.step(env.codec.encode(lso, env._panel.row_groups))
    np.testing.assert_array_equal(after.action_mask, info["action_mask"])
    for name, array in observation.items():
        np.testing.assert_array_equal(after.observation[name], array)


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    return [array for part in value for array in _arrays(part)] if isinstance(value, tuple) else []


def test_waiting_must_be_likelier_than_all_else_together() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.2, 0.3, 0.1], [0.6, 0.1, 0.2, 0.1], [0.4, 0.2, 0.3, 0.1]]))
    masks = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    assert likeliest(logits, masks).tolist() == [2, 0, 0]
    assert likeliest(logits[:1], torch.tensor([[True, False, False, False]])).tolist() == [0]
    assert likeliest(logits[:1], torch.tensor([[False, False, False, True]])).tolist() == [3]
