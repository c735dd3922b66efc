"""Workloads: arrival processes, length distributions and trace readers, drawn into a request table."""

from qlm_env.workload.arrivals import sample_arrivals
from qlm_env.workload.build import build_requests, resolve_load
from qlm_env.workload.describe import LengthSummary, WorkloadDescription, describe, to_parquet
from qlm_env.workload.expected import ExpectedLengths, expected_lengths
from qlm_env.workload.lengths import sample_lengths
from qlm_env.workload.trace_prefixes import load_prefixes
from qlm_env.workload.trace_rows import Trace, TraceError
from qlm_env.workload.traces import load_trace, read_trace, slice_trace

__all__ = [
    "ExpectedLengths",
    "LengthSummary",
    "Trace",
    "TraceError",
    "WorkloadDescription",
    "build_requests",
    "describe",
    "expected_lengths",
    "load_prefixes",
    "load_trace",
    "read_trace",
    "resolve_load",
    "sample_arrivals",
    "sample_lengths",
    "slice_trace",
    "to_parquet",
]
