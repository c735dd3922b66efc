"""The fleet's arrays as a picture of real servers: what happened on them, written down in order.

The servers' side (:mod:`.instance`) lives in a thread of its own and tells of everything by an :class:`Effect`. The
arrays change only here, when the backend's caller lets time pass, so that they never change under a reader and never
run ahead of the events that the caller was told.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from qlm_env.backends.base import BackendEvent, EventKind
from qlm_env.backends.emulator import commands
from qlm_env.backends.emulator.state import HOST, NEVER, NO_FINISH, STORAGE, Fleet
from qlm_env.backends.vllm import books
from qlm_env.requests import FINISHED, NOWHERE, RUNNING, WAITING, RequestTable


class EffectKind(IntEnum):
    """What can happen on the servers' side."""

    ADMITTED = 0
    """A request went from the engine's queue to the server."""
    TOKENS = 1
    """It has ``value`` output tokens now."""
    RECOMPUTED = 2
    """The KV of ``value`` of its tokens was thought to be there and was not."""
    FINISHED = 3
    EVICTED = 4
    """It left the batch, and the KV of ``value`` tokens is kept."""
    LEFT = 5
    """It left the engine's queue, where it waited."""
    LOST = 6
    """It left the batch because its server failed."""
    MODEL_READY = 7
    WARM_READY = 8
    WARM_FAILED = 9
    """A warm start came to nothing."""
    WARM_LOST = 10
    """The server of a model in host memory has died."""
    PREEMPTED = 11
    """The server counts ``value`` more preemptions."""
    DOWN = 12
    UP = 13


class Effect(NamedTuple):
    """One thing that happened at an instance."""

    kind: EffectKind
    time_s: float
    """``time.monotonic()``"""
    instance: int
    subject: int = NOWHERE
    """A request or a model."""
    value: int = 0


_EVENTS = {
    EffectKind.FINISHED: EventKind.FINISHED,
    EffectKind.EVICTED: EventKind.RETURNED,
    EffectKind.LEFT: EventKind.RETURNED,
    EffectKind.LOST: EventKind.RETURNED,
    EffectKind.MODEL_READY: EventKind.MODEL_READY,
    EffectKind.WARM_READY: EventKind.WARM_READY,
    EffectKind.DOWN: EventKind.DOWN,
    EffectKind.UP: EventKind.UP,
}

NEWS = frozenset(_EVENTS)
"""The effects that the backend's caller is told of."""


