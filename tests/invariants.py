"""What must hold of a world at every instant, recomputed from scratch in plain Python.

Nothing here calls compiled code: counters that the engine keeps up to date step by step are summed anew from
the slots, and every list is walked link by link.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlm_env.backends.emulator.prefix_cache import NO_BLOCK, NO_KEY
from qlm_env.backends.emulator.state import GPU, HOST, NO_FINISH, PRIORITY, STORAGE
from qlm_env.dynamics import TTFT, World
from qlm_env.queueing.length_clusters import prompt_bucket
from qlm_env.requests import (
    FINISHED,
    MET,
    NOWHERE,
    PENDING,
    REJECTED,
    RUNNING,
    UNSETTLED,
    WAITING,
)


def _rows(records: NDArray[Any]) -> list[SimpleNamespace]:
    """Each record of shape (n,) as an object of plain Python values, a hundred times cheaper to read."""
    names = records.dtype.names or ()
    return [SimpleNamespace(**dict(zip(names, row, strict=True))) for row in records.tolist()]


@dataclass
class Past:
    """What earlier checks of the same episode saw."""

    now_s: float = 0.0
    generated: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    recomputed: list[int] = field(default_factory=list)


class Invariants:
    """The invariants of one episode; call :meth:`check` as often as you like.

    Args:
        commanded: requests are handed to the engine's own queue, through the backend contract, with the KV that host
            memory keeps of them; else only preempted ones are there, which have none.
    """

    def __init__(self, world: World, commanded: bool = False) -> None:
        self.world = world
        self.commanded = commanded
        self.past = Past()
        self._placement = [_rows(row) for row in world.fleet.placement]
        self._target_s = world.slo["target_s"].tolist()
        self._max_members = world.queues.kind["max_members"].tolist()

    def check(self) -> None:
        """Raise AssertionError where the world contradicts itself or its past."""
        world = self.world
        self.requests = _rows(world.requests)
        self.engines = _rows(world.fleet.engine)
        slots = world.fleet.slot.view(np.ndarray)
        self.slots = [_rows(slots[i, : engine.num_running]) for i, engine in enumerate(self.engines)]
        for placements, residencies in zip(self._placement, world.fleet.placement["residency"].tolist(), strict=True):
            for placement, residency in zip(placements, residencies, strict=True):
                placement.residency = residency
        self.groups = _rows(world.queues.group[: world.queues.tally[0].groups])
        self.queues = _rows(world.queues.queue)
        self.clock = _rows(world.clock)[0]
        self.place: dict[int, tuple[str, int]] = {}
        """Where each waiting or running request was found."""
        self.generated = [r.generated_tokens for r in self.requests]
        for i in range(len(self.engines)):
            self._check_batch(i)
            self._check_blocks(i)
            self._check_engine_queue(i)
            self._check_residency(i)
        self._check_groups()
        for i in range(len(self.queues)):
            self._check_virtual_queue(i)
        self._check_kinds()
        self._check_requests()
        self._check_outcomes()
        self._check_against_past()

    def _put(self, r: int, where: str, index: int) -> None:
        assert r not in self.place, f"request {r} in {self.place[r]} and in {where, index}"
        self.place[r] = (where, index)

    def _walk(self, head: int, rows: list[SimpleNamespace]) -> list[int]:
        found: list[int] = []
        while head != NOWHERE:
            found.append(head)
            assert len(found) <= len(rows), "a list runs in a circle"
            head = rows[head].next
        return found

    # ------------------------------------------------------------------- engines
    def _check_batch(self, i: int) -> None:
        engine, slots = self.engines[i], self.slots[i]
        block_size = self.world.fleet.block_size
        assert engine.num_running <= self.world.fleet.max_num_seqs
        if not engine.up:
            assert engine.num_running == engine.queue_length == 0
            assert engine.active_model == engine.pending_swap == engine.swap_target == NOWHERE
            assert engine.next_event_s == np.inf
        decodes = decode_kv = blocks = 0
        phase = [0] * block_size
        min_finish = NO_FINISH
        for index, slot in enumerate(slots):
            r = slot.request
            request = self.requests[r]
            self._put(r, "batch", i)
            assert request.state == RUNNING
            assert request.instance == i
            assert request.model == engine.active_model
            assert request.kv_host == NOWHERE
            if slot.finish_tick == NO_FINISH:
                computed = slot.kv_offset
                in_step = slot.chunk
                assert index >= engine.first_prefill
                assert slot.prefill_left == request.prompt_tokens + request.generated_tokens - computed
                assert slot.prefill_left > 0
                assert 0 <= slot.chunk <= slot.prefill_left
            else:
                computed = slot.kv_offset + engine.tick
                in_step = slot.chunk if engine.preempted else 1
                self.generated[r] = request.output_tokens - (slot.finish_tick - engine.tick)
                # The last token's KV is computed when it is fed back.
                assert computed == request.prompt_tokens + self.generated[r] - 1
                decodes += 1
                decode_kv += computed
                phase[-slot.kv_offset % block_size] += 1
                min_finish = min(min_finish, slot.finish_tick)
                assert slot.finish_tick > engine.tick
            assert computed >= 0
            blocks += -(-(computed + (in_step if engine.steps else 0)) // block_size)
        assert engine.decodes == decodes
        assert engine.decode_kv_tokens == decode_kv
        assert self.world.fleet.block_phase[i].tolist() == phase
        assert engine.min_finish_tick == min_finish
        factor_sum = sum(self.requests[slot.request].service_factor for slot in slots)
        assert math.isclose(engine.factor_sum, factor_sum, rel_tol=1e-9)
        if engine.active_model == NOWHERE:
            assert engine.free_blocks == blocks == 0
        else:
            assert engine.free_blocks == self._placement[i][engine.active_model].num_blocks - blocks
            assert engine.free_blocks >= 0
        if engine.steps > 0:
            assert slots
            assert engine.next_event_s >= self.clock.now_s
            assert engine.start_s <= self.clock.now_s

    def _check_blocks(self, i: int) -> None:
        """Every block of the prefix cache is free or held, and what can be found is what the blocks hold."""
        cache, engine = self.world.fleet.prefix_cache, self.engines[i]
        if cache is None or engine.active_model == NOWHERE:
            return
        blocks = _rows(cache.block[i])
        num_blocks = self._placement[i][engine.active_model].num_blocks
        free = []
        block = blocks[cache.num_blocks].next_free
        while block != cache.num_blocks:
            assert len(free) < num_blocks
            assert blocks[blocks[block].next_free].previous_free == block
            assert blocks[block].users == 0
            free.append(block)
            block = blocks[block].next_free
        users = [0] * num_blocks
        for slot in self.slots[i]:
            prefilling = slot.finish_tick == NO_FINISH
            computed = slot.kv_offset + (0 if prefilling else engine.tick)
            in_step = slot.chunk if prefilling or engine.preempted else 1
            count = -(-(computed + (in_step if engine.steps else 0)) // self.world.fleet.block_size)
            held = cache.held[i, slot.row, :count].tolist()
            assert len(set(held)) == count
            assert slot.cached_blocks <= count
            for block in held:
                users[block] += 1
        assert [blocks[block].users for block in range(num_blocks)] == users
        assert sorted(free) == [block for block in range(num_blocks) if users[block] == 0]
        assert len(free) == engine.free_blocks
        findable = []
        for entry in blocks:
            block = entry.found
            keys = set()
            while block != NO_BLOCK:
                findable.append(block)
                keys.add(blocks[block].key)
                block = blocks[block].next_same
            assert len(keys) <= 1
        assert sorted(findable) == [b for b in range(cache.num_blocks) if blocks[b].key != NO_KEY]

    def _check_engine_queue(self, i: int) -> None:
        engine = self.engines[i]
        queued = self._walk(engine.queue_head, self.requests)
        assert len(queued) == engine.queue_length
        assert engine.queue_tail == (queued[-1] if queued else NOWHERE)
        for r in queued:
            request = self.requests[r]
            self._put(r, "engine queue", i)
            assert request.state == WAITING
            assert request.instance == i
            assert request.model == engine.active_model
            assert request.computed_tokens == 0 or (self.commanded and request.kv_host == i)
        if self.world.fleet.scheduling_policy == PRIORITY:
            keys = [(self.requests[r].slo_class, self.requests[r].arrival_s, r) for r in queued]
            assert keys == sorted(keys)

    def _check_residency(self, i: int) -> None:
        engine, placements = self.engines[i], self._placement[i]
        host_bytes = 0.0
        for model, placement in enumerate(placements):
            assert (placement.residency == GPU) == (engine.active_model == model)
            if placement.residency == HOST:
                host_bytes += placement.weight_bytes
            if placement.residency != STORAGE or engine.swap_target == model or engine.stage_target == model:
                assert placement.num_blocks > 0, "a model is where it does not fit"
        if engine.stage_target != NOWHERE:
            assert placements[engine.stage_target].residency == STORAGE
            assert engine.stage_end_s >= self.clock.now_s
            host_bytes += placements[engine.stage_target].weight_bytes
        else:
            assert engine.stage_end_s == np.inf
        assert engine.host_used_bytes == host_bytes
        assert engine.host_used_bytes <= engine.host_memory_bytes
        if engine.swap_target != NOWHERE:
            assert engine.active_model == NOWHERE
            assert placements[engine.swap_target].residency == STORAGE
            assert engine.next_event_s >= self.clock.now_s
        assert engine.swaps == engine.warm_hits + engine.cold_starts
        kept = [request for request in self.requests if request.kv_host == i]
        kept_bytes = sum(r.computed_tokens * placements[r.model].kv_bytes_per_token for r in kept)
        assert engine.host_kv_used_bytes == kept_bytes
        assert engine.host_kv_used_bytes <= engine.host_kv_bytes

    # ------------------------------------------------------------------- queueing
    def _check_groups(self) -> None:
        queues = self.world.queues
        live = queues.live[: queues.tally[0].live].tolist()
        open_group = queues.kind["open_group"].tolist()
        members: dict[int, list[int]] = {g: [] for g in range(len(self.groups))}
        for r, request in enumerate(self.requests):
            if request.group != NOWHERE:
                members[request.group].append(r)
        for g, group in enumerate(self.groups):
            waiting = self._walk(group.head, self.requests)
            assert waiting == sorted(waiting), "a group is not first come first served"
            assert group.tail == (waiting[-1] if waiting else NOWHERE)
            for r in waiting:
                self._put(r, "group", g)
                assert self.requests[r].state == WAITING
                assert self.requests[r].instance == NOWHERE
                assert self.requests[r].group == g
            assert group.waiting == len(waiting)
            assert group.prompt_tokens == sum(self.requests[r].prompt_tokens for r in waiting)
            inside = [r for r in members[g] if self.requests[r].instance != NOWHERE]
            assert group.in_engine == len(inside)
            assert all(self.requests[r].instance == group.queue for r in inside)
            assert group.members == len(members[g])
            kinds = {(self.requests[r].model, self.requests[r].slo_class) for r in members[g]}
            assert kinds == {(group.model, group.slo_class)}
            if waiting or inside:
                assert live[group.live_index] == g
            else:
                assert group.live_index == NOWHERE
                assert g not in live
            assert (open_group[group.model][group.slo_class][group.cluster] == g) == (not group.closed)
            assert group.members <= self._max_members[group.model][group.slo_class][group.cluster]
            assert not (inside and not group.closed)
            assert group.queued == (bool(waiting) and group.queue != NOWHERE)
        assert len(set(live)) == len(live)

    def _check_virtual_queue(self, i: int) -> None:
        queue = self.queues[i]
        order = self._walk(queue.head, self.groups)
        for previous, g in zip([NOWHERE, *order], order, strict=False):
            group = self.groups[g]
            assert group.previous == previous
            assert group.queue == i
            assert group.queued
            assert self._placement[i][group.model].num_blocks > 0
        assert queue.tail == (order[-1] if order else NOWHERE)
        assert queue.groups == len(order)
        assert queue.waiting == sum(self.groups[g].waiting for g in order)
        assert set(order) == {g for g, group in enumerate(self.groups) if group.queued and group.queue == i}
        assert self.engines[i].up or not order

    def _check_kinds(self) -> None:
        _, num_classes, num_clusters = self.world.queues.kind.shape
        cluster = self.world.queues.lengths["cluster"]
        accepted: dict[int, list[SimpleNamespace]] = defaultdict(list)
        for request in self.requests:
            if request.state not in (PENDING, REJECTED):
                of_length = cluster[request.model, request.slo_class, prompt_bucket(request.prompt_tokens)]
                row = (request.model * num_classes + request.slo_class) * num_clusters + int(of_length)
                accepted[row].append(request)
        for k, kind in enumerate(_rows(self.world.queues.kind.reshape(-1))):
            output = [request.output_tokens for request in accepted[k] if request.state == FINISHED]
            assert kind.arrived == len(accepted[k])
            assert kind.finished == len(output)
            assert kind.output_tokens == sum(output)
            assert kind.output_tokens_squared == sum(o * o for o in output)

    # ------------------------------------------------------------------- requests
    def _check_requests(self) -> None:
        now_s = self.clock.now_s
        for r, request in enumerate(self.requests):
            assert (request.state == PENDING) == (r >= self.clock.next_arrival)
            assert (request.state in (WAITING, RUNNING)) == (r in self.place), f"request {r} is lost"
            assert (request.state == REJECTED) == bool(request.reject_reason and r < self.clock.next_arrival)
            assert 0 <= self.generated[r] <= request.output_tokens
            if request.state == PENDING:
                assert request.arrival_s >= now_s
                assert request.group == NOWHERE
            if request.state in (PENDING, REJECTED):
                assert self.generated[r] == 0
            if request.state == FINISHED:
                assert self.generated[r] == request.output_tokens
                assert request.instance == NOWHERE
                assert request.arrival_s <= request.first_scheduled_s < request.first_token_s
                assert request.first_token_s <= request.finish_s <= now_s
            else:
                assert math.isnan(request.finish_s)
            assert math.isnan(request.first_token_s) == (self.generated[r] == 0)
            if request.kv_host != NOWHERE:
                assert self.place[r][0] == "group" or (self.commanded and self.place[r][0] == "engine queue")
                assert self.groups[request.group].queue == request.kv_host
                assert 0 < request.computed_tokens < request.prompt_tokens + request.generated_tokens
            elif request.state == WAITING:
                assert request.computed_tokens == 0
        for name in ("evictions", "preemptions"):
            of_requests = sum(getattr(request, name) for request in self.requests)
            assert of_requests == sum(getattr(engine, name) for engine in self.engines)

    def met(self, request: Any) -> bool:
        """Whether a request has met its target, from its own times."""
        reached_s = request.first_token_s if self.world.slo_metric == TTFT else request.finish_s
        return bool(reached_s <= request.arrival_s + self._target_s[request.slo_class])

    def _check_outcomes(self) -> None:
        for request in self.requests:
            deadline_s = request.arrival_s + self._target_s[request.slo_class]
            if request.settled == UNSETTLED:
                assert request.state not in (FINISHED, REJECTED)
                assert deadline_s >= self.clock.now_s
            else:
                assert (request.settled == MET) == self.met(request)
        assert self.clock.settled == sum(request.settled != UNSETTLED for request in self.requests)
        assert self.clock.met == sum(request.settled == MET for request in self.requests)
        assert self.clock.finished == sum(request.state == FINISHED for request in self.requests)
        assert self.clock.rejected == sum(request.state == REJECTED for request in self.requests)

    def _check_against_past(self) -> None:
        past = self.past
        assert self.clock.now_s >= past.now_s
        settled = [request.settled for request in self.requests]
        recomputed = [request.recomputed_tokens for request in self.requests]
        for r, before in enumerate(past.generated):
            assert self.generated[r] >= before, f"request {r} lost generated tokens"
            # What a prefix cache still holds of what was lost is not computed again.
            assert recomputed[r] >= (0 if self.world.fleet.prefix_caching else past.recomputed[r])
            assert past.settled[r] in (UNSETTLED, settled[r]), f"request {r} settled twice"
        self.past = Past(self.clock.now_s, self.generated, settled, recomputed)
