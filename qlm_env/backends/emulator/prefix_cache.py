"""KV blocks with identity: prefix caching as vLLM's block pool does it.

Without prefix caching blocks are alike and the engine only counts them. With it a full block is known by its
content, a free block keeps its content until it is handed out again, and a request that is admitted takes over the
blocks that hold the beginning of its input. Free blocks are handed out from the front of one list: blocks
without known content are put back at the front, others at the end, last block of a request first, so that the least
recently used content goes first and a prefix outlives what follows it.

Content is a number, its *key*. Prompts that begin alike share the keys of their first blocks
(:class:`~qlm_env.prefixes.PromptPrefixes`); every other block is its request's own and can only be found by the same
request after a preemption or eviction.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.compiled import compiled, kernel, kernel_if_present
from qlm_env.prefixes import PromptPrefixes
from qlm_env.requests import Int, Records, RequestTable

Long = NDArray[np.int64]

NO_KEY = np.iinfo(np.int64).max
"""Key of a block whose content nobody can ask for."""

NO_BLOCK = -1

OWN_BLOCKS = 1 << 24
"""Blocks of one request that own keys can tell apart, more than any context holds."""


BLOCK_DTYPE = np.dtype(
    [
        ("key", "i8"),  # content, or NO_KEY
        ("users", "i4"),  # requests in the batch that hold the block
        ("next_free", "i4"),  # the list of free blocks, closed over record B, whose successor is handed out next
        ("previous_free", "i4"),
        ("next_same", "i4"),  # the block cached next with the same key, or NO_BLOCK
        ("found", "i4"),  # open addressing by key, over all records: the first block cached with it, or NO_BLOCK
    ],
    align=True,
)


class PrefixCache(NamedTuple):
    """The KV blocks of every instance. I instances, B blocks, S batch slots, L blocks of the longest request.

    Few arrays, because a compiled function is passed each of them by its shape and strides.
    """

    block: Records
    """(I, R) BLOCK_DTYPE; R is a power of two above B, so that the records are the hash table's entries too"""
    held: Int
    """(I, S, L) the blocks of each batch slot's request, in order; a slot says which row is its own"""
    ids: Long
    """See :class:`~qlm_env.prefixes.PromptPrefixes`; the requests say where theirs begin"""
    num_blocks: int
    """B, of the instance that has most"""
    id_tokens: int


def make_prefix_cache(
    num_instances: int, num_blocks: int, max_num_seqs: int, max_request_blocks: int, prefixes: PromptPrefixes
) -> PrefixCache:
    """An empty cache; :func:`reset_blocks` makes an instance's blocks available.

    Args:
        num_blocks: of the instance that has most.
        max_request_blocks: of the longest request, its output included.
    """
    # Less than half full, the table's probes stay short.
    records = 1 << (2 * num_blocks).bit_length()
    return PrefixCache(
        block=np.zeros((num_instances, records), BLOCK_DTYPE).view(np.recarray),
        held=np.zeros((num_instances, max_num_seqs, max_request_blocks), np.int32),
        ids=prefixes.ids,
        num_blocks=num_blocks,
        id_tokens=prefixes.id_tokens,
    )


# --------------------------------------------------------------------------- the free list
@kernel
def _unlink(cache: PrefixCache, i: int, block: int) -> None:
    before, after = cache.block[i, block].previous_free, cache.block[i, block].next_free
    cache.block[i, before].next_free = after
    cache.block[i, after].previous_free = before


@kernel
def _link_before(cache: PrefixCache, i: int, block: int, after: int) -> None:
    before = cache.block[i, after].previous_free
    cache.block[i, before].next_free = block
    cache.block[i, block].previous_free = before
    cache.block[i, block].next_free = after
    cache.block[i, after].previous_free = block


@kernel_if_present
def reset_blocks(cache: PrefixCache, i: int, num_blocks: int) -> None:
    """All blocks of the instance free and without content: the first ``num_blocks`` in order, the others out of use."""
    end = cache.num_blocks
    cache.block[i, end].next_free = cache.block[i, end].previous_free = end
    for block in range(end):
        cache.block[i, block].users = 0
        cache.block[i, block].key = NO_KEY
        cache.block[i, block].next_same = NO_BLOCK
        if block < num_blocks:
            _link_before(cache, i, block, end)
    for entry in range(cache.block.shape[1]):
        cache.block[i, entry].found = NO_BLOCK


@compiled
def reset_initially(cache: PrefixCache, i: int, num_blocks: int) -> None:
    """As :func:`reset_blocks`, before the episode."""
    reset_blocks(cache, i, num_blocks)


# --------------------------------------------------------------------------- content
@kernel
def _block_key(cache: PrefixCache, requests: RequestTable, r: int, index: int, block_size: int) -> int:
    """Key of the request's ``index``-th block, once it is full."""
    request = requests[r]
    if request.prefix_ids > 0 and (index + 1) * block_size <= request.prompt_tokens:
        blocks_per_id = cache.id_tokens // block_size
        place = index // blocks_per_id
        if place < request.prefix_ids:
            return int(cache.ids[request.first_prefix_id + place] * blocks_per_id + index % blocks_per_id)
    return -1 - (r * OWN_BLOCKS + index)


