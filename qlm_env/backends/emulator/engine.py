"""Continuous batching as vLLM V1 does it, leaping over decode steps.

One step: running requests first, each taking its next token or prefill chunk out of the token budget and
the blocks it needs, the last admitted (or least urgent) preempted when blocks run out; then, unless something
was preempted, waiting requests while budget, batch slots and blocks for their whole input allow.
Between two events the batch decodes unchanged, so the engine schedules once and leaps: many engine steps
at once, whose end time has a closed form (:mod:`.latency`).

Life of a leap: :func:`begin_step` (running requests), :func:`try_admit` for each candidate, both again while
:func:`must_reschedule`, :func:`end_step` (fixes the length and the end time), then at that time :func:`finish_leap`.
:func:`interrupt` shortens a running leap, so that something new can be considered at its end; :func:`catch_up`
commits the whole steps done by now without ending it.

**Async scheduling.** vLLM decides each step when the one before it begins, so the decision neither sees what arrives
meanwhile nor can use the slots and blocks of requests that finish with that step. Here it is made when the step before
has ended, from what was known when it began: arrivals after ``known_s`` are turned away, and requests that finished
stay in their slots until the decision is made (:func:`reap`). If it finds nothing to run, as vLLM then waits for the
step to end, it is made again from what is known now.
"""

from __future__ import annotations

from qlm_env.backends.emulator.engine_queue import enqueue
from qlm_env.backends.emulator.latency import step_time_s, steps_time_s, whole_steps_within
from qlm_env.backends.emulator.prefix_cache import (
    cache_full_blocks,
    give_back,
    hit_blocks,
    hit_blocks_in_use,
    take_free,
    take_hits,
)
from qlm_env.backends.emulator.state import NEVER, NO_FINISH, PRIORITY, Fleet
from qlm_env.compiled import compiled, inlined, kernel
from qlm_env.requests import FINISHED, NOWHERE, RUNNING, WAITING, Int, RequestTable


# --------------------------------------------------------------------------- blocks
@kernel
def blocks_for(tokens: int, block_size: int) -> int:
    """KV blocks that hold ``tokens``."""
    return (tokens + block_size - 1) // block_size


@inlined
def _blocks_over(fleet: Fleet, i: int, first_tick: int, steps: int) -> int:
    """Blocks the decoding slots need in ``steps`` steps from ``first_tick`` on.

    A decode needs a block once every ``block_size`` steps, so only the remainder has to be added up.
    """
    cycles = steps // fleet.block_size
    total = cycles * fleet.engine[i].decodes
    phase = first_tick % fleet.block_size
    for _ in range(steps - cycles * fleet.block_size):
        total += fleet.block_phase[i, phase]
        phase = phase + 1 if phase + 1 < fleet.block_size else 0
    return total


@inlined
def _steps_with_blocks(fleet: Fleet, i: int, first_tick: int, limit: int) -> int:
    """The most steps, at most ``limit``, the decoding slots can take from ``first_tick`` with the free blocks."""
    free = fleet.engine[i].free_blocks
    decodes = fleet.engine[i].decodes
    if decodes == 0 or limit // fleet.block_size * decodes + decodes <= free:
        return limit
    cycles = free // decodes
    steps = cycles * fleet.block_size
    free -= cycles * decodes
    while steps < limit:
        free -= fleet.block_phase[i, (first_tick + steps) % fleet.block_size]
        if free < 0:
            break
        steps += 1
    return min(steps, limit)


@inlined
def _take_blocks(fleet: Fleet, i: int, slot: int, held: int, count: int) -> None:
    """Give the request in ``slot``, which holds ``held`` blocks, ``count`` more."""
    fleet.engine[i].free_blocks -= count
    if fleet.prefix_caching:
        take_free(fleet.prefix_cache, i, fleet.slot[i, slot].row, held, count)


