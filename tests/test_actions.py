"""Operations as integers, as masks and as plans: three ways to the same rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_env.env import QLMEnv
from qlm_env.errors import InvalidActionError
from qlm_env.lso import VERB_NAMES, ActionCodec, Advance, Balance, Evict, Lso, Pull, SwapModel, WarmStart
from qlm_env.requests import NOWHERE
from tests.random_episodes import random_env, random_legal_action, random_requests

FEW: dict[str, Any] = {"preset": "smoke", "num_requests": 40}


def legal_by_the_rules(env: QLMEnv, lso: Lso) -> bool:
    """The table of docs/environment.md, from the views that planners read."""
    if isinstance(lso, Advance):
        return True
    view = env.view
    instance = view.instances[lso.instance]
    world = env._running_world()
    engine = world.fleet.engine[lso.instance]
    swapping = engine["swap_target"] != NOWHERE or engine["pending_swap"] != NOWHERE
    if not instance.up:
        return False
    if isinstance(lso, Balance):
        group = next((group for group in view.groups if group.id == lso.group), None)
        if group is None:
            return False
        return instance.fits(group.model) and (group.in_engine == 0 or group.instance == lso.instance)
    if isinstance(lso, Pull):
        head = instance.queue[:1]
        ready = bool(head) and view.group(head[0]).model == instance.active_model
        return ready and not world.auto_pull and engine["pending_swap"] == NOWHERE
    if isinstance(lso, Evict):
        head_group = instance.queue[0] if instance.queue else NOWHERE
        in_engine = [running.group for running in instance.running()]
        r = int(engine["queue_head"])
        in_engine += [int(world.requests[r].group)] if r != NOWHERE else []
        return (
            instance.active_model is not None
            and engine["pending_eviction"] == 0
            and any(group != head_group for group in in_engine)
            and (not lso.keep_kv or engine["host_kv_bytes"] > 0)
        )
    if isinstance(lso, SwapModel):
        return instance.fits(lso.model) and not swapping and instance.active_model != lso.model
    coming = (engine["swap_target"], engine["pending_swap"])
    placement = instance.placement(lso.model)
    return (
        instance.fits(lso.model)
        and placement["residency"] == 0
        and engine["stage_target"] == NOWHERE
        and lso.model not in coming
        and placement["weight_bytes"] <= engine["host_memory_bytes"]
    )


def test_the_mask_says_what_the_rules_say_about_every_action() -> None:
    seen = {(verb, legal): 0 for verb in VERB_NAMES for legal in (False, True)}
    for seed in range(25):
        rng = np.random.default_rng(seed)
        env = random_env(rng)
        _, info = env.start(random_requests(rng, env))
        for _ in range(40):
            exhausted = env._actions_this_epoch >= env.scenario.environment.max_actions_per_epoch
            for action, allowed in enumerate(info["action_mask"]):
                lso = env.codec.decode(action, info["row_groups"])
                legal = legal_by_the_rules(env, lso) and (not exhausted or isinstance(lso, Advance))
                assert bool(allowed) == legal, (seed, env.now_s, lso)
                seen[VERB_NAMES[lso.code()[0]], legal] += 1
            assert np.array_equal(env.action_masks(), info["action_mask"].astype(bool))
            action = int(rng.integers(env.codec.num_actions)) if rng.random() < 0.3 else random_legal_action(rng, env)
            allowed = info["action_mask"][action]
            info = env.step(action)[-1]
            if env.scenario.environment.decision_time.mode == "zero":
                assert info["invalid_action"] == (not allowed)
            if "metrics" in info:
                break
    assert all(count > 0 for key, count in seen.items() if key != ("advance", False)), seen
    assert seen["advance", False] == 0


@given(rows=st.integers(1, 9), instances=st.integers(1, 5), models=st.integers(1, 4), used=st.integers(0, 9))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_every_action_decodes_to_another_operation_and_back(rows: int, instances: int, models: int, used: int) -> None:
    codec = ActionCodec(rows, instances, models)
    row_groups = np.full(rows, NOWHERE, np.int32)
    row_groups[: min(used, rows)] = 50 + np.arange(min(used, rows))
    decoded = [codec.decode(action, row_groups) for action in range(codec.num_actions)]
    named = [(a, lso) for a, lso in enumerate(decoded) if not (isinstance(lso, Balance) and lso.group == NOWHERE)]
    assert len({lso for _, lso in named}) == len(named)
    assert all(codec.encode(lso, row_groups) == action for action, lso in named)
    assert len(decoded) - len(named) == 2 * instances * (rows - min(used, rows))
    for outside in (-1, codec.num_actions):
        with pytest.raises(ValueError, match=f"action {outside} is outside"):
            codec.decode(outside, row_groups)
    with pytest.raises(ValueError, match="group 7 has no row"):
        codec.encode(Balance(7, 0), row_groups)


def test_a_plan_and_its_actions_one_by_one_lead_to_the_same_world() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        by_plan, by_action = random_env(np.random.default_rng(seed)), random_env(np.random.default_rng(seed))
        if by_plan.scenario.environment.decision_time.mode != "zero":
            continue
        table = random_requests(rng, by_plan)
        _, info = by_plan.start(table.copy())
        by_action.start(table.copy())
        while "metrics" not in info:
            plan = [by_plan.codec.decode(random_legal_action(rng, by_plan), info["row_groups"])]
            expected = by_plan.step_plan(plan)
            for lso in (*plan, Advance()):
                if not (isinstance(lso, Advance) and isinstance(plan[0], Advance)) or lso is plan[0]:
                    actual = by_action.step(by_action.codec.encode(lso, info["row_groups"]))
            info = expected[-1]
            for name, array in expected[0].items():
                np.testing.assert_array_equal(actual[0][name], array)
            assert by_action.now_s == by_plan.now_s
            assert actual[2:4] == expected[2:4]
        assert by_action._return == pytest.approx(by_plan._return, abs=1e-12)


@pytest.mark.parametrize(
    "lso",
    [Balance(10**6, 0), Balance(-1, 0), Balance(0, 2), Pull(-1), Evict(99), SwapModel(0, 2), SwapModel(0, -1),
     SwapModel(2, 0), WarmStart(0, 7), WarmStart(-5, 0)],
)  # fmt: skip
def test_operations_on_what_does_not_exist_are_illegal(lso: Lso) -> None:
    env = QLMEnv(workload=FEW)
    env.reset(seed=0)
    assert not env.view.is_legal(lso)
    assert env.step_plan([lso])[-1]["invalid_action"]
    assert env.invalid_actions == 1


def test_illegal_actions_change_nothing_and_are_counted() -> None:
    env = QLMEnv(workload=FEW)
    observation, info = env.reset(seed=3)
    illegal = np.flatnonzero(info["action_mask"] == 0)[::7]
    for count, action in enumerate(illegal, 1):
        after, reward, terminated, truncated, info = env.step(int(action))
        assert (reward, terminated, truncated, info["dt"]) == (0.0, False, False, 0.0)
        assert info["invalid_action"]
        assert env.invalid_actions == count
        for name, array in observation.items():
            np.testing.assert_array_equal(after[name], array)


def test_in_strict_mode_an_illegal_action_is_an_error_and_the_episode_goes_on() -> None:
    env = QLMEnv(workload=FEW, environment={"strict": True, "max_actions_per_epoch": 2})
    _, info = env.reset(seed=3)
    illegal = int(np.flatnonzero(info["action_mask"] == 0)[0])
    for _ in range(4):
        with pytest.raises(InvalidActionError, match=r"^balance is not legal at t=") as caught:
            env.step(illegal)
        assert "\n" not in str(caught.value)
    assert env.action_masks().nonzero()[0].tolist() == [0]
    assert not env.step(0)[-1]["invalid_action"]


@pytest.mark.parametrize("action", [np.int64(0), np.int32(0), np.array(0), True])
def test_whole_numbers_of_any_type_are_actions(action: Any) -> None:
    env = QLMEnv(workload=FEW)
    env.reset(seed=0)
    env.step(action)


@pytest.mark.parametrize("action", [0.0, np.float64(1), np.array([0, 1]), "0", None, [0], -1, 143])
def test_anything_else_is_one_clear_line(action: Any) -> None:
    env = QLMEnv(workload=FEW)
    env.reset(seed=0)
    with pytest.raises(InvalidActionError, match="action") as caught:
        env.step(action)
    assert "\n" not in str(caught.value)
