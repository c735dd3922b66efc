"""LLM serving operations: the vocabulary, what is legal when, and the flat action codec.

Planners hand over :data:`Lso` objects; learned policies an integer of ``Discrete(n)``. Both end in
:func:`apply_lso`, and :func:`is_legal` is the one place that says what is allowed.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qlm_env.backends.emulator.residency import can_swap, can_warm_start, fits
from qlm_env.backends.emulator.state import EVICT_DROP, EVICT_KEEP, NO_EVICTION
from qlm_env.compiled import inlined, inlined_and_compiled
from qlm_env.dynamics import World, balance, stage
from qlm_env.queueing.virtual_queues import can_place
from qlm_env.requests import NOWHERE, Int

ADVANCE, BALANCE, PULL, EVICT, SWAP_MODEL, WARM_START = range(6)
VERB_NAMES = ("advance", "balance", "pull", "evict", "swap_model", "warm_start")


@dataclass(frozen=True)
class Advance:
    """Let time pass to the next decision epoch."""

    def code(self) -> tuple[int, int, int, int]:
        return ADVANCE, 0, 0, 0


@dataclass(frozen=True)
class Balance:
    """Put a waiting group at the front or back of an instance's virtual queue; moves it if it is in one."""

    group: int
    instance: int
    front: bool = False

    def code(self) -> tuple[int, int, int, int]:
        return BALANCE, self.instance, self.group, int(self.front)


@dataclass(frozen=True)
class Pull:
    """Let requests of the head group enter the batch while there is room (only without ``auto_pull``)."""

    instance: int

    def code(self) -> tuple[int, int, int, int]:
        return PULL, self.instance, 0, 0


@dataclass(frozen=True)
class Evict:
    """Running requests that are not of the head group go back to their groups, their KV kept on the host or dropped."""

    instance: int
    keep_kv: bool = True

    def code(self) -> tuple[int, int, int, int]:
        return EVICT, self.instance, 0, int(self.keep_kv)


@dataclass(frozen=True)
class SwapModel:
    """Replace the active model once nothing runs any more."""

    instance: int
    model: int

    def code(self) -> tuple[int, int, int, int]:
        return SWAP_MODEL, self.instance, self.model, 0


@dataclass(frozen=True)
class WarmStart:
    """Stage a model's weights from storage to host memory in the background."""

    instance: int
    model: int

    def code(self) -> tuple[int, int, int, int]:
        return WARM_START, self.instance, self.model, 0


Lso: TypeAlias = Advance | Balance | Pull | Evict | SwapModel | WarmStart


# --------------------------------------------------------------------------- legality and effect
@inlined
def _has_evictable(world: World, i: int) -> bool:
    """Whether something not of the head group is in the engine."""
    head = world.queues.queue[i].head
    engine = world.fleet.engine[i]
    for slot in range(engine.num_running):
        if world.requests[world.fleet.slot[i, slot].request].group != head:
            return True
    return bool(engine.queue_head != NOWHERE and world.requests[engine.queue_head].group != head)


@inlined_and_compiled
def is_legal(world: World, verb: int, i: int, subject: int, option: int) -> bool:
    """Whether the operation is allowed in the present state.

    Args:
        verb, i, subject, option: as given by ``Lso.code()``: instance; group or model; front or keep_kv. What does
            not exist is never legal.
    """
    if verb == ADVANCE:
        return True
    num_instances, num_models = world.fleet.placement.shape
    if not 0 <= i < num_instances:
        return False
    engine = world.fleet.engine[i]
    if not engine.up:
        return False
    if verb == BALANCE:
        if not 0 <= subject < world.queues.tally[0].groups:
            return False
        group = world.queues.group[subject]
        return group.live_index != NOWHERE and can_place(world.queues, subject, i) and fits(world.fleet, i, group.model)
    if verb == PULL:
        head = world.queues.queue[i].head
        return (
            not world.auto_pull
            and head != NOWHERE
            and engine.pending_swap == NOWHERE
            and world.queues.group[head].model == engine.active_model
        )
    if verb == EVICT:
        return (
            engine.active_model != NOWHERE
            and engine.pending_eviction == NO_EVICTION
            and (not option or engine.host_kv_bytes > 0)
            and _has_evictable(world, i)
        )
    if not 0 <= subject < num_models:
        return False
    if verb == SWAP_MODEL:
        return can_swap(world.fleet, i, subject)
    return can_warm_start(world.fleet, i, subject)


@inlined_and_compiled
def apply_lso(world: World, verb: int, i: int, subject: int, option: int) -> bool:
    """Carry out an operation if it is legal. It takes no time; engines act on it when time next passes.

    Returns:
        whether it was legal.
    """
    if not is_legal(world, verb, i, subject, option):
        return False
    if verb == BALANCE:
        balance(world, subject, i, option != 0)
    elif verb == PULL:
        world.queues.queue[i].pull_requested = 1
    elif verb == EVICT:
        world.fleet.engine[i].pending_eviction = EVICT_KEEP if option else EVICT_DROP
    elif verb == SWAP_MODEL:
        world.fleet.engine[i].pending_swap = subject
    elif verb == WARM_START:
        stage(world, i, subject)
    return True


