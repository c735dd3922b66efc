"""Where model weights are, and what moving them costs.

A model is on the GPU (active), in host memory (warm, asleep) or in storage (cold). A swap puts the active model to
sleep if host memory can hold it, else drops it, and then wakes the target or starts it cold. Host memory is
bounded; the least recently used warm model makes room.
"""

from __future__ import annotations

from qlm_env.backends.emulator.prefix_cache import reset_blocks
from qlm_env.backends.emulator.state import GPU, HOST, NEVER, NO_FINISH, STORAGE, Fleet
from qlm_env.compiled import compiled, kernel
from qlm_env.requests import NOWHERE, RequestTable


@compiled
def fits(fleet: Fleet, i: int, model: int) -> bool:
    """Whether the instance can serve the model at all."""
    return bool(fleet.placement[i, model].num_blocks > 0)


@kernel
def can_ever_run(fleet: Fleet, requests: RequestTable, i: int, r: int) -> bool:
    """Whether an instance that serves the request's model can take the request from first to last token."""
    request = requests[r]
    placement = fleet.placement[i, request.model]
    # The last token is never fed back, so its KV is never cached.
    cached = request.prompt_tokens + request.output_tokens - 1
    return bool(
        request.prompt_tokens + request.output_tokens <= placement.context_tokens
        and cached <= placement.num_blocks * fleet.block_size
        and (fleet.chunked_prefill or cached <= fleet.max_num_batched_tokens)
    )


@kernel
def can_swap(fleet: Fleet, i: int, model: int) -> bool:
    """Whether ``swap_model(i, model)`` is allowed now."""
    engine = fleet.engine[i]
    return bool(
        engine.up
        and engine.swap_target == NOWHERE
        and engine.pending_swap == NOWHERE
        and engine.active_model != model
        and fits(fleet, i, model)
    )


@kernel
def can_warm_start(fleet: Fleet, i: int, model: int) -> bool:
    """Whether ``warm_start(i, model)`` is allowed now: in storage, nothing else being staged, room can be made."""
    engine = fleet.engine[i]
    return bool(
        engine.up
        and engine.stage_target == NOWHERE
        and engine.swap_target != model
        and engine.pending_swap != model
        and fits(fleet, i, model)
        and fleet.placement[i, model].residency == STORAGE
        and fleet.placement[i, model].weight_bytes <= engine.host_memory_bytes
    )


@kernel
def _make_room(fleet: Fleet, i: int, needed_bytes: float) -> bool:
    """Drop least recently used warm models until ``needed_bytes`` of host memory are free."""
    engine = fleet.engine[i]
    reserved = 0.0
    if engine.stage_target != NOWHERE:
        reserved = fleet.placement[i, engine.stage_target].weight_bytes
    if needed_bytes > engine.host_memory_bytes - reserved:
        return False
    while engine.host_used_bytes + needed_bytes > engine.host_memory_bytes:
        oldest = NOWHERE
        for model in range(fleet.placement.shape[1]):
            if fleet.placement[i, model].residency == HOST and (
                oldest == NOWHERE or fleet.placement[i, model].last_used_s < fleet.placement[i, oldest].last_used_s
            ):
                oldest = model
        if oldest == NOWHERE:
            return False
        fleet.placement[i, oldest].residency = STORAGE
        engine.host_used_bytes -= fleet.placement[i, oldest].weight_bytes
    return True


