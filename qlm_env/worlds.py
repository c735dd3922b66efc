"""Many worlds of one scenario in one set of arrays, so that one compiled call serves them all.

A stack is a :class:`~qlm_env.dynamics.World` whose arrays have one axis more, in front: the world. Every episode of a
scenario has as many requests as the others, so a world is a slice of the stack, and to compiled functions it is of the
same type as a world that stands alone. What episodes only read (failures, prefixes) is there once, and no
event log is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from qlm_env.backends.emulator.prefix_cache import PrefixCache
from qlm_env.backends.emulator.state import Fleet
from qlm_env.compiled import inlined
from qlm_env.dynamics import World
from qlm_env.queueing.groups import Queues

SHARED = ("failures", "log", "ids")
"""Arrays without the axis of worlds."""

T = TypeVar("T")


def _each_array(change: Callable[[np.ndarray], Any], part: T, field: str = "") -> T:
    """``part``, a tuple with names, with ``change(array)`` for every array in it that is not shared."""
    values: Any = part
    if isinstance(values, np.ndarray):
        return part if field in SHARED else change(values)
    if isinstance(values, tuple):
        names = type(values)._fields  # type: ignore[attr-defined]
        changed: Any = type(values)(
            *(_each_array(change, value, name) for name, value in zip(names, values, strict=True))
        )
        return changed  # type: ignore[no-any-return]
    return part


def _arrays(world: World) -> list[np.ndarray]:
    """The arrays that are not shared, in a fixed order."""
    found: list[np.ndarray] = []
    _each_array(found.append, world)
    return found


def copy_world(world: World) -> World:
    """A world of its own in the same state; it keeps no log."""

    def copied(array: np.ndarray) -> np.ndarray:
        same = np.empty_like(array, subok=True)
        # As bytes: NumPy copies records field by field, twenty times slower.
        same.view(np.ndarray).reshape(-1).view(np.uint8)[:] = array.view(np.ndarray).reshape(-1).view(np.uint8)
        return same

    return _each_array(copied, world)._replace(logging=False)


class WorldStack:
    """Room for ``num_worlds`` worlds like ``world``, which is put nowhere yet."""

    def __init__(self, world: World, num_worlds: int) -> None:
        def stacked(array: np.ndarray) -> np.ndarray:
            return np.zeros((num_worlds, *array.shape), array.dtype).view(type(array))

        self.worlds: World = _each_array(stacked, world)
        """For compiled functions, which take world ``k`` with :func:`slice_world`."""
        self.rows = self._bytes_of_worlds()
        """The same arrays as (N, bytes) each."""

    def put(self, k: int, world: World) -> None:
        """Copy a world into place ``k``. :attr:`worlds` is a new one where its requests need longer lists of blocks."""
        cache, stacked = world.fleet.prefix_cache, self.worlds.fleet.prefix_cache
        if cache is not None and stacked is not None and cache.held.shape[-1] != stacked.held.shape[-1]:
            length = max(cache.held.shape[-1], stacked.held.shape[-1])
            if length > stacked.held.shape[-1]:
                self.worlds = _with_lists_of(length, self.worlds)
                self.rows = self._bytes_of_worlds()
            world = _with_lists_of(length, world)
        for rows, array in zip(self.rows, _arrays(world), strict=True):
            rows[k] = array.view(np.ndarray).reshape(-1).view(np.uint8)

    def at(self, k: int) -> World:
        """World ``k``: views, for Python."""
        return _each_array(lambda array: array[k], self.worlds)

    def _bytes_of_worlds(self) -> list[np.ndarray]:
        """The arrays as (N, bytes): NumPy copies records field by field, twenty times slower."""
        return [array.view(np.ndarray).reshape(len(array), -1).view(np.uint8) for array in _arrays(self.worlds)]


def _with_lists_of(request_blocks: int, world: World) -> World:
    """``world`` (or a stack) with room for so many blocks of each request in its prefix cache, more than it has."""
    cache = world.fleet.prefix_cache
    if cache is None or cache.held.shape[-1] >= request_blocks:
        return world
    held = np.zeros((*cache.held.shape[:-1], request_blocks), cache.held.dtype)
    held[..., : cache.held.shape[-1]] = cache.held
    return world._replace(fleet=world.fleet._replace(prefix_cache=cache._replace(held=held)))


@inlined
def _slice_cache(cache: PrefixCache | None, k: int) -> PrefixCache | None:
    if cache is None:
        return None
    return PrefixCache(cache.block[k], cache.held[k], cache.ids, cache.num_blocks, cache.id_tokens)


@inlined
def slice_world(worlds: World, k: int) -> World:
    """World ``k`` of a stack: views, for compiled functions."""
    fleet, queues = worlds.fleet, worlds.queues
    return World(
        worlds.requests[k],
        Fleet(
            fleet.engine[k],
            fleet.slot[k],
            fleet.block_phase[k],
            fleet.placement[k],
            _slice_cache(fleet.prefix_cache, k),
            fleet.max_num_seqs,
            fleet.max_num_batched_tokens,
            fleet.block_size,
            fleet.chunked_prefill,
            fleet.scheduling_policy,
            fleet.async_scheduling,
            fleet.prefix_caching,
        ),
        Queues(queues.group[k], queues.queue[k], queues.live[k], queues.kind[k], queues.lengths[k], queues.tally[k]),
        worlds.clock[k],
        worlds.failures,
        worlds.log,
        worlds.slo[k],
        worlds.class_rows[k],
        worlds.finished[k],
        worlds.slo_metric,
        worlds.auto_pull,
        worlds.logging,
    )
