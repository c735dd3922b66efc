"""The prompt prefixes of a Mooncake trace: its ``hash_ids``, one for every 512 tokens of a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qlm_env.prefixes import NO_PREFIXES, PromptPrefixes
from qlm_env.spec import TraceWorkload
from qlm_env.workload.trace_rows import TraceError, decode, read_bytes
from qlm_env.workload.traces import read_trace, selected_rows

HASHED_TOKENS = 512
"""Tokens that a hash id stands for (Mooncake, FAST 2025, trace format)."""


def load_prefixes(workload: TraceWorkload) -> PromptPrefixes:
    """Which prompts of ``workload`` begin alike; none do where its format does not tell.

    Raises:
        TraceError: as :func:`qlm_env.workload.traces.read_trace`, or ``hash_ids`` is not a list of non-negative
            whole numbers.
        ConfigError: the workload selects no request.
    """
    if workload.format != "mooncake":
        return NO_PREFIXES
    path = Path(workload.path)
    trace = read_trace(path, workload.format)
    rows = selected_rows(trace, workload)
    ids = _read_ids(path)[rows]
    first = np.cumsum([0, *(len(row) for row in ids)], dtype=np.int64)
    return PromptPrefixes(first, np.array([i for row in ids for i in row], dtype=np.int64), HASHED_TOKENS)


def _read_ids(path: Path) -> list[list[int]]:
    rows = []
    for line, text in enumerate(decode(path, read_bytes(path)).split("\n"), start=1):
        if not text.strip():
            continue
        ids = json.loads(text).get("hash_ids", [])
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            problem = f"{json.dumps(ids)[:40]} is not a list of whole numbers from 0 to 2^31 - 1"
            raise TraceError(path, problem, line, "hash_ids")
        rows.append(ids)
    return rows
