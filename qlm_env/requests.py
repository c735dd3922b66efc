"""The request table: one struct of NumPy arrays, the single source of truth about every request.

Queueing and backend share this table and work on it in place. It is one structured array, so that a compiled
function takes a row by pointer and a Python reader takes a column as an array. A request is always in
exactly one state:

``PENDING -> WAITING -> RUNNING -> FINISHED``, with ``RUNNING -> WAITING`` on eviction, engine preemption
or instance failure, and ``REJECTED`` for what can never run.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

PENDING, WAITING, RUNNING, FINISHED, REJECTED = 0, 1, 2, 3, 4
STATE_NAMES = ("pending", "waiting", "running", "finished", "rejected")

NOT_REJECTED, TOO_LONG, NO_INSTANCE = 0, 1, 2
REJECT_REASONS = ("", "longer than the model's context or KV cache", "model fits no instance")

UNSETTLED, MET, MISSED = 0, 1, -1

NOWHERE = -1
"""No instance, no group, no next request."""

Float = NDArray[np.float64]
Int = NDArray[np.int32]
Byte = NDArray[np.int8]


WORKLOAD_FIELDS = [
    ("arrival_s", "f8"),
    ("service_factor", "f8"),  # multiplier on service time with mean 1; 1 everywhere without noise (hidden)
    ("prompt_tokens", "i4"),
    ("output_tokens", "i4"),  # hidden from policies
    ("model", "i4"),  # index into the workload's models
    ("slo_class", "i4"),  # index into the SLO classes; the engine's priority under `priority` scheduling
]
"""Fixed before the episode: a function of (workload, seed) alone."""

STATE_FIELDS = [
    ("first_scheduled_s", "f8"),  # first entry into a running batch; NaN before
    ("first_token_s", "f8"),
    ("finish_s", "f8"),
    ("group", "i4"),  # request group, or NOWHERE before arrival
    ("instance", "i4"),  # instance whose engine holds the request (in batch or engine queue), or NOWHERE
    ("next", "i4"),  # next in the list this request is in: its group's waiting list or an engine's queue
    ("generated_tokens", "i4"),  # output so far; for a request in a batch ask the engine, which is lazy
    ("computed_tokens", "i4"),  # tokens whose KV is kept in host memory while not running
    ("kv_host", "i4"),  # instance whose host memory keeps this request's KV, or NOWHERE
    ("recomputed_tokens", "i4"),  # tokens whose KV was computed, lost, and has to be computed again
    ("lost_tokens", "i4"),  # of those, the ones lost last; what a prefix cache gives back was not lost
    ("first_prefix_id", "i4"),  # where the ids of its prompt's prefix begin, and ...
    ("prefix_ids", "i4"),  # ... how many there are, for the engine's prefix cache
    ("preemptions", "i4"),
    ("evictions", "i4"),
    ("state", "i1"),
    ("settled", "i1"),  # MET or MISSED once the outcome is certain
    ("reject_reason", "i1"),
]

REQUEST_DTYPE = np.dtype(WORKLOAD_FIELDS + STATE_FIELDS, align=True)

Records: TypeAlias = "np.recarray[Any, np.dtype[np.void]]"
"""A structured array whose fields are attributes, in Python as in compiled functions."""

RequestTable: TypeAlias = Records
"""Shape (N,), dtype REQUEST_DTYPE, one row per request in order of arrival.

``requests.arrival_s`` is a column, ``requests[r].arrival_s`` a cell; both work in compiled functions.
"""


def make_request_table(
    arrival_s: Float,
    prompt_tokens: NDArray[np.integer],
    output_tokens: NDArray[np.integer],
    model: NDArray[np.integer],
    slo_class: NDArray[np.integer],
    service_factor: Float | None = None,
) -> RequestTable:
    """A table of pending requests from workload columns of equal length (N,).

    Raises:
        ValueError: columns differ in length or are not whole numbers, arrivals decrease or are not finite, or a
            length is below 1.
    """
    n = len(arrival_s)
    columns: dict[str, NDArray[Any]] = {
        "arrival_s": np.asarray(arrival_s, np.float64),
        "prompt_tokens": np.asarray(prompt_tokens),
        "output_tokens": np.asarray(output_tokens),
        "model": np.asarray(model),
        "slo_class": np.asarray(slo_class),
        "service_factor": np.ones(n) if service_factor is None else np.asarray(service_factor, np.float64),
    }
    for name, column in columns.items():
        if column.shape != (n,):
            raise ValueError(f"{name} has shape {column.shape}, expected ({n},)")
        if name not in ("arrival_s", "service_factor") and not np.issubdtype(column.dtype, np.integer):
            raise ValueError(f"{name} must be whole numbers, not {column.dtype}")
    if not np.all(np.isfinite(columns["arrival_s"])) or (n and columns["arrival_s"][0] < 0):
        raise ValueError("arrival_s must be finite and non-negative")
    if np.any(np.diff(columns["arrival_s"]) < 0):
        row = int(np.argmax(np.diff(columns["arrival_s"]) < 0)) + 1
        raise ValueError(f"arrival_s decreases at row {row}")
    for name in ("prompt_tokens", "output_tokens"):
        if np.any(columns[name] < 1):
            raise ValueError(f"{name} must be at least 1 (row {int(np.argmax(columns[name] < 1))})")
    if not np.all(columns["service_factor"] > 0):
        raise ValueError("service_factor must be positive")
    requests = np.zeros(n, REQUEST_DTYPE).view(np.recarray)
    for name, column in columns.items():
        requests[name] = column
    reset_state(requests)
    return requests


def reset_state(requests: RequestTable) -> None:
    """Every request pending again, as before the episode."""
    for name, _ in STATE_FIELDS:
        requests[name] = 0
    for name in ("group", "instance", "next", "kv_host"):
        requests[name] = NOWHERE
    for name in ("first_scheduled_s", "first_token_s", "finish_s"):
        requests[name] = np.nan


def workload_hash(requests: RequestTable) -> str:
    """Sixteen hex digits that identify the workload columns of ``requests``, whatever its state."""
    digest = hashlib.sha256()
    for name, _ in WORKLOAD_FIELDS:
        digest.update(np.ascontiguousarray(requests[name]).tobytes())
    return digest.hexdigest()[:16]
