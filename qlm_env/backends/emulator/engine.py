"""Continuous batching as vLLM V1 does it, leaping over decode steps.

One step: running requests first, each taking its next token or prefill chunk out of the token budget and
the blocks it needs, the last admitted (or least urgent) preempted when blocks run out; then, unless something
was preempted, waiting requests while budget, batch slots and blocks for their whole input allow.
Between two events the batch decodes unchanged, so the engine schedules once and leaps: many engine steps
at once, whose end time has a closed form (:mod:`.latency`).

Life of a leap: :func:`begin_step` (running requests), :func:`try_admit` for each candidate, :func:`end_step`
(fixes the length and the end time), then at that time :func:`finish_leap`. :func:`interrupt` shortens a
running leap to the step in progress, so that something new can be considered at its end; :func:`catch_up`
commits the whole steps done by now without ending it.
"""

from __future__ import annotations

from qlm_env.backends.emulator.latency import step_time_s, steps_time_s, whole_steps_within
from qlm_env.backends.emulator.state import NEVER, NO_FINISH, PRIORITY, Fleet
from qlm_env.compiled import compiled, kernel
from qlm_env.requests import FINISHED, NOWHERE, RUNNING, WAITING, Int, RequestTable


# --------------------------------------------------------------------------- blocks
@kernel
def blocks_for(tokens: int, block_size: int) -> int:
    """KV blocks that hold ``tokens``."""
    return (tokens + block_size - 1) // block_size


@kernel
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


@kernel
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


# --------------------------------------------------------------------------- slots
@kernel
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


@kernel
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


@kernel
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
    engine.factor_sum = engine.factor_sum - request.service_factor if engine.num_running > 1 else 0.0
    return computed


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
    r = fleet.slot[i, slot].request
    computed = _take_out(fleet, requests, i, slot)
    engine.free_blocks += blocks_for(computed + allocated_ahead, fleet.block_size)
    engine.num_running -= 1
    if slot < engine.first_prefill:
        engine.first_prefill -= 1
    engine.min_finish_tick = NO_FINISH
    for s in range(engine.num_running):
        if s >= slot:
            fleet.slot[i, s] = fleet.slot[i, s + 1]
        engine.min_finish_tick = min(engine.min_finish_tick, fleet.slot[i, s].finish_tick)
    requests[r].computed_tokens = computed
    requests[r].state = WAITING
    return r


@kernel
def drop_kv(requests: RequestTable, r: int) -> None:
    """The request's cached tokens are gone and will be computed again."""
    request = requests[r]
    request.recomputed_tokens += request.computed_tokens
    request.computed_tokens = 0
    request.kv_host = NOWHERE


# --------------------------------------------------------------------------- the engine's queue
@kernel
def _precedes(requests: RequestTable, a: int, b: int) -> bool:
    """Order of the ``priority`` policy: class, then arrival."""
    if requests[a].slo_class != requests[b].slo_class:
        return requests[a].slo_class < requests[b].slo_class
    if requests[a].arrival_s != requests[b].arrival_s:
        return requests[a].arrival_s < requests[b].arrival_s
    return a < b


@kernel
def enqueue(fleet: Fleet, requests: RequestTable, i: int, r: int, front: bool) -> None:
    """Put a waiting request into the engine's queue: at an end under FCFS, in order under ``priority``."""
    engine = fleet.engine[i]
    requests[r].instance = i
    requests[r].state = WAITING
    previous = NOWHERE
    if fleet.scheduling_policy == PRIORITY:
        cursor = engine.queue_head
        while cursor != NOWHERE and _precedes(requests, cursor, r):
            previous = cursor
            cursor = requests[cursor].next
    elif not front:
        previous = engine.queue_tail
    if previous == NOWHERE:
        requests[r].next = engine.queue_head
        engine.queue_head = r
    else:
        requests[r].next = requests[previous].next
        requests[previous].next = r
    if requests[r].next == NOWHERE:
        engine.queue_tail = r
    engine.queue_length += 1