@kernel
def _home(cache: PrefixCache, key: int) -> int:
    """Where a search for the key begins. Multiplying by a large odd number spreads consecutive keys."""
    return ((key * 0x9E3779B97F4A7C5) >> 20) & (cache.block.shape[1] - 1)


@kernel
def _entry(cache: PrefixCache, i: int, key: int) -> int:
    """The key's place in the table: where it stands, or the empty one where it would be put."""
    mask = cache.block.shape[1] - 1
    entry = _home(cache, key)
    while cache.block[i, entry].found != NO_BLOCK and cache.block[i, cache.block[i, entry].found].key != key:
        entry = (entry + 1) & mask
    return entry


@kernel
def _forget(cache: PrefixCache, i: int, block: int) -> None:
    """The block's content is overwritten."""
    key = cache.block[i, block].key
    if key == NO_KEY:
        return
    entry = _entry(cache, i, key)
    first = cache.block[i, entry].found
    if first != block:
        while cache.block[i, first].next_same != block:
            first = cache.block[i, first].next_same
        cache.block[i, first].next_same = cache.block[i, block].next_same
    elif cache.block[i, block].next_same != NO_BLOCK:
        cache.block[i, entry].found = cache.block[i, block].next_same
    else:
        # Close the gap: move up what a probe would no longer reach.
        mask = cache.block.shape[1] - 1
        cache.block[i, entry].found = NO_BLOCK
        probe = (entry + 1) & mask
        while cache.block[i, probe].found != NO_BLOCK:
            home = _home(cache, cache.block[i, cache.block[i, probe].found].key)
            if ((probe - home) & mask) >= ((probe - entry) & mask):
                cache.block[i, entry].found = cache.block[i, probe].found
                cache.block[i, probe].found = NO_BLOCK
                entry = probe
            probe = (probe + 1) & mask
    cache.block[i, block].key = NO_KEY
    cache.block[i, block].next_same = NO_BLOCK


@kernel
def _remember(cache: PrefixCache, i: int, block: int, key: int) -> None:
    """The block is full of known content; of several with the same the one that was first is found."""
    entry = _entry(cache, i, key)
    cache.block[i, block].key = key
    if cache.block[i, entry].found == NO_BLOCK:
        cache.block[i, entry].found = block
        return
    last = cache.block[i, entry].found
    while cache.block[i, last].next_same != NO_BLOCK:
        last = cache.block[i, last].next_same
    cache.block[i, last].next_same = block


@kernel_if_present
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
@kernel_if_present
def hit_blocks(cache: PrefixCache, requests: RequestTable, i: int, r: int, block_size: int) -> int:
    """How many blocks at the beginning of a waiting request's input are cached; its last token never counts."""
    limit = (requests[r].prompt_tokens + requests[r].generated_tokens - 1) // block_size
    hits = 0
    while hits < limit:
        entry = _entry(cache, i, _block_key(cache, requests, r, hits, block_size))
        if cache.block[i, entry].found == NO_BLOCK:
            break
        hits += 1
    return hits


@kernel_if_present
def hit_blocks_in_use(cache: PrefixCache, requests: RequestTable, i: int, r: int, hits: int, block_size: int) -> int:
    """How many of the first ``hits`` blocks are held by a running request, so that taking them costs nothing."""
    in_use = 0
    for index in range(hits):
        entry = _entry(cache, i, _block_key(cache, requests, r, index, block_size))
        in_use += cache.block[i, cache.block[i, entry].found].users > 0
    return in_use


@kernel_if_present
def take_hits(cache: PrefixCache, requests: RequestTable, i: int, place: Records, hits: int, block_size: int) -> None:
    """The slot's request takes over ``hits`` cached blocks."""
    for index in range(hits):
        entry = _entry(cache, i, _block_key(cache, requests, place.request, index, block_size))
        block = cache.block[i, entry].found
        if cache.block[i, block].users == 0:
            _unlink(cache, i, block)
        cache.block[i, block].users += 1
        cache.held[i, place.row, index] = block
    place.cached_blocks = hits


@kernel_if_present
def take_free(cache: PrefixCache, i: int, row: int, held: int, count: int) -> None:
    """``count`` free blocks for a request that holds ``held``; their content is forgotten."""
    for index in range(held, held + count):
        block = cache.block[i, cache.num_blocks].next_free
        _unlink(cache, i, block)
        _forget(cache, i, block)
        cache.block[i, block].users = 1
        cache.held[i, row, index] = block


@kernel_if_present
def give_back(cache: PrefixCache, i: int, row: int, held: int) -> int:
    """A request leaves its ``held`` blocks; returns how many became free. The last block is handed out first."""
    end = cache.num_blocks
    front = cache.block[i, end].next_free
    freed = 0
    for index in range(held - 1, -1, -1):
        block = cache.held[i, row, index]
        cache.block[i, block].users -= 1
        if cache.block[i, block].users == 0:
            freed += 1
            _link_before(cache, i, block, front if cache.block[i, block].key == NO_KEY else end)
    return freed
