"""Trace replay: reading published trace files and cutting them to what a workload asks for."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from qlm_env.spec import ConfigError, TraceWorkload
from qlm_env.workload.trace_csv import AZURE, BURSTGPT, read_csv_trace
from qlm_env.workload.trace_jsonl import MOONCAKE, read_jsonl_trace
from qlm_env.workload.trace_rows import Trace, TraceFormat, read_bytes

logger = logging.getLogger(__name__)


def read_trace(path: str | Path, trace_format: TraceFormat) -> Trace:
    """Read a trace file, plain or gzip, in a published format.

    - ``azure``: CSV with ``TIMESTAMP`` (date and time), ``ContextTokens``, ``GeneratedTokens``.
    - ``mooncake``: JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length``.
    - ``burstgpt``: CSV with ``Timestamp`` (s), ``Request tokens``, ``Response tokens``; rows with 0 tokens
      are failed requests, left out, counted in ``num_failed`` and logged.

    Raises:
        TraceError: names the file and, where there is one, the line and column: the file is missing,
            empty or of another format; a column or field is missing; a value is not a finite number; a
            length is not a whole number of at least 1; a timestamp is earlier than the one before.
    """
    path = Path(path)
    content = read_bytes(path)
    if trace_format == "mooncake":
        trace = read_jsonl_trace(path, content, MOONCAKE)
    else:
        trace = read_csv_trace(path, content, AZURE if trace_format == "azure" else BURSTGPT)
    if trace.num_failed:
        logger.info("%s: left out %d failed requests (0 tokens)", path, trace.num_failed)
    return trace


def selected_rows(trace: Trace, workload: TraceWorkload) -> slice:
    """The rows of ``trace`` that ``workload`` replays: ``[start_s, start_s + duration_s)``, at most ``max_requests``.

    Raises:
        ConfigError: there are none.
    """
    end_s = np.inf if workload.duration_s is None else workload.start_s + workload.duration_s
    first, last = (int(np.searchsorted(trace.arrival_s, edge)) for edge in (workload.start_s, end_s))
    if first == last:
        raise ConfigError(
            f"workload.start_s and workload.duration_s select no request: the slice is "
            f"[{workload.start_s:g}, {end_s:g}) s, the arrivals of {workload.path} span "
            f"{trace.arrival_s[0]:g} to {trace.arrival_s[-1]:g} s"
        )
    if workload.max_requests is not None:
        last = min(last, first + workload.max_requests)
    return slice(first, last)


def slice_trace(trace: Trace, workload: TraceWorkload) -> Trace:
    """The part of ``trace`` that ``workload`` replays: slice, time scale, number of requests.

    Keeps arrivals in ``[start_s, start_s + duration_s)``, makes ``start_s`` the new time 0, multiplies
    times by ``time_scale`` and keeps the first ``max_requests``. Lengths stay as they are. ``num_failed``
    still counts the whole file.

    Raises:
        ConfigError: no request is left.
    """
    rows = selected_rows(trace, workload)
    return trace._replace(
        arrival_s=(trace.arrival_s[rows] - workload.start_s) * workload.time_scale,
        prompt_tokens=trace.prompt_tokens[rows].copy(),
        output_tokens=trace.output_tokens[rows].copy(),
    )


def load_trace(workload: TraceWorkload) -> Trace:
    """Read and slice the trace of ``workload``; raises as :func:`read_trace` and :func:`slice_trace` do."""
    return slice_trace(read_trace(workload.path, workload.format), workload)