@kernel
def dequeue(fleet: Fleet, requests: RequestTable, i: int) -> int:
    """Take the head of the engine's queue, or NOWHERE."""
    engine = fleet.engine[i]
    r = engine.queue_head
    if r != NOWHERE:
        engine.queue_head = requests[r].next
        if engine.queue_head == NOWHERE:
            engine.queue_tail = NOWHERE
        requests[r].next = NOWHERE
        engine.queue_length -= 1
    return r


@kernel
def _preempt(fleet: Fleet, requests: RequestTable, i: int, slot: int, allocated_ahead: int) -> None:
    """Back to the engine's queue, KV dropped, as vLLM preempts."""
    r = release(fleet, requests, i, slot, allocated_ahead)
    drop_kv(requests, r)
    requests[r].preemptions += 1
    fleet.engine[i].preemptions += 1
    fleet.engine[i].preempted = 1
    enqueue(fleet, requests, i, r, True)


# --------------------------------------------------------------------------- one step
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


@kernel
def _schedule_short_of_blocks(fleet: Fleet, requests: RequestTable, i: int) -> None:
    """The running part of a step when blocks do not suffice: request by request, preempting as needed.

    When nothing could be scheduled there is no step and no tick; see :func:`must_reschedule`.
    """
    engine = fleet.engine[i]
    slot = 0
    stuck = False
    while slot < engine.num_running and engine.token_budget > 0:
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
        engine.free_blocks -= needed
        engine.token_budget -= tokens
        fleet.slot[i, slot].chunk = tokens
        slot += 1
    for idle in range(slot, engine.num_running):
        fleet.slot[i, idle].chunk = 0


@kernel
def begin_step(fleet: Fleet, requests: RequestTable, i: int) -> None:
    """Schedule the running requests: every decode takes a token, then the prefill in progress a chunk.

    At most one prefill is in progress, and it is last: it took all the budget of the step that admitted it.
    """
    engine = fleet.engine[i]
    engine.preempted = 0
    engine.restored_tokens = 0
    engine.token_budget = fleet.max_num_batched_tokens
    needed = fleet.block_phase[i, engine.tick % fleet.block_size]
    chunk = 0
    if engine.first_prefill < engine.num_running:
        place = fleet.slot[i, engine.first_prefill]
        chunk = min(place.prefill_left, fleet.max_num_batched_tokens - engine.decodes)
        needed += blocks_for(place.kv_offset + chunk, fleet.block_size)
        needed -= blocks_for(place.kv_offset, fleet.block_size)
        place.chunk = chunk
    if needed > engine.free_blocks:
        _schedule_short_of_blocks(fleet, requests, i)
    else:
        engine.free_blocks -= needed
        engine.token_budget -= engine.decodes + chunk


@kernel
def must_reschedule(fleet: Fleet, i: int) -> bool:
    """Preemption left nothing to run in this step; vLLM schedules again at once."""
    engine = fleet.engine[i]
    return engine.preempted != 0 and engine.token_budget == fleet.max_num_batched_tokens


@kernel
def input_blocks(fleet: Fleet, requests: RequestTable, r: int) -> int:
    """KV blocks of a waiting request's whole input, tokens generated so far included."""
    return blocks_for(requests[r].prompt_tokens + requests[r].generated_tokens, fleet.block_size)


@kernel
def whole_input_fits(fleet: Fleet, requests: RequestTable, i: int, r: int) -> bool:
    """vLLM admits only what has free blocks for its whole input (``scheduler_reserve_full_isl``)."""
    return bool(input_blocks(fleet, requests, r) <= fleet.engine[i].free_blocks)


