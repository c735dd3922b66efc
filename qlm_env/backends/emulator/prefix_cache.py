"""KV blocks with identity: prefix caching as vLLM's block pool does it.

Without prefix caching blocks are alike and the engine only counts them. With it a full block is known by its
content, a free block keeps its content until it is handed out again, and a request that is admitted takes over the
blocks that hold the beginning of its input. Free blocks are handed out from the front of one list: blocks
without known content are put back at the front, others at the end, last block of a request first, so that the least
recently used content goes first and a prefix outlives what follows it.

Content is a number, its *key*. Prompts that begin alike share the keys of their first blocks (:class:`PromptPrefixes`);
every other block is its request's own and can only be found by the same request after a preemption or eviction.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.compiled import compiled, kernel
from qlm_env.requests import Int, Records, RequestTable

Long = NDArray[np.int64]

NO_KEY = np.iinfo(np.int64).max
"""Key of a block whose content nobody can ask for."""

NO_BLOCK = -1

OWN_BLOCKS = 1 << 24
"""Blocks of one request that own keys can tell apart, more than any context holds."""


class PromptPrefixes(NamedTuple):
    """Which prompts begin alike. N requests."""

    first: Long
    """(N + 1,) request r has ``ids[first[r] : first[r + 1]]``"""
    ids: Long
    """Non-negative; two requests with the same id at the same place have the same tokens up to there, and the id
    stands for ``id_tokens`` tokens, or as many as are left of the prompt"""
    id_tokens: int


NO_PREFIXES = PromptPrefixes(np.zeros(0, np.int64), np.zeros(0, np.int64), 1)


class PrefixCache(NamedTuple):
    """The KV blocks of every instance. I instances, B blocks, S batch slots, T table entries, a power of two."""

    enabled: bool
    prefixes: PromptPrefixes
    users: Int
    """(I, B) requests in the batch that hold the block"""
    key: Long
    """(I, B) content, or NO_KEY"""
    next_free: Int
    """(I, B + 1) the list of free blocks, closed over entry B, whose successor is the next block to hand out"""
    previous_free: Int
    """(I, B + 1)"""
    table: Int
    """(I, T) open addressing by key: the first block cached with it, or NO_BLOCK"""
    next_same: Int
    """(I, B) the block cached next with the same key, or NO_BLOCK"""
    held: Int
    """(I, S, L) the blocks of each batch slot's request, in order; rows are dealt by ``SLOT_DTYPE.row``"""
    free_row: Int
    """(I, S) rows of ``held``; those from ``num_running`` on are free"""


def make_prefix_cache(
    num_instances: int,
    num_blocks: int,
    max_num_seqs: int,
    max_request_blocks: int,
    prefixes: PromptPrefixes = NO_PREFIXES,
    *,
    enabled: bool = True,
) -> PrefixCache:
    """An empty cache; :func:`reset_blocks` makes an instance's blocks available.

    Where it is not enabled sizes may be 0.

    Args:
        num_blocks: of the instance that has most.
        max_request_blocks: of the longest request, its output included.
    """
    table_size = 1 << max(1, 2 * num_blocks).bit_length()
    blocks = (num_instances, num_blocks)
    return PrefixCache(
        enabled=enabled,
        prefixes=prefixes,
        users=np.zeros(blocks, np.int32),
        key=np.full(blocks, NO_KEY, np.int64),
        next_free=np.zeros((num_instances, num_blocks + 1), np.int32),
        previous_free=np.zeros((num_instances, num_blocks + 1), np.int32),
        table=np.full((num_instances, table_size), NO_BLOCK, np.int32),
        next_same=np.full(blocks, NO_BLOCK, np.int32),
        held=np.zeros((num_instances, max_num_seqs, max_request_blocks), np.int32),
        free_row=np.tile(np.arange(max_num_seqs, dtype=np.int32), (num_instances, 1)),
    )


# --------------------------------------------------------------------------- the free list
@kernel
def _unlink(cache: PrefixCache, i: int, block: int) -> None:
    before, after = cache.previous_free[i, block], cache.next_free[i, block]
    cache.next_free[i, before] = after
    cache.previous_free[i, after] = before


@kernel
def _link_before(cache: PrefixCache, i: int, block: int, after: int) -> None:
    before = cache.previous_free[i, after]
    cache.next_free[i, before] = block
    cache.previous_free[i, block] = before
    cache.next_free[i, block] = after
    cache.previous_free[i, after] = block


@compiled
def reset_blocks(cache: PrefixCache, i: int, num_blocks: int) -> None:
    """All blocks of the instance free and without content: the first ``num_blocks`` in order, the others out of use."""
    end = cache.key.shape[1]
    cache.next_free[i, end] = cache.previous_free[i, end] = end
    for block in range(end):
        cache.users[i, block] = 0
        cache.key[i, block] = NO_KEY
        cache.next_same[i, block] = NO_BLOCK
        if block < num_blocks:
            _link_before(cache, i, block, end)
    for entry in range(cache.table.shape[1]):
        cache.table[i, entry] = NO_BLOCK


# --------------------------------------------------------------------------- content
@kernel
def _block_key(cache: PrefixCache, requests: RequestTable, r: int, index: int, block_size: int) -> int:
    """Key of the request's ``index``-th block, once it is full."""
    prefixes = cache.prefixes
    if (index + 1) * block_size <= requests[r].prompt_tokens and len(prefixes.first) > 0:
        blocks_per_id = prefixes.id_tokens // block_size
        entry = prefixes.first[r] + index // blocks_per_id
        if entry < prefixes.first[r + 1]:
            return int(prefixes.ids[entry] * blocks_per_id + index % blocks_per_id)
    return -1 - (r * OWN_BLOCKS + index)