# --------------------------------------------------------------------------- the flat codec
@dataclass(frozen=True)
class ActionCodec:
    """Integers of ``Discrete(n)`` for every (verb, target), with groups named by their observation row.

    Layout, in order: ``advance``; ``balance`` by row, instance, back/front; ``pull`` by instance;
    ``evict`` by instance, KV dropped/kept; ``swap_model`` by instance, model; ``warm_start`` likewise.
    """

    num_rows: int
    num_instances: int
    num_models: int

    @property
    def num_actions(self) -> int:
        """``n`` of the action space."""
        return self.verb_starts[-1]

    @cached_property
    def verb_starts(self) -> tuple[int, ...]:
        """The first action of each verb, and the end of the last."""
        balances = 2 * self.num_rows * self.num_instances
        models = self.num_instances * self.num_models
        sizes = (1, balances, self.num_instances, 2 * self.num_instances, models, models)
        return tuple(accumulate(sizes, initial=0))

    def encode(self, lso: Lso, row_groups: NDArray[np.int32]) -> int:
        """The action of an operation.

        Args:
            row_groups: (G,) group id of each observation row, as in ``info["row_groups"]``.

        Raises:
            ValueError: the group stands in no row of its own.
        """
        verb, instance, subject, option = lso.code()
        start = self.verb_starts[verb]
        if verb == ADVANCE:
            return start
        if verb == BALANCE:
            rows = np.flatnonzero(row_groups == subject)
            if len(rows) != 1:
                raise ValueError(f"group {subject} has no row of its own in this observation")
            return start + (int(rows[0]) * self.num_instances + instance) * 2 + option
        if verb == PULL:
            return start + instance
        if verb == EVICT:
            return start + 2 * instance + option
        return start + instance * self.num_models + subject

    def decode(self, action: int, row_groups: NDArray[np.int32]) -> Lso:
        """The operation of an action; a row without a group decodes to group NOWHERE, which is never legal.

        Raises:
            ValueError: the action is outside ``[0, num_actions)``.
        """
        if not 0 <= action < self.num_actions:
            raise ValueError(f"action {action} is outside 0..{self.num_actions - 1}")
        verb = bisect_right(self.verb_starts, action) - 1
        rest = action - self.verb_starts[verb]
        if verb == ADVANCE:
            return Advance()
        if verb == BALANCE:
            target, front = divmod(rest, 2)
            row, instance = divmod(target, self.num_instances)
            return Balance(int(row_groups[row]), instance, bool(front))
        if verb == PULL:
            return Pull(rest)
        if verb == EVICT:
            return Evict(rest // 2, bool(rest % 2))
        instance, model = divmod(rest, self.num_models)
        return SwapModel(instance, model) if verb == SWAP_MODEL else WarmStart(instance, model)


@inlined
def decode_action(action: int, row_groups: Int, num_instances: int, num_models: int) -> tuple[int, int, int, int]:
    """``ActionCodec.decode(action, row_groups).code()`` for compiled functions; the action is within the space."""
    rest = action - 1
    if rest < 0:
        return ADVANCE, 0, 0, 0
    if rest < 2 * len(row_groups) * num_instances:
        target = rest // 2
        return BALANCE, target % num_instances, row_groups[target // num_instances], rest % 2
    rest -= 2 * len(row_groups) * num_instances
    if rest < num_instances:
        return PULL, rest, 0, 0
    rest -= num_instances
    if rest < 2 * num_instances:
        return EVICT, rest // 2, 0, rest % 2
    rest -= 2 * num_instances
    if rest < num_instances * num_models:
        return SWAP_MODEL, rest // num_models, rest % num_models, 0
    rest -= num_instances * num_models
    return WARM_START, rest // num_models, rest % num_models, 0


@inlined
def fill_action_mask(world: World, row_groups: Int, only_advance: bool, mask: NDArray[np.int8]) -> None:
    """Write 1 for every legal action into ``mask``, shape (n,), in the codec's layout, 0 elsewhere.

    Args:
        row_groups: (G,) group id of each observation row, NOWHERE for rows without a group of their own.
        only_advance: no action but ``advance`` is legal (the epoch's action limit is reached).
    """
    mask[:] = 0
    mask[0] = 1
    if only_advance:
        return
    num_instances, num_models = world.fleet.placement.shape
    a = 1
    for row in range(len(row_groups)):
        g = row_groups[row]
        for i in range(num_instances):
            if g != NOWHERE and is_legal(world, BALANCE, i, g, 0):
                mask[a] = 1
                mask[a + 1] = 1
            a += 2
    for i in range(num_instances):
        mask[a] = is_legal(world, PULL, i, 0, 0)
        a += 1
    for i in range(num_instances):
        for keep in range(2):
            mask[a] = is_legal(world, EVICT, i, 0, keep)
            a += 1
    for verb in (SWAP_MODEL, WARM_START):
        for i in range(num_instances):
            for model in range(num_models):
                mask[a] = is_legal(world, verb, i, model, 0)
                a += 1
