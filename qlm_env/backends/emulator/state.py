"""The emulated engines' arrays: what is constant in an episode, and what changes.

All are structured arrays, so that a compiled function takes a row by pointer. Shapes: I instances, M models,
S = ``max_num_seqs`` batch slots, K = ``block_size``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qlm_env.backends.emulator.prefix_cache import (
    PrefixCache,
    make_prefix_cache,
    reset_initially,
)
from qlm_env.prefixes import NO_PREFIXES, PromptPrefixes
from qlm_env.profiles.token_curve import MAX_KNOTS
from qlm_env.requests import NOWHERE, Int, Records, RequestTable
from qlm_env.spec import ConfigError

NEVER = np.inf
NO_FINISH = np.iinfo(np.int64).max
"""Finish tick of a slot that is still prefilling."""

STORAGE, HOST, GPU = 0, 1, 2
"""Residency of a model's weights at an instance."""
RESIDENCY_NAMES = ("storage", "host", "gpu")

NO_EVICTION, EVICT_DROP, EVICT_KEEP = 0, 1, 2

FCFS, PRIORITY = 0, 1

PLACEMENT_DTYPE = np.dtype(
    [
        # Step-time coefficients, seconds; see latency.py.
        ("c0", "f8"),
        ("c1", "f8"),
        ("n0", "f8"),
        ("c2", "f8"),
        ("c3", "f8"),
        ("c4", "f8"),
        ("c5", "f8"),
        ("c6", "f8"),
        # The curve over new tokens that takes the place of c0, c1, n0 and c2; none with 0 knots.
        ("chunk_s", "f8"),  # more with a prefill chunk
        ("num_knots", "i8"),
        ("knot_tokens", "f8", (MAX_KNOTS,)),
        ("knot_s", "f8", (MAX_KNOTS,)),
        ("context_tokens", "i8"),  # longest prompt + output of the model
        ("num_blocks", "i8"),  # KV blocks requests can use; 0 where the model does not fit the instance
        ("weight_bytes", "f8"),  # all GPUs of the instance together
        ("kv_bytes_per_token", "f8"),
        ("kv_swap_bytes_per_s", "f8"),
        ("cold_start_s", "f8"),  # storage to GPU
        ("stage_s", "f8"),  # storage to host memory, in the background
        ("wake_s", "f8"),  # host memory to GPU
        ("sleep_s", "f8"),  # GPU to host memory
        # State.
        ("last_used_s", "f8"),
        ("residency", "i1"),
    ],
    align=True,
)
"""One (instance, model) pair."""

ENGINE_DTYPE = np.dtype(
    [
        ("up", "i1"),  # 0 while failed
        ("active_model", "i4"),  # on the GPU, or NOWHERE
        # The batch.
        ("num_running", "i4"),
        ("first_prefill", "i4"),  # first slot that may be prefilling; all before it decode
        ("tick", "i8"),
        ("min_finish_tick", "i8"),
        ("decodes", "i4"),  # decoding slots
        ("decode_kv_tokens", "i8"),  # their cached tokens, summed
        ("factor_sum", "f8"),  # service factors of the batch, summed
        ("free_blocks", "i8"),
        # The engine's own queue: preempted requests, and requests submitted but not yet admitted.
        ("queue_head", "i4"),
        ("queue_tail", "i4"),
        ("queue_length", "i4"),
        # The leap now running: `steps` steps from `start_s`, the first of `step_s`, each next `growth_s` longer.
        ("start_s", "f8"),
        ("step_s", "f8"),
        ("growth_s", "f8"),
        ("steps", "i8"),
        ("next_event_s", "f8"),  # when the leap, a model swap or a KV copy ends; NEVER when idle or down
        # Scheduling the current step.
        ("token_budget", "i4"),
        ("preempted", "i1"),  # something was preempted in this step, so nothing is admitted
        ("turned_away", "i1"),  # something could not be admitted to this step
        # Async scheduling: a step is scheduled while the one before it runs.
        ("lagging", "i1"),  # the step to schedule next was decided when the one that just ended began
        ("fresh", "i1"),  # the step that just ended, or is in progress, was decided with no other in progress
        ("known_s", "f8"),  # when it is decided: later arrivals wait for the step after it
        ("leaving", "i4"),  # requests that finished since, and still hold slot and blocks for that decision
        ("restored_tokens", "i8"),  # KV tokens copied back from host memory in this step
        # Operations waiting for the end of the step.
        ("pending_eviction", "i1"),
        ("pending_swap", "i4"),
        # Host memory and loading.
        ("host_memory_bytes", "f8"),
        ("host_used_bytes", "f8"),
        ("host_kv_bytes", "f8"),
        ("host_kv_used_bytes", "f8"),
        ("swap_target", "i4"),  # model being loaded onto the GPU, or NOWHERE
        ("stage_target", "i4"),  # model being staged into host memory, or NOWHERE
        ("stage_end_s", "f8"),
        # Counters.
        ("busy_s", "f8"),  # time spent in engine steps
        ("swapping_s", "f8"),
        ("kv_block_s", "f8"),  # KV blocks in use, integrated over time (as of the end of each leap)
        ("swaps", "i8"),
        ("warm_hits", "i8"),
        ("cold_starts", "i8"),
        ("warm_starts", "i8"),
        ("evictions", "i8"),
        ("preemptions", "i8"),
        ("kv_swapped_bytes", "f8"),
    ],
    align=True,
)
"""One instance. A *tick* counts its engine steps."""

