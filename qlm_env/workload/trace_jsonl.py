"""Traces published as JSON lines: Mooncake, with ``timestamp`` in milliseconds.

Other keys are ignored here; ``hash_ids``, the prefix cache blocks of a prompt, are read by :mod:`.trace_prefixes`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pa_json

from qlm_env.workload.trace_rows import (
    RowFormat,
    Trace,
    TraceError,
    TraceRows,
    decode,
    format_hint,
    trace_of_columns,
)

MOONCAKE = RowFormat("mooncake", "timestamp", "input_length", "output_length", 1e3, zero_tokens_is_failure=False)


def read_jsonl_trace(path: Path, content: bytes, row_format: RowFormat) -> Trace:
    """The trace in ``content``, the bytes of the JSON lines file ``path``.

    Raises:
        TraceError: see :func:`qlm_env.workload.traces.read_trace`.
    """
    trace = read_columns(content, row_format)
    return trace if trace is not None else read_rows(path, content, row_format)


def read_columns(content: bytes, row_format: RowFormat) -> Trace | None:
    """Reads a file in the published layout at once; ``None`` for anything else, be it valid or not."""
    fields = dict.fromkeys(row_format.columns, pa.float64())
    try:
        table = pa_json.read_json(
            pa.BufferReader(content),
            parse_options=pa_json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:
        return None
    # Arrow takes several objects on one line for several rows. Missing keys come out as NaN below.
    num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
    if table.num_rows != num_lines:
        return None
    return trace_of_columns(row_format, *(table[name].to_numpy() for name in fields))


def read_rows(path: Path, content: bytes, row_format: RowFormat) -> Trace:
    """Reads any valid file row by row; raises as :func:`read_jsonl_trace` does."""
    rows = TraceRows(path, row_format)
    for line, text in enumerate(decode(path, content).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except ValueError as error:
            hint = format_hint(content, row_format.name)
            raise TraceError(path, f"is not JSON ({_reason(error)}){hint}", line) from None
        if not isinstance(values, dict):
            raise TraceError(path, "is not a JSON object", line)
        rows.add(line, *(_number(path, line, values, column) for column in row_format.columns))
    return rows.trace()


def _reason(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _number(path: Path, line: int, values: dict[str, Any], key: str) -> float:
    if key not in values:
        raise TraceError(path, "the key is missing", line, key)
    number = values[key]
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not abs(number) <= sys.float_info.max:
        raise TraceError(path, f"{json.dumps(number)} is not a finite number", line, key)
    return float(number)