@inlined
def _give_blocks_back(fleet: Fleet, i: int, slot: int, held: int) -> None:
    """Free the ``held`` blocks of the request in ``slot``."""
    if fleet.prefix_caching:
        held = give_back(fleet.prefix_cache, i, fleet.slot[i, slot].row, held)
    fleet.engine[i].free_blocks += held


@inlined
def _take_decode_blocks(fleet: Fleet, i: int, first_tick: int, steps: int) -> None:
    """Take the blocks that the decoding slots need in ``steps`` steps from ``first_tick`` on."""
    if not fleet.prefix_caching:
        fleet.engine[i].free_blocks -= _blocks_over(fleet, i, first_tick, steps)
        return
    for tick in range(first_tick, first_tick + steps):
        if fleet.block_phase[i, tick % fleet.block_size] == 0:
            continue
        for slot in range(fleet.engine[i].num_running):
            place = fleet.slot[i, slot]
            decodes = place.finish_tick != NO_FINISH and place.finish_tick > fleet.engine[i].tick
            if decodes and (place.kv_offset + tick) % fleet.block_size == 0:
                _take_blocks(fleet, i, slot, (place.kv_offset + tick) // fleet.block_size, 1)


# --------------------------------------------------------------------------- slots
@inlined
def _has_finished(fleet: Fleet, i: int, slot: int) -> bool:
    """Whether the slot's request is done, and holds the slot only for the decision on the next step."""
    return bool(fleet.slot[i, slot].finish_tick <= fleet.engine[i].tick)


@inlined
def slot_computed_tokens(fleet: Fleet, i: int, slot: int) -> int:
    """Cached tokens of a slot, not counting the step in progress."""
    place = fleet.slot[i, slot]
    if place.finish_tick == NO_FINISH:
        return place.kv_offset
    return place.kv_offset + fleet.engine[i].tick


@compiled
def slot_generated_tokens(fleet: Fleet, requests: RequestTable, i: int, slot: int) -> int:
    """Output tokens produced so far by the request in a slot."""
    place = fleet.slot[i, slot]
    request = requests[place.request]
    if place.finish_tick == NO_FINISH:
        return request.generated_tokens
    return request.output_tokens - (place.finish_tick - fleet.engine[i].tick)


@inlined
def _start_decoding(fleet: Fleet, i: int, slot: int, computed: int, left: int) -> None:
    """The slot has ``computed`` cached tokens and will produce ``left`` more, one each tick from now."""
    engine = fleet.engine[i]
    place = fleet.slot[i, slot]
    place.kv_offset = computed - engine.tick
    place.finish_tick = engine.tick + left
    place.prefill_left = 0
    fleet.block_phase[i, -place.kv_offset % fleet.block_size] += 1
    engine.min_finish_tick = min(engine.min_finish_tick, place.finish_tick)
    engine.decodes += 1
    engine.decode_kv_tokens += computed


@inlined
def _take_out(fleet: Fleet, requests: RequestTable, i: int, slot: int) -> int:
    """Take a slot out of the batch's books; returns its cached tokens. Blocks and order are the caller's."""
    engine = fleet.engine[i]
    place = fleet.slot[i, slot]
    request = requests[place.request]
    computed = slot_computed_tokens(fleet, i, slot)
    request.generated_tokens = slot_generated_tokens(fleet, requests, i, slot)
    if place.finish_tick != NO_FINISH:
        fleet.block_phase[i, -place.kv_offset % fleet.block_size] -= 1
        engine.decodes -= 1
        engine.decode_kv_tokens -= computed
    # An empty batch starts again from an exact zero, whatever rounding the sum has seen.
    last = engine.num_running - engine.leaving <= 1
    engine.factor_sum = 0.0 if last else engine.factor_sum - request.service_factor
    return computed


@kernel
def _vacate(fleet: Fleet, i: int, slot: int, held: int) -> None:
    """Free the slot and its ``held`` blocks; the slots behind it move up, in order of admission."""
    engine = fleet.engine[i]
    _give_blocks_back(fleet, i, slot, held)
    engine.num_running -= 1
    if slot < engine.first_prefill:
        engine.first_prefill -= 1
    for s in range(slot, engine.num_running):
        _move_up(fleet, i, s + 1, s)


@inlined
def _move_up(fleet: Fleet, i: int, slot: int, free: int) -> None:
    """Move a request to a free slot before its own, which is free then and has the other's row of blocks."""
    row = fleet.slot[i, free].row
    fleet.slot[i, free] = fleet.slot[i, slot]
    fleet.slot[i, slot].row = row


@kernel
def release(fleet: Fleet, requests: RequestTable, i: int, slot: int, allocated_ahead: int) -> int:
    """Take the request in ``slot`` out of the batch and free its blocks.

    The request is WAITING afterwards, with its cached tokens in ``computed_tokens``; what becomes of them
    (kept or dropped) is the caller's decision. The other slots keep their order of admission.

    Args:
        allocated_ahead: tokens beyond the cached ones for which this step already took blocks.

    Returns:
        the request.
    """
    engine = fleet.engine[i]
    place = fleet.slot[i, slot]
    r = place.request
    decoding = place.finish_tick != NO_FINISH
    computed = _take_out(fleet, requests, i, slot)
    if fleet.prefix_caching:
        known = computed + allocated_ahead
        if engine.lagging and decoding:
            # The token of the step in progress has not been seen; if none was before, the one fed to it has.
            known = max(known - 1, computed if engine.fresh else 0)
        cache_full_blocks(fleet.prefix_cache, requests, i, place, known, fleet.block_size)
    _vacate(fleet, i, slot, blocks_for(computed + allocated_ahead, fleet.block_size))
    engine.min_finish_tick = NO_FINISH
    for s in range(engine.num_running):
        if not _has_finished(fleet, i, s):
            engine.min_finish_tick = min(engine.min_finish_tick, fleet.slot[i, s].finish_tick)
    requests[r].computed_tokens = computed
    requests[r].state = WAITING
    return r


@kernel
def drop_kv(requests: RequestTable, r: int) -> None:
    """The request's cached tokens are gone and will be computed again."""
    request = requests[r]
    request.recomputed_tokens += request.computed_tokens
    request.lost_tokens = request.computed_tokens
    request.computed_tokens = 0
    request.kv_host = NOWHERE


# --------------------------------------------------------------------------- one step
@kernel
def _preempt(fleet: Fleet, requests: RequestTable, i: int, slot: int, allocated_ahead: int) -> None:
    """Back to the engine's queue, KV dropped, as vLLM preempts.

    vLLM does not spare a request whose last token is on its way: it loses its blocks a step early.
    """
    engine = fleet.engine[i]
    r = fleet.slot[i, slot].request
    requests[r].preemptions += 1
    engine.preemptions += 1
    engine.preempted = 1
    if _has_finished(fleet, i, slot):
        _vacate(fleet, i, slot, blocks_for(fleet.slot[i, slot].kv_offset, fleet.block_size))
        engine.leaving -= 1
        return
    release(fleet, requests, i, slot, allocated_ahead)
    drop_kv(requests, r)
    enqueue(fleet, requests, i, r, True)


@kernel
def _victim(fleet: Fleet, requests: RequestTable, i: int) -> int:
    """The slot vLLM preempts: the last admitted, or under ``priority`` the first of the least urgent."""
    last = fleet.engine[i].num_running - 1
    if fleet.scheduling_policy != PRIORITY:
        return last
    victim = 0
    for slot in range(1, last + 1):
        a = requests[fleet.slot[i, victim].request]
        b = requests[fleet.slot[i, slot].request]
        if b.slo_class > a.slo_class or (b.slo_class == a.slo_class and b.arrival_s > a.arrival_s):
            victim = slot
    return victim


@inlined
def _grow(fleet: Fleet, requests: RequestTable, i: int, slot: int, computed: int, tokens: int) -> None:
    """Take the blocks for ``tokens`` more in ``slot``; of a prefill what they fill is cached at once, as in vLLM."""
    held = blocks_for(computed, fleet.block_size)
    _take_blocks(fleet, i, slot, held, blocks_for(computed + tokens, fleet.block_size) - held)
    place = fleet.slot[i, slot]
    if fleet.prefix_caching and place.finish_tick == NO_FINISH:
        cache_full_blocks(fleet.prefix_cache, requests, i, place, computed + tokens, fleet.block_size)


@kernel
def _schedule_short_of_blocks(fleet: Fleet, requests: RequestTable, i: int) -> None:
    """The running part of a step when blocks do not suffice: request by request, preempting as needed.

    When nothing could be scheduled there is no step and no tick; see :func:`must_reschedule`.
    """
    engine = fleet.engine[i]
    slot = 0
    stuck = False
    while slot < engine.num_running and engine.token_budget > 0:
        if _has_finished(fleet, i, slot):
            slot += 1
            continue
        place = fleet.slot[i, slot]
        tokens = min(place.prefill_left, engine.token_budget) if place.finish_tick == NO_FINISH else 1
        computed = slot_computed_tokens(fleet, i, slot)
        needed = blocks_for(computed + tokens, fleet.block_size) - blocks_for(computed, fleet.block_size)
        while needed > engine.free_blocks and not stuck:
            victim = _victim(fleet, requests, i)
            stuck = victim == slot
            ahead = 0
            if victim < slot:
                ahead = fleet.slot[i, victim].chunk
                engine.token_budget += ahead
                slot -= 1
            _preempt(fleet, requests, i, victim, ahead)
        if stuck:
            break
        _grow(fleet, requests, i, slot, computed, tokens)
        engine.token_budget -= tokens
        fleet.slot[i, slot].chunk = tokens
        slot += 1
    for idle in range(slot, engine.num_running):
        fleet.slot[i, idle].chunk = 0


@kernel
def begin_step(fleet: Fleet, requests: RequestTable, i: int, now_s: float) -> None:
    """Schedule the running requests: every decode takes a token, then the prefill in progress a chunk.

    At most one prefill is in progress, and it is last: it took all the budget of the step that admitted it.
    """
    engine = fleet.engine[i]
    if not engine.lagging:
        engine.known_s = now_s
    engine.preempted = 0
    engine.turned_away = 0
    engine.restored_tokens = 0
    engine.token_budget = fleet.max_num_batched_tokens
    needed = fleet.block_phase[i, engine.tick % fleet.block_size]
    chunk = 0
    prefills = engine.first_prefill < engine.num_running
    if prefills:
        place = fleet.slot[i, engine.first_prefill]
        chunk = min(place.prefill_left, fleet.max_num_batched_tokens - engine.decodes)
        needed += blocks_for(place.kv_offset + chunk, fleet.block_size)
        needed -= blocks_for(place.kv_offset, fleet.block_size)
        place.chunk = chunk
    if needed > engine.free_blocks:
        _schedule_short_of_blocks(fleet, requests, i)
    else:
        _take_decode_blocks(fleet, i, engine.tick, 1)
        if prefills:
            _grow(fleet, requests, i, engine.first_prefill, fleet.slot[i, engine.first_prefill].kv_offset, chunk)
        engine.token_budget -= engine.decodes + chunk


@inlined
def reap(fleet: Fleet, i: int) -> None:
    """The decision that requests which finished held slots and blocks for is made, or will not be: free them."""
    engine = fleet.engine[i]
    engine.lagging = 0
    if engine.leaving == 0:
        return
    kept = 0
    prefills_from = engine.first_prefill
    for slot in range(engine.num_running):
        if not _has_finished(fleet, i, slot):
            if kept < slot:
                _move_up(fleet, i, slot, kept)
            kept += 1
            continue
        _give_blocks_back(fleet, i, slot, blocks_for(fleet.slot[i, slot].kv_offset, fleet.block_size))
        if slot < prefills_from:
            engine.first_prefill -= 1
    engine.num_running = kept
    engine.leaving = 0


@inlined
def must_reschedule(fleet: Fleet, i: int) -> bool:
    """Nothing could be scheduled, but may be at once: after a preemption, or with what is known by now."""
    engine = fleet.engine[i]
    if engine.token_budget < fleet.max_num_batched_tokens:
        return False
    if engine.lagging:
        reap(fleet, i)
        return True
    return bool(engine.preempted)


@inlined
def input_blocks(fleet: Fleet, requests: RequestTable, r: int) -> int:
    """KV blocks of a waiting request's whole input, tokens generated so far included."""
    return blocks_for(requests[r].prompt_tokens + requests[r].generated_tokens, fleet.block_size)


@inlined
def whole_input_fits(fleet: Fleet, requests: RequestTable, i: int, r: int) -> bool:
    """vLLM admits only what has free blocks for its whole input (``scheduler_reserve_full_isl``)."""
    needed = input_blocks(fleet, requests, r)
    if needed > fleet.engine[i].free_blocks and fleet.prefix_caching:
        hits = hit_blocks(fleet.prefix_cache, requests, i, r, fleet.block_size)
        needed -= hit_blocks_in_use(fleet.prefix_cache, requests, i, r, hits, fleet.block_size)
    return bool(needed <= fleet.engine[i].free_blocks)


@kernel
def try_admit(fleet: Fleet, requests: RequestTable, i: int, r: int) -> bool:
    """Admit a waiting request to the step being scheduled, with its KV restored if this host kept it.

    Returns:
        whether there was room; if not, nothing changed.
    """
    engine = fleet.engine[i]
    if not _admit(fleet, requests, i, r):
        engine.turned_away = 1
        return False
    return True


@kernel
def _admit(fleet: Fleet, requests: RequestTable, i: int, r: int) -> bool:
    engine = fleet.engine[i]
    request = requests[r]
    slot = engine.num_running
    if engine.preempted or slot >= fleet.max_num_seqs or engine.token_budget <= 0:
        return False
    if request.arrival_s > engine.known_s or not whole_input_fits(fleet, requests, i, r):
        return False
    restored = request.computed_tokens if request.kv_host == i else 0
    hits = 0
    if fleet.prefix_caching and restored == 0:
        hits = hit_blocks(fleet.prefix_cache, requests, i, r, fleet.block_size)
    computed = restored + hits * fleet.block_size
    left = request.prompt_tokens + request.generated_tokens - computed
    if not fleet.chunked_prefill and left > engine.token_budget:
        return False
    chunk = min(left, engine.token_budget)
    engine.token_budget -= chunk
    if restored > 0:
        engine.restored_tokens += restored
        engine.host_kv_used_bytes -= restored * fleet.placement[i, engine.active_model].kv_bytes_per_token
        request.kv_host = NOWHERE
        request.computed_tokens = 0
    request.recomputed_tokens -= min(request.lost_tokens, hits * fleet.block_size)
    request.lost_tokens = 0

    place = fleet.slot[i, slot]
    place.request = r
    place.chunk = chunk
    place.finish_tick = NO_FINISH
    place.kv_offset = computed
    place.prefill_left = left
    place.cached_blocks = 0
    if fleet.prefix_caching:
        free_before = hits - hit_blocks_in_use(fleet.prefix_cache, requests, i, r, hits, fleet.block_size)
        take_hits(fleet.prefix_cache, requests, i, place, hits, fleet.block_size)
        engine.free_blocks -= free_before
    _take_blocks(fleet, i, slot, hits, blocks_for(computed + chunk, fleet.block_size) - hits)
    if fleet.prefix_caching:
        cache_full_blocks(fleet.prefix_cache, requests, i, place, computed + chunk, fleet.block_size)
    engine.num_running += 1
    engine.factor_sum += request.service_factor
    if request.generated_tokens > 0 and left == 1:
        _start_decoding(fleet, i, slot, computed, request.output_tokens - request.generated_tokens)
        if engine.first_prefill == slot:
            engine.first_prefill = slot + 1
    request.state = RUNNING
    request.instance = i
    if request.first_scheduled_s != request.first_scheduled_s:
        request.first_scheduled_s = engine.known_s
    return True


@kernel
def end_step(fleet: Fleet, requests: RequestTable, i: int, now_s: float) -> None:
    """Start the leap: as many steps as the batch can take unchanged, dated by the latency model.

    A step that prefills, restores KV or follows a preemption is taken alone, as the next schedule differs.
    """
    engine = fleet.engine[i]
    # What the decision could not use, or did not know of, may admit something to the step after this one.
    alone = engine.preempted != 0 or engine.restored_tokens > 0 or (engine.lagging and engine.turned_away)
    engine.fresh = not engine.lagging
    reap(fleet, i)
    if engine.num_running == 0:
        engine.next_event_s = NEVER
        return
    placement = fleet.placement[i, engine.active_model]
    decodes = engine.decodes
    kv_tokens = engine.decode_kv_tokens
    attention = 0.0
    for slot in range(engine.first_prefill, engine.num_running):
        place = fleet.slot[i, slot]
        if place.finish_tick == NO_FINISH:
            alone = True
            attention += place.chunk * (place.kv_offset + 0.5 * place.chunk)
    if engine.preempted:
        for slot in range(engine.first_prefill):
            if fleet.slot[i, slot].chunk == 0:
                decodes -= 1
                kv_tokens -= slot_computed_tokens(fleet, i, slot)
    factor = engine.factor_sum / engine.num_running
    new_tokens = fleet.max_num_batched_tokens - engine.token_budget
    first_s = factor * step_time_s(placement, new_tokens, decodes, kv_tokens, attention)
    if engine.restored_tokens > 0:
        restored_bytes = engine.restored_tokens * placement.kv_bytes_per_token
        first_s += restored_bytes / placement.kv_swap_bytes_per_s
        engine.kv_swapped_bytes += restored_bytes
    steps = 1
    if not alone:
        until_finish = engine.min_finish_tick - engine.tick
        steps = 1 + _steps_with_blocks(fleet, i, engine.tick + 1, until_finish - 1)
    engine.start_s = now_s
    engine.step_s = first_s
    engine.growth_s = factor * placement.c3 * decodes
    engine.steps = steps
    engine.next_event_s = now_s + steps_time_s(first_s, engine.growth_s, steps)


# --------------------------------------------------------------------------- the leap
@kernel
def interrupt(fleet: Fleet, i: int, now_s: float) -> None:
    """End the running leap with the step in progress at ``now_s``, or the next one if that is decided already."""
    engine = fleet.engine[i]
    if engine.steps <= 1:
        return
    done = whole_steps_within(engine.step_s, engine.growth_s, now_s - engine.start_s, engine.steps)
    boundary_now = engine.start_s + steps_time_s(engine.step_s, engine.growth_s, done) >= now_s
    steps = done if boundary_now else done + 1
    steps = steps + 1 if fleet.async_scheduling else max(1, steps)
    if steps < engine.steps:
        engine.steps = steps
        engine.next_event_s = engine.start_s + steps_time_s(engine.step_s, engine.growth_s, steps)


@inlined
def _advance_ticks(fleet: Fleet, i: int, steps: int, seconds: float) -> None:
    """Books of ``steps`` steps: caches grow by a token a step, blocks beyond the first step's are taken."""
    engine = fleet.engine[i]
    _take_decode_blocks(fleet, i, engine.tick + 1, steps - 1)
    engine.kv_block_s += (fleet.placement[i, engine.active_model].num_blocks - engine.free_blocks) * seconds
    engine.busy_s += seconds
    engine.tick += steps
    engine.decode_kv_tokens += steps * engine.decodes


@kernel
def catch_up(fleet: Fleet, i: int, now_s: float) -> None:
    """Commit the whole steps of the leap that ended by ``now_s``; the step in progress goes on."""
    engine = fleet.engine[i]
    if engine.steps <= 1:
        return
    done = whole_steps_within(engine.step_s, engine.growth_s, now_s - engine.start_s, engine.steps - 1)
    if done > 0:
        engine.fresh = 0
        elapsed = steps_time_s(engine.step_s, engine.growth_s, done)
        _advance_ticks(fleet, i, done, elapsed)
        # The step in progress holds its blocks, as the first step of every leap does.
        _take_decode_blocks(fleet, i, engine.tick, 1)
        engine.start_s += elapsed
        engine.step_s += done * engine.growth_s
        engine.steps -= done


@kernel
def _hold_back_unscheduled(fleet: Fleet, i: int) -> None:
    """Decodes that the preempting step now ending left out did not advance: shift them against the tick."""
    engine = fleet.engine[i]
    engine.min_finish_tick = NO_FINISH
    for slot in range(engine.num_running):
        place = fleet.slot[i, slot]
        if place.chunk == 0 and place.finish_tick != NO_FINISH:
            fleet.block_phase[i, -place.kv_offset % fleet.block_size] -= 1
            place.kv_offset -= 1
            place.finish_tick += 1
            fleet.block_phase[i, -place.kv_offset % fleet.block_size] += 1
            engine.decode_kv_tokens -= 1
        engine.min_finish_tick = min(engine.min_finish_tick, place.finish_tick)


@kernel
def finish_leap(fleet: Fleet, requests: RequestTable, i: int, finished: Int) -> int:
    """Commit the leap that ends now: tokens, first tokens, finished requests.

    Args:
        finished: shape (S,), filled with the requests that finished, in order of admission.

    Returns:
        how many finished.
    """
    engine = fleet.engine[i]
    now_s = engine.next_event_s
    running = engine.num_running
    if fleet.async_scheduling:
        engine.lagging = 1
        engine.fresh = engine.fresh and engine.steps == 1
        engine.known_s = engine.start_s + steps_time_s(engine.step_s, engine.growth_s, engine.steps - 1)
    _advance_ticks(fleet, i, engine.steps, now_s - engine.start_s)
    if engine.preempted:
        _hold_back_unscheduled(fleet, i)
    for slot in range(engine.first_prefill, running):
        place = fleet.slot[i, slot]
        if place.finish_tick != NO_FINISH:
            continue
        place.kv_offset += place.chunk
        place.prefill_left -= place.chunk
        if place.prefill_left == 0:
            request = requests[place.request]
            if request.first_token_s != request.first_token_s:
                request.first_token_s = now_s
            request.generated_tokens += 1
            _start_decoding(fleet, i, slot, place.kv_offset, request.output_tokens - request.generated_tokens)
    count = 0
    if engine.min_finish_tick <= engine.tick:
        engine.min_finish_tick = NO_FINISH
        for slot in range(running):
            place = fleet.slot[i, slot]
            if place.finish_tick > engine.tick:
                engine.min_finish_tick = min(engine.min_finish_tick, place.finish_tick)
                continue
            request = requests[place.request]
            # Kept out of the books, but in its place until the next step is decided.
            place.kv_offset = _take_out(fleet, requests, i, slot)
            place.chunk = 0
            engine.leaving += 1
            if fleet.prefix_caching:
                cache_full_blocks(fleet.prefix_cache, requests, i, place, place.kv_offset, fleet.block_size)
            request.state = FINISHED
            request.instance = NOWHERE
            request.finish_s = now_s
            finished[count] = place.request
            count += 1
    last = engine.num_running - 1
    prefilling = last >= 0 and fleet.slot[i, last].finish_tick == NO_FINISH
    engine.first_prefill = last if prefilling else last + 1
    if not fleet.async_scheduling:
        reap(fleet, i)
    engine.steps = 0
    engine.next_event_s = NEVER
    return count
