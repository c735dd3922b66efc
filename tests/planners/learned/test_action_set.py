"""Which actions a set leaves, against the same said in plain Python about LSO objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planners.learned.action_set import choose_from, make_layout, make_rules
from planners.learned.spec import ActionSet
from qlm_env.env import QLMEnv
from qlm_env.lso import Advance, Balance, Evict, Pull, SwapModel, WarmStart

SETS = {
    "all": ActionSet(),
    "new": ActionSet(moves="new", hold=False, swaps="head", evict=False, warm_start=False),
    "no_swaps": ActionSet(moves="new", swaps="none"),
    "no_hold": ActionSet(hold=False, swaps="head", warm_start=False),
}


def expected(env: QLMEnv, actions: ActionSet, info: dict[str, Any]) -> np.ndarray:
    """(n,) by looking at the cluster."""
    found = np.zeros(env.codec.num_actions, bool)
    queued = {g.id: g.queued for g in env.view.groups}
    placeable = False
    for action in np.flatnonzero(info["action_mask"]):
        match env.codec.decode(int(action), info["row_groups"]):
            case Advance():
                continue
            case Balance(group=g):
                found[action] = actions.moves == "all" or not queued[g]
                placeable |= bool(found[action]) and not queued[g]
            case Pull():
                found[action] = True
            case Evict():
                found[action] = actions.evict
            case SwapModel(instance=i, model=m):
                queue = env.view.instances[i].queue
                head = env.view.group(queue[0]).model if queue else None
                found[action] = actions.swaps == "all" or (actions.swaps == "head" and head == m)
            case WarmStart():
                found[action] = actions.warm_start
    found[0] = actions.hold or not placeable
    return found


@pytest.mark.parametrize("name", SETS)
def test_a_set_leaves_what_it_says(name: str) -> None:
    actions = SETS[name]
    env = QLMEnv("smoke", {"preset": "smoke", "num_requests": 40}, environment={"max_actions_per_epoch": 6})
    codec = env.codec
    layout = make_layout(codec.num_rows, codec.num_instances, codec.num_models, len(env.scenario.slo.classes))
    masks, forced = np.zeros((1, env.codec.num_actions), bool), np.zeros(1, bool)
    rng = np.random.default_rng(0)
    observation, info = env.reset(seed=3)
    seen_head_swap = False
    for _ in range(250):
        choose_from(
            make_rules(actions),
            layout,
            info["action_mask"][None],
            observation["groups"][None],
            masks,
            forced,
            np.zeros(env.codec.num_instances, np.int64),
        )
        wanted = expected(env, actions, info)
        np.testing.assert_array_equal(masks[0], wanted)
        assert forced[0] == (not wanted[1:].any())
        assert masks[0].any()
        swaps = slice(env.codec.verb_starts[4], env.codec.verb_starts[5])
        seen_head_swap |= bool(masks[0, swaps].any())
        # What the set leaves out happens as well, so that all states are met.
        legal = np.flatnonzero(info["action_mask"])
        observation, _, ended, cut_off, info = env.step(int(rng.choice(legal)))
        if ended or cut_off:
            observation, info = env.reset(seed=4)
    assert seen_head_swap == (actions.swaps != "none")