SLOT_DTYPE = np.dtype(
    [
        ("finish_tick", "i8"),  # tick at which the request is done; NO_FINISH while it prefills
        ("kv_offset", "i8"),  # cached tokens: minus the tick while decoding, as they are while prefilling
        ("request", "i4"),
        ("prefill_left", "i4"),  # prefill tokens still to compute
        ("chunk", "i4"),  # tokens of the step in progress, where they are not simply one
        ("cached_blocks", "i4"),  # prefix caching: blocks whose content can be found
        ("row", "i4"),  # prefix caching: the row of `held` that lists its blocks; a free slot's is free
    ],
    align=True,
)
"""One place in a batch. A decoding slot advances by exactly one token a tick, so its progress is stored once,
relative to the tick, and no step touches it: it has ``kv_offset + tick`` cached tokens and finishes when the
tick reaches ``finish_tick``. With async scheduling a slot whose ``finish_tick`` is reached stays in place, off the
books and with ``kv_offset`` cached tokens, until the next step is scheduled."""


class Fleet(NamedTuple):
    """Every engine of a cluster and the settings they share."""

    engine: Records
    """(I,) ENGINE_DTYPE"""
    slot: Records
    """(I, S) SLOT_DTYPE, in order of admission"""
    block_phase: Int
    """(I, K) decoding slots by the value of tick modulo K at which they need another block"""
    placement: Records
    """(I, M) PLACEMENT_DTYPE"""
    prefix_cache: PrefixCache | None
    """None until it is sized for the requests, and where prefix caching is off"""
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    chunked_prefill: bool
    scheduling_policy: int
    async_scheduling: bool
    prefix_caching: bool


def make_fleet(
    placement: Records,
    *,
    host_memory_bytes: np.ndarray,
    host_kv_bytes: np.ndarray,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_size: int,
    chunked_prefill: bool,
    scheduling_policy: int,
    async_scheduling: bool = False,
    prefix_caching: bool = False,
) -> Fleet:
    """Engines that are up, empty and hold no model. With prefix caching, :func:`size_prefix_cache` must follow.

    Args:
        placement: (I, M) records with the constant fields filled.
        host_memory_bytes: (I,)
        host_kv_bytes: (I,)
    """
    num_instances = placement.shape[0]
    engine = np.zeros(num_instances, ENGINE_DTYPE).view(np.recarray)
    engine["up"] = 1
    engine["host_memory_bytes"] = host_memory_bytes
    engine["host_kv_bytes"] = host_kv_bytes
    for name in ("active_model", "queue_head", "queue_tail", "pending_swap", "swap_target", "stage_target"):
        engine[name] = NOWHERE
    engine["next_event_s"] = engine["stage_end_s"] = NEVER
    engine["min_finish_tick"] = NO_FINISH
    placement["last_used_s"] = -np.inf
    placement["residency"] = STORAGE
    return Fleet(
        engine=engine,
        slot=np.zeros((num_instances, max_num_seqs), SLOT_DTYPE).view(np.recarray),
        block_phase=np.zeros((num_instances, block_size), np.int32),
        placement=placement,
        prefix_cache=None,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        chunked_prefill=chunked_prefill,
        scheduling_policy=scheduling_policy,
        async_scheduling=async_scheduling,
        prefix_caching=prefix_caching,
    )


def size_prefix_cache(fleet: Fleet, requests: RequestTable, prefixes: PromptPrefixes = NO_PREFIXES) -> Fleet:
    """The fleet with a prefix cache that can hold these requests; unchanged where prefix caching is off.

    Args:
        prefixes: which of the prompts begin alike; the requests are told where their ids stand.

    Raises:
        ConfigError: the ids stand for a number of tokens that the block size does not divide.
    """
    if not fleet.prefix_caching:
        return fleet
    if len(prefixes.ids) and prefixes.id_tokens % fleet.block_size:
        raise ConfigError(
            f"'cluster.engine.block_size': must divide the {prefixes.id_tokens} tokens that a prefix id of the "
            f"workload stands for (got {fleet.block_size})"
        )
    if len(prefixes.ids):
        requests["first_prefix_id"] = prefixes.first[:-1]
        requests["prefix_ids"] = np.diff(prefixes.first)
    longest = int((requests["prompt_tokens"].astype(np.int64) + requests["output_tokens"]).max(initial=1))
    num_blocks = fleet.placement["num_blocks"]
    cache = make_prefix_cache(
        len(fleet.engine), int(num_blocks.max()), fleet.max_num_seqs, -(-longest // fleet.block_size), prefixes
    )
    for i, model in enumerate(fleet.engine["active_model"]):
        if model != NOWHERE:
            reset_initially(cache, i, int(num_blocks[i, model]))
    fleet.slot["row"] = np.arange(fleet.max_num_seqs)
    return fleet._replace(prefix_cache=cache)