@kernel
def start_swap(fleet: Fleet, i: int, model: int, now_s: float) -> None:
    """Begin loading ``model`` on an instance whose batch is empty; it is active at ``next_event_s``."""
    engine = fleet.engine[i]
    target = fleet.placement[i, model]
    load_s = target.cold_start_s
    warm = False
    if target.residency == HOST:
        warm = True
        load_s = target.wake_s
        target.residency = STORAGE
        engine.host_used_bytes -= target.weight_bytes
    elif engine.stage_target == model:
        # Half staged already: wait for the rest if that is sooner than starting over.
        rest_s = max(0.0, engine.stage_end_s - now_s) + target.wake_s
        warm = rest_s < target.cold_start_s
        load_s = min(rest_s, target.cold_start_s)
        engine.stage_target = NOWHERE
        engine.stage_end_s = NEVER
        engine.host_used_bytes -= target.weight_bytes
    old = engine.active_model
    if old != NOWHERE:
        leaving = fleet.placement[i, old]
        leaving.last_used_s = now_s
        leaving.residency = STORAGE
        if _make_room(fleet, i, leaving.weight_bytes):
            leaving.residency = HOST
            engine.host_used_bytes += leaving.weight_bytes
            load_s += leaving.sleep_s
    engine.active_model = NOWHERE
    engine.free_blocks = 0
    engine.pending_swap = NOWHERE
    engine.swap_target = model
    engine.next_event_s = now_s + load_s
    engine.swapping_s += load_s
    engine.swaps += 1
    if warm:
        engine.warm_hits += 1
    else:
        engine.cold_starts += 1


@kernel
def activate(fleet: Fleet, i: int, model: int, now_s: float) -> None:
    """The model is on the GPU and its KV cache is empty."""
    engine = fleet.engine[i]
    placement = fleet.placement[i, model]
    placement.residency = GPU
    placement.last_used_s = now_s
    engine.active_model = model
    engine.swap_target = NOWHERE
    engine.next_event_s = NEVER
    engine.free_blocks = placement.num_blocks
    if fleet.prefix_caching:
        reset_blocks(fleet.prefix_cache, i, placement.num_blocks)


@kernel
def start_staging(fleet: Fleet, i: int, model: int, now_s: float) -> None:
    """Begin copying weights from storage to host memory; the caller has checked :func:`can_warm_start`."""
    engine = fleet.engine[i]
    _make_room(fleet, i, fleet.placement[i, model].weight_bytes)
    engine.host_used_bytes += fleet.placement[i, model].weight_bytes
    engine.stage_target = model
    engine.stage_end_s = now_s + fleet.placement[i, model].stage_s
    engine.warm_starts += 1


@kernel
def finish_staging(fleet: Fleet, i: int, now_s: float) -> None:
    """The staged model is warm."""
    engine = fleet.engine[i]
    fleet.placement[i, engine.stage_target].residency = HOST
    fleet.placement[i, engine.stage_target].last_used_s = now_s
    engine.stage_target = NOWHERE
    engine.stage_end_s = NEVER


@compiled
def place_initially(fleet: Fleet, i: int, model: int, residency: int) -> None:
    """Put a model on the GPU or into host memory before the episode, at no cost."""
    if residency == GPU:
        activate(fleet, i, model, 0.0)
    else:
        fleet.placement[i, model].residency = HOST
        fleet.placement[i, model].last_used_s = 0.0
        fleet.engine[i].host_used_bytes += fleet.placement[i, model].weight_bytes


@kernel
def power_off(fleet: Fleet, i: int, now_s: float) -> None:
    """The instance fails: GPU and host memory are lost. Its batch and queue must have been emptied."""
    engine = fleet.engine[i]
    if engine.swap_target != NOWHERE:
        # A swap is booked whole when it begins.
        engine.swapping_s -= engine.next_event_s - now_s
    engine.up = 0
    engine.active_model = NOWHERE
    engine.free_blocks = 0
    engine.steps = 0
    engine.first_prefill = 0
    engine.min_finish_tick = NO_FINISH
    engine.next_event_s = NEVER
    engine.pending_eviction = 0
    engine.pending_swap = NOWHERE
    engine.swap_target = NOWHERE
    engine.stage_target = NOWHERE
    engine.stage_end_s = NEVER
    engine.host_used_bytes = 0.0
    engine.host_kv_used_bytes = 0.0
    for model in range(fleet.placement.shape[1]):
        fleet.placement[i, model].residency = STORAGE