@kernel
def try_admit(fleet: Fleet, requests: RequestTable, i: int, r: int, now_s: float) -> bool:
    """Admit a waiting request to the step being scheduled, with its KV restored if this host kept it.

    Returns:
        whether there was room; if not, nothing changed.
    """
    engine = fleet.engine[i]
    request = requests[r]
    slot = engine.num_running
    if engine.preempted or slot >= fleet.max_num_seqs or engine.token_budget <= 0:
        return False
    if not whole_input_fits(fleet, requests, i, r):
        return False
    restored = request.computed_tokens if request.kv_host == i else 0
    left = request.prompt_tokens + request.generated_tokens - restored
    if not fleet.chunked_prefill and left > engine.token_budget:
        return False
    chunk = min(left, engine.token_budget)
    engine.free_blocks -= blocks_for(restored + chunk, fleet.block_size)
    engine.token_budget -= chunk
    if restored > 0:
        engine.restored_tokens += restored
        engine.host_kv_used_bytes -= restored * fleet.placement[i, engine.active_model].kv_bytes_per_token
        request.kv_host = NOWHERE
        request.computed_tokens = 0

    place = fleet.slot[i, slot]
    place.request = r
    place.chunk = chunk
    engine.num_running += 1
    engine.factor_sum += request.service_factor
    if request.generated_tokens > 0 and left == 1:
        _start_decoding(fleet, i, slot, restored, request.output_tokens - request.generated_tokens)
        if engine.first_prefill == slot:
            engine.first_prefill = slot + 1
    else:
        place.finish_tick = NO_FINISH
        place.kv_offset = restored
        place.prefill_left = left
    request.state = RUNNING
    request.instance = i
    if request.first_scheduled_s != request.first_scheduled_s:
        request.first_scheduled_s = now_s
    return True


@kernel
def end_step(fleet: Fleet, requests: RequestTable, i: int, now_s: float) -> None:
    """Start the leap: as many steps as the batch can take unchanged, dated by the latency model.

    A step that prefills, restores KV or follows a preemption is taken alone, as the next schedule differs.
    """
    engine = fleet.engine[i]
    if engine.num_running == 0:
        engine.next_event_s = NEVER
        return
    placement = fleet.placement[i, engine.active_model]
    decodes = engine.decodes
    kv_tokens = engine.decode_kv_tokens
    attention = 0.0
    alone = engine.preempted != 0 or engine.restored_tokens > 0
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
    """End the running leap with the step in progress at ``now_s``."""
    engine = fleet.engine[i]
    if engine.steps <= 1:
        return
    done = whole_steps_within(engine.step_s, engine.growth_s, now_s - engine.start_s, engine.steps)
    ends_now = done > 0 and engine.start_s + steps_time_s(engine.step_s, engine.growth_s, done) >= now_s
    steps = done if ends_now else done + 1
    if steps < engine.steps:
        engine.steps = steps
        engine.next_event_s = engine.start_s + steps_time_s(engine.step_s, engine.growth_s, steps)


@kernel
def _advance_ticks(fleet: Fleet, i: int, steps: int, seconds: float) -> None:
    """Books of ``steps`` steps: caches grow by a token a step, blocks beyond the first step's are taken."""
    engine = fleet.engine[i]
    engine.free_blocks -= _blocks_over(fleet, i, engine.tick + 1, steps - 1)
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
        elapsed = steps_time_s(engine.step_s, engine.growth_s, done)
        _advance_ticks(fleet, i, done, elapsed)
        # The step in progress holds its blocks, as the first step of every leap does.
        engine.free_blocks -= fleet.block_phase[i, engine.tick % fleet.block_size]
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
        kept = 0
        smallest = NO_FINISH
        for slot in range(running):
            if fleet.slot[i, slot].finish_tick > engine.tick:
                if kept < slot:
                    fleet.slot[i, kept] = fleet.slot[i, slot]
                smallest = min(smallest, fleet.slot[i, kept].finish_tick)
                kept += 1
                continue
            r = fleet.slot[i, slot].request
            computed = _take_out(fleet, requests, i, slot)
            engine.num_running -= 1
            engine.free_blocks += blocks_for(computed, fleet.block_size)
            request = requests[r]
            request.state = FINISHED
            request.instance = NOWHERE
            request.finish_s = now_s
            finished[count] = r
            count += 1
        engine.min_finish_tick = smallest
    last = engine.num_running - 1
    prefilling = last >= 0 and fleet.slot[i, last].finish_tick == NO_FINISH
    engine.first_prefill = last if prefilling else last + 1
    engine.steps = 0
    engine.next_event_s = NEVER
    return count
