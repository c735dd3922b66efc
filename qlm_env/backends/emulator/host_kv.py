"""The KV cache of evicted requests in host memory: what is kept there, and what is dropped.

Host memory for KV is bounded; what does not fit when a request is evicted is dropped and computed again
later. :func:`qlm_env.backends.emulator.engine.try_admit` copies kept tokens back.
"""

from __future__ import annotations

from qlm_env.backends.emulator.engine import drop_kv, release
from qlm_env.backends.emulator.state import Fleet
from qlm_env.compiled import kernel
from qlm_env.requests import NOWHERE, RequestTable


@kernel
def evict(fleet: Fleet, requests: RequestTable, i: int, slot: int, keep: bool) -> float:
    """Take the request in ``slot`` out of the batch between two steps.

    With ``keep`` its cached tokens are copied to host memory if they fit there, else they are dropped.

    Returns:
        the bytes copied.
    """
    engine = fleet.engine[i]
    r = release(fleet, requests, i, slot, 0)
    request = requests[r]
    request.evictions += 1
    engine.evictions += 1
    kv_bytes = request.computed_tokens * fleet.placement[i, engine.active_model].kv_bytes_per_token
    if keep and kv_bytes > 0 and engine.host_kv_used_bytes + kv_bytes <= engine.host_kv_bytes:
        request.kv_host = i
        engine.host_kv_used_bytes += kv_bytes
        engine.kv_swapped_bytes += kv_bytes
        return float(kv_bytes)
    drop_kv(requests, r)
    return 0.0


@kernel
def discard(fleet: Fleet, requests: RequestTable, r: int) -> None:
    """Drop what host memory keeps of a waiting request, if anything."""
    request = requests[r]
    i = request.kv_host
    if i != NOWHERE:
        kv_bytes = request.computed_tokens * fleet.placement[i, request.model].kv_bytes_per_token
        fleet.engine[i].host_kv_used_bytes -= kv_bytes
        drop_kv(requests, r)
