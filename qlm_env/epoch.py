"""A decision epoch: one operation is carried out or time passes, and the policy's panel is written anew.

All in one compiled call, because passing a world from Python to compiled code costs as much as the work.
"""

from __future__ import annotations

from qlm_env.compiled import inlined_and_compiled
from qlm_env.dynamics import World, advance, settle_rest_as_missed
from qlm_env.lso import ADVANCE, apply_lso, fill_action_mask
from qlm_env.observation import Panel, observe

ILLEGAL = -1


@inlined_and_compiled
def present(world: World, panel: Panel, horizon_s: float, only_advance: bool) -> None:
    """Fill the panel with the present state; at the horizon, what has no outcome has missed.

    Args:
        only_advance: nothing but ``advance`` is legal next.
    """
    if world.clock[0].now_s >= horizon_s:
        settle_rest_as_missed(world)
    observe(world, panel)
    fill_action_mask(world, panel.row_groups, only_advance, panel.action_mask)


@inlined_and_compiled
def decide(
    world: World,
    panel: Panel,
    verb: int,
    i: int,
    subject: int,
    option: int,
    until_s: float,
    stop_at_epoch: bool,
    horizon_s: float,
    only_advance: bool,
) -> int:
    """Carry out an operation, or let time pass if it is ``advance``; then fill the panel.

    Args:
        verb, i, subject, option: as given by ``Lso.code()``.
        until_s, stop_at_epoch: how far ``advance`` goes (:func:`qlm_env.dynamics.advance`).
        horizon_s: when the episode is cut off; what has no outcome by then has missed.
        only_advance: nothing but ``advance`` is legal next.

    Returns:
        ILLEGAL if the operation was not legal and nothing happened; else 0, or what ``advance`` returned.
    """
    outcome = 0
    if verb == ADVANCE:
        outcome = advance(world, min(until_s, horizon_s), stop_at_epoch)
    elif not apply_lso(world, verb, i, subject, option):
        outcome = ILLEGAL
    present(world, panel, horizon_s, only_advance)
    return outcome