@kernel
def _home(cache: PrefixCache, key: int) -> int:
    """Where a search for the key begins. Multiplying by a large odd number spreads consecutive keys."""
    return ((key * 0x9E3779B97F4A7C5) >> 20) & (cache.table.shape[1] - 1)


@kernel
def _entry(cache: PrefixCache, i: int, key: int) -> int:
    """The key's place in the table: where it stands, or the empty one where it would be put."""
    mask = cache.table.shape[1] - 1
    entry = _home(cache, key)
    while cache.table[i, entry] != NO_BLOCK and cache.key[i, cache.table[i, entry]] != key:
        entry = (entry + 1) & mask
    return entry


@kernel
def _forget(cache: PrefixCache, i: int, block: int) -> None:
    """The block's content is overwritten."""
    key = cache.key[i, block]
    if key == NO_KEY:
        return
    entry = _entry(cache, i, key)
    first = cache.table[i, entry]
    if first != block:
        while cache.next_same[i, first] != block:
            first = cache.next_same[i, first]
        cache.next_same[i, first] = cache.next_same[i, block]
    elif cache.next_same[i, block] != NO_BLOCK:
        cache.table[i, entry] = cache.next_same[i, block]
    else:
        # Close the gap: move up what a probe would no longer reach.
        mask = cache.table.shape[1] - 1
        cache.table[i, entry] = NO_BLOCK
        probe = (entry + 1) & mask
        while cache.table[i, probe] != NO_BLOCK:
            home = _home(cache, cache.key[i, cache.table[i, probe]])
            if ((probe - home) & mask) >= ((probe - entry) & mask):
                cache.table[i, entry] = cache.table[i, probe]
                cache.table[i, probe] = NO_BLOCK
                entry = probe
            probe = (probe + 1) & mask
    cache.key[i, block] = NO_KEY
    cache.next_same[i, block] = NO_BLOCK


@kernel
def _remember(cache: PrefixCache, i: int, block: int, key: int) -> None:
    """The block is full of known content; of several with the same the one that was first is found."""
    entry = _entry(cache, i, key)
    cache.key[i, block] = key
    if cache.table[i, entry] == NO_BLOCK:
        cache.table[i, entry] = block
        return
    last = cache.table[i, entry]
    while cache.next_same[i, last] != NO_BLOCK:
        last = cache.next_same[i, last]
    cache.next_same[i, last] = block


@kernel
def cache_full_blocks(
    cache: PrefixCache, requests: RequestTable, i: int, place: Records, tokens: int, block_size: int
) -> None:
    """Make the full blocks among a slot's first ``tokens`` findable, those that are not yet."""
    full = tokens // block_size
    for index in range(place.cached_blocks, full):
        block = cache.held[i, place.row, index]
        _remember(cache, i, block, _block_key(cache, requests, place.request, index, block_size))
    place.cached_blocks = max(place.cached_blocks, full)


# --------------------------------------------------------------------------- taking and giving back
@kernel
def hit_blocks(cache: PrefixCache, requests: RequestTable, i: int, r: int, block_size: int) -> int:
    """How many blocks at the beginning of a waiting request's input are cached; its last token never counts."""
    limit = (requests[r].prompt_tokens + requests[r].generated_tokens - 1) // block_size
    hits = 0
    while hits < limit:
        entry = _entry(cache, i, _block_key(cache, requests, r, hits, block_size))
        if cache.table[i, entry] == NO_BLOCK:
            break
        hits += 1
    return hits


@kernel
def hit_blocks_in_use(cache: PrefixCache, requests: RequestTable, i: int, r: int, hits: int, block_size: int) -> int:
    """How many of the first ``hits`` blocks are held by a running request, so that taking them costs nothing."""
    in_use = 0
    for index in range(hits):
        entry = _entry(cache, i, _block_key(cache, requests, r, index, block_size))
        in_use += cache.users[i, cache.table[i, entry]] > 0
    return in_use


@kernel
def take_hits(cache: PrefixCache, requests: RequestTable, i: int, place: Records, hits: int, block_size: int) -> None:
    """The slot's request takes over ``hits`` cached blocks."""
    for index in range(hits):
        entry = _entry(cache, i, _block_key(cache, requests, place.request, index, block_size))
        block = cache.table[i, entry]
        if cache.users[i, block] == 0:
            _unlink(cache, i, block)
        cache.users[i, block] += 1
        cache.held[i, place.row, index] = block
    place.cached_blocks = hits


@kernel
def take_free(cache: PrefixCache, i: int, row: int, held: int, count: int) -> None:
    """``count`` free blocks for a request that holds ``held``; their content is forgotten."""
    for index in range(held, held + count):
        block = cache.next_free[i, cache.key.shape[1]]
        _unlink(cache, i, block)
        _forget(cache, i, block)
        cache.users[i, block] = 1
        cache.held[i, row, index] = block


@kernel
def give_back(cache: PrefixCache, i: int, row: int, held: int) -> int:
    """A request leaves its ``held`` blocks; returns how many became free. The last block is handed out first."""
    end = cache.key.shape[1]
    front = cache.next_free[i, end]
    freed = 0
    for index in range(held - 1, -1, -1):
        block = cache.held[i, row, index]
        cache.users[i, block] -= 1
        if cache.users[i, block] == 0:
            freed += 1
            _link_before(cache, i, block, front if cache.key[i, block] == NO_KEY else end)
    return freed