class Mirror:
    """One episode's arrays.

    Args:
        start_s: ``time.monotonic()`` of time 0.
    """

    def __init__(self, fleet: Fleet, requests: RequestTable, start_s: float) -> None:
        self.fleet = fleet
        self.requests = requests
        self.run = commands.make_run(fleet, requests)
        self._start_s = start_s
        num_instances = len(fleet.engine)
        self.failures_heard = [0] * num_instances
        """(I,) how many failures of each instance are written down"""
        self._booked_s = np.zeros(num_instances)
        """(I,) when the swap under way is expected to end"""
        self._counted_s = np.zeros(num_instances)
        """(I,) up to when busy time and KV use are counted"""
        self._started = np.zeros(len(requests), bool)
        """(N,) whether the request has brought a token since it entered its batch"""

    # ------------------------------------------------------------------- commands
    def command(self, verb: int, i: int, subject: int, now_s: float) -> bool:
        """Book a command of :mod:`qlm_env.backends.emulator.commands`; returns whether it is allowed."""
        clock = self.run.clock[0]
        clock.now_s = now_s
        allowed = bool(commands.command(self.run, verb, i, subject, 0))
        clock.events = 0
        return allowed

    def swap(self, i: int, model: int, now_s: float) -> None:
        """Book the start of a swap that is allowed."""
        self._count(i, now_s)
        books.begin_swap(self.fleet, i, model, now_s)
        self._booked_s[i] = self.fleet.engine["next_event_s"][i]

    def residency(self, i: int) -> list[int]:
        """(M,) where each model's weights are."""
        return [int(value) for value in self.fleet.placement["residency"][i]]

    # ------------------------------------------------------------------- effects
    def apply(self, effect: Effect) -> BackendEvent | None:
        """Write an effect down; returns what the caller has to be told of it."""
        time_s = max(0.0, effect.time_s - self._start_s)
        i, subject, kind = effect.instance, effect.subject, effect.kind
        engine, requests = self.fleet.engine[i], self.requests
        self._count(i, time_s)
        if kind == EffectKind.ADMITTED:
            self._admit(i, subject, time_s)
        elif kind == EffectKind.TOKENS:
            self._take_tokens(i, subject, effect.value, time_s)
        elif kind == EffectKind.RECOMPUTED:
            requests["recomputed_tokens"][subject] += effect.value
        elif kind == EffectKind.FINISHED:
            self._leave_batch(i, subject)
            requests["state"][subject] = FINISHED
            requests["finish_s"][subject] = time_s
        elif kind in (EffectKind.EVICTED, EffectKind.LOST):
            self._return(i, subject, effect)
        elif kind == EffectKind.LEFT:
            books.leave_queue(self.fleet, requests, i, subject)
            requests["instance"][subject] = NOWHERE
        elif kind == EffectKind.MODEL_READY:
            engine.swapping_s += time_s - self._booked_s[i]
            books.end_swap(self.fleet, i, subject, time_s)
        elif kind == EffectKind.WARM_READY:
            books.end_staging(self.fleet, i, time_s)
        elif kind == EffectKind.WARM_FAILED:
            engine.host_used_bytes -= self.fleet.placement["weight_bytes"][i, subject]
            engine.stage_target, engine.stage_end_s = NOWHERE, NEVER
        elif kind == EffectKind.WARM_LOST:
            if self.fleet.placement["residency"][i, subject] == HOST:
                self.fleet.placement["residency"][i, subject] = STORAGE
                engine.host_used_bytes -= self.fleet.placement["weight_bytes"][i, subject]
        elif kind == EffectKind.PREEMPTED:
            engine.preemptions += effect.value
        elif kind == EffectKind.DOWN:
            self.failures_heard[i] += 1
            self.discard_kept(i)
            if engine.swap_target != NOWHERE:
                engine.next_event_s = self._booked_s[i]
            books.power_off(self.fleet, i, time_s)
        elif kind == EffectKind.UP:
            engine.up = 1
        return BackendEvent(_EVENTS[kind], time_s, i, subject) if kind in _EVENTS else None

    def pass_time(self, now_s: float) -> None:
        """Count busy time up to now, and move expected ends that have passed."""
        engine = self.fleet.engine
        for i in range(len(engine)):
            self._count(i, now_s)
        for name in ("next_event_s", "stage_end_s"):
            engine[name] = np.maximum(engine[name], now_s)

    # ------------------------------------------------------------------- the batch
    def _admit(self, i: int, r: int, time_s: float) -> None:
        engine, request = self.fleet.engine[i], self.requests[r]
        books.leave_queue(self.fleet, self.requests, i, r)
        request.state = RUNNING
        if math.isnan(request.first_scheduled_s):
            request.first_scheduled_s = time_s
        if request.kv_host != NOWHERE:
            kept_bytes = self._kv_bytes(i, r, int(request.computed_tokens))
            engine.host_kv_used_bytes -= kept_bytes
            engine.kv_swapped_bytes += kept_bytes
            request.kv_host = NOWHERE
        # Until a token shows that the prompt is computed, what was restored is all there is.
        place = self.fleet.slot[i, engine.num_running]
        place.request = r
        place.finish_tick = NO_FINISH
        place.kv_offset = request.computed_tokens
        place.prefill_left = request.prompt_tokens + request.generated_tokens - request.computed_tokens
        request.computed_tokens = 0
        self._started[r] = False
        engine.num_running += 1
        engine.free_blocks -= self._blocks(r)
        self._note_first_prefill(i)

    def _take_tokens(self, i: int, r: int, generated: int, time_s: float) -> None:
        engine, request = self.fleet.engine[i], self.requests[r]
        if math.isnan(request.first_token_s):
            request.first_token_s = time_s
        engine.free_blocks += self._blocks(r)
        request.generated_tokens = generated
        engine.free_blocks -= self._blocks(r)
        place = self.fleet.slot[i, self._slot(i, r)]
        place.finish_tick = engine.tick + request.output_tokens - generated
        place.kv_offset = request.prompt_tokens + generated - 1 - engine.tick
        place.prefill_left = 0
        if not self._started[r]:
            self._started[r] = True
            self._note_first_prefill(i)

    def _return(self, i: int, r: int, effect: Effect) -> None:
        """An unfinished request leaves the batch."""
        engine, request = self.fleet.engine[i], self.requests[r]
        request.computed_tokens = self.fleet.slot["kv_offset"][i, self._slot(i, r)]
        self._leave_batch(i, r)
        request.state = WAITING
        if effect.kind == EffectKind.EVICTED:
            request.evictions += 1
            engine.evictions += 1
        if effect.value > 0:
            request.computed_tokens = effect.value
            request.kv_host = i
            kept_bytes = self._kv_bytes(i, r, effect.value)
            engine.host_kv_used_bytes += kept_bytes
            engine.kv_swapped_bytes += kept_bytes
        else:
            books.lose_kv(self.requests, r)

    def _leave_batch(self, i: int, r: int) -> None:
        engine, slots = self.fleet.engine[i], self.fleet.slot[i]
        engine.free_blocks += self._blocks(r)
        slot = self._slot(i, r)
        slots[slot : engine.num_running - 1] = slots[slot + 1 : engine.num_running].copy()
        engine.num_running -= 1
        self.requests["instance"][r] = NOWHERE
        self._note_first_prefill(i)

    def _slot(self, i: int, r: int) -> int:
        running = self.fleet.slot["request"][i, : self.fleet.engine["num_running"][i]]
        return int(np.flatnonzero(running == r)[0])

    def _note_first_prefill(self, i: int) -> None:
        engine = self.fleet.engine[i]
        running = self.fleet.slot["finish_tick"][i, : engine.num_running]
        prefilling = np.flatnonzero(running == NO_FINISH)
        engine.first_prefill = prefilling[0] if len(prefilling) else engine.num_running

    # ------------------------------------------------------------------- amounts
    def _blocks(self, r: int) -> int:
        """KV blocks of a request in a batch."""
        return num_blocks(self.requests, r, self.fleet.block_size)

    def _kv_bytes(self, i: int, r: int, tokens: int) -> float:
        return tokens * float(self.fleet.placement["kv_bytes_per_token"][i, self.requests["model"][r]])

    def discard_kept(self, i: int, models: Collection[int] | None = None) -> None:
        """Book that kept KV of these models, or of all, is gone."""
        for r in np.flatnonzero(self.requests["kv_host"] == i):
            if models is None or self.requests["model"][r] in models:
                books.discard_kv(self.fleet, self.requests, int(r))

    def _count(self, i: int, time_s: float) -> None:
        """Busy time and KV use since they were last counted."""
        engine = self.fleet.engine[i]
        elapsed_s = max(0.0, time_s - self._counted_s[i])
        if engine.num_running > 0:
            engine.busy_s += elapsed_s
            used = self.fleet.placement["num_blocks"][i, engine.active_model] - engine.free_blocks
            engine.kv_block_s += elapsed_s * used
        self._counted_s[i] = max(time_s, self._counted_s[i])


def num_blocks(requests: RequestTable, r: int, block_size: int) -> int:
    """KV blocks that a request's input takes, tokens generated so far included."""
    return -(-int(requests["prompt_tokens"][r] + requests["generated_tokens"][r]) // block_size)


def rehearse(fleet: Fleet, requests: RequestTable) -> None:
    """Call every compiled function that commands need, so that none is compiled while servers wait for it.

    Args:
        fleet, requests: (N > 0,) of an episode that is thrown away.
    """
    run = commands.make_run(fleet, requests)
    for verb in (commands.PULL, commands.WARM_START, commands.RECOVER):
        commands.command(run, verb, 0, 0, 0)
    commands.has_room(run, 0, 0)
    books.can_swap(fleet, 0, 0)
    books.leave_queue(fleet, requests, 0, 0)
    books.lose_kv(requests, 0)
    books.discard_kv(fleet, requests, 0)
    books.begin_swap(fleet, 0, 0, 0.0)
    books.end_swap(fleet, 0, 0, 0.0)
    books.end_staging(fleet, 0, 0.0)
    books.power_off(fleet, 0, 0.0)
