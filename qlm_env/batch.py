"""Steps of many worlds in one compiled call: what :class:`~qlm_env.env.QLMEnv` does for one of them in Python.

The worlds are a stack (:mod:`qlm_env.worlds`), the panels likewise; calls on different worlds of it may run at the
same time in several threads. A world's episode, beyond what the world itself knows, is one record.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.compiled import compiled, inlined, kernel
from qlm_env.dynamics import World, advance, settle_rest_as_missed
from qlm_env.epoch import ILLEGAL, decide
from qlm_env.lso import ADVANCE, decode_action, fill_action_mask
from qlm_env.observation import Panel, observe
from qlm_env.requests import Int, Records
from qlm_env.worlds import slice_world

BEGIN = -1
"""In place of an action: the world has just been put into the stack, and time passes to its first arrival."""

EPISODE_DTYPE = np.dtype(
    [
        ("horizon_s", "f8"),  # when the episode is cut off
        ("episode_return", "f8"),
        ("costs_charged", "f8"),
        ("actions_this_epoch", "i8"),
        ("decisions", "i8"),
        ("invalid_actions", "i8"),
        # Of the last step.
        ("reward", "f8"),
        ("dt_s", "f8"),
        ("now_s", "f8"),
        ("invalid", "i1"),
        ("terminated", "i1"),
        ("truncated", "i1"),
    ],
    align=True,
)


class Rules(NamedTuple):
    """What the environment's settings say about steps."""

    decision_interval_s: float
    max_actions_per_epoch: int
    thinking: bool
    """A step begins with the policy's thinking time, ``thinking_s``."""
    thinking_s: float
    swap_cost: float
    eviction_cost: float


class Scratch(NamedTuple):
    """Working memory of the panels, one row per thread. T threads, N requests."""

    order: Int
    """(T, N)"""
    urgency: NDArray[np.float64]
    """(T, N)"""


@inlined
def _slice_panel(panels: Panel, k: int, scratch: Scratch, thread: int) -> Panel:
    return Panel(
        panels.groups[k],
        panels.group_mask[k],
        panels.instances[k],
        panels.instance_mask[k],
        panels.cluster[k],
        panels.row_groups[k],
        panels.action_mask[k],
        scratch.order[thread],
        scratch.urgency[thread],
    )


@kernel
def _think(world: World, thinking_s: float, horizon_s: float) -> None:
    """The policy's thinking time passes in the cluster."""
    advance(world, min(world.clock[0].now_s + thinking_s, horizon_s), False)
    if world.clock[0].now_s >= horizon_s:
        settle_rest_as_missed(world)


@inlined
def _new_costs(engine: Records, episode: Records, rules: Rules) -> float:
    """Costs of the operations that have begun since this was last asked."""
    if rules.swap_cost == 0.0 and rules.eviction_cost == 0.0:
        return 0.0
    swaps = 0
    evictions = 0
    for i in range(len(engine)):
        swaps += engine[i].swaps
        evictions += engine[i].evictions
    total = rules.swap_cost * swaps + rules.eviction_cost * evictions
    new = total - episode.costs_charged
    episode.costs_charged = total
    return new


@inlined
def _step(world: World, panel: Panel, episode: Records, rules: Rules, action: int) -> None:
    """One action in one world, as ``QLMEnv.step`` takes it; BEGIN is what ``QLMEnv.start`` does."""
    clock = world.clock[0]
    before_s = clock.now_s
    num_instances, num_models = world.fleet.placement.shape
    verb, i, subject, option = decode_action(action, panel.row_groups, num_instances, num_models)
    until_s = world.requests[0].arrival_s
    invalid = False
    if action != BEGIN:
        episode.decisions += 1
        if rules.thinking:
            _think(world, rules.thinking_s, episode.horizon_s)
        until_s = clock.now_s + rules.decision_interval_s
        exhausted = episode.actions_this_epoch >= rules.max_actions_per_epoch
        invalid = exhausted and verb != ADVANCE
        if exhausted:
            verb = ADVANCE
        episode.actions_this_epoch = 0 if verb == ADVANCE else episode.actions_this_epoch + 1
    only_advance = episode.actions_this_epoch >= rules.max_actions_per_epoch
    outcome = decide(world, panel, verb, i, subject, option, until_s, True, episode.horizon_s, only_advance)
    episode.now_s = clock.now_s
    episode.dt_s = clock.now_s - before_s
    if action == BEGIN:
        # What was settled by now is part of the first step's reward.
        return
    invalid = invalid or outcome == ILLEGAL
    episode.invalid = invalid
    episode.invalid_actions += invalid
    episode.terminated = clock.finished + clock.rejected == len(world.requests)
    episode.truncated = not episode.terminated and clock.now_s >= episode.horizon_s
    episode.reward = clock.reward - _new_costs(world.fleet.engine, episode, rules)
    clock.reward = 0.0
    episode.episode_return += episode.reward


@compiled
def step_worlds(
    worlds: World,
    panels: Panel,
    episodes: Records,
    rules: Rules,
    scratch: Scratch,
    actions: NDArray[np.int64],
    chosen: NDArray[np.int64],
    thread: int,
) -> None:
    """Take one action in each of the worlds ``chosen``.

    Args:
        panels: what the policies saw, of which ``row_groups`` is read; filled with what they see next.
        episodes: (N,) EPISODE_DTYPE; zero but for ``horizon_s`` where the action is BEGIN.
        actions: (N,) each within the action space, or BEGIN.
        thread: the row of ``scratch`` that no other call uses.
    """
    for k in chosen:
        _step(slice_world(worlds, k), _slice_panel(panels, k, scratch, thread), episodes[k], rules, actions[k])


@compiled
def look_at_worlds(
    worlds: World, panels: Panel, episodes: Records, rules: Rules, scratch: Scratch, seen: NDArray[np.int64]
) -> None:
    """Fill the panels of the worlds ``seen``, in which nothing happens."""
    for k in seen:
        world = slice_world(worlds, k)
        only_advance = episodes[k].actions_this_epoch >= rules.max_actions_per_epoch
        panel = _slice_panel(panels, k, scratch, 0)
        observe(world, panel)
        fill_action_mask(world, panel.row_groups, only_advance, panel.action_mask)


@compiled
def choose_legal(action_mask: NDArray[np.int8], uniform: NDArray[np.float64], actions: NDArray[np.int64]) -> None:
    """Write one legal action of each row into ``actions``.

    Args:
        action_mask: (N, n) 1 for what is legal; a row without any gives 0, which is ``advance``.
        uniform: (N,) numbers in [0, 1): where among its row's legal actions the action stands.
    """
    for k in range(len(actions)):
        mask = action_mask[k]
        legal = 0
        for a in range(len(mask)):
            legal += mask[a]
        left = int(uniform[k] * legal)
        actions[k] = 0
        for a in range(len(mask)):
            left -= mask[a]
            if left < 0:
                actions[k] = a
                break
