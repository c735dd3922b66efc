"""Traces published as CSV: the Azure LLM inference traces and BurstGPT.

Columns are found by name (BurstGPT inserts columns between releases), others are ignored, and blank
lines are skipped.
"""

from __future__ import annotations

import csv
import io
import math
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from qlm_env.workload.trace_rows import (
    RowFormat,
    Trace,
    TraceError,
    TraceRows,
    decode,
    first_line,
    format_hint,
    trace_of_columns,
)

AZURE = RowFormat("azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", 1e9, zero_tokens_is_failure=False)
"""Timestamps are dates with up to nine decimals, in UTC or with an offset."""

BURSTGPT = RowFormat("burstgpt", "Timestamp", "Request tokens", "Response tokens", 1.0, zero_tokens_is_failure=True)
"""Timestamps are seconds."""

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
DATE = re.compile(
    r"(\d{4}-\d\d-\d\d(?:[ T]\d\d(?::\d\d(?::\d\d)?)?)?)((?<=:\d\d:\d\d)\.\d{1,9})?"
    r"(Z|[+-]\d\d(?::?\d\d)?)?",
    re.ASCII,
)


def read_csv_trace(path: Path, content: bytes, row_format: RowFormat) -> Trace:
    """The trace in ``content``, the bytes of the CSV file ``path``.

    Raises:
        TraceError: see :func:`qlm_env.workload.traces.read_trace`.
    """
    _check_header(path, content, row_format)
    trace = read_columns(content, row_format)
    return trace if trace is not None else read_rows(path, content, row_format)


def _check_header(path: Path, content: bytes, row_format: RowFormat) -> None:
    try:
        header = next(csv.reader([decode(path, first_line(content))]), [])
    except csv.Error as error:
        problem = f"is not CSV ({error}){format_hint(content, row_format.name)}"
        raise TraceError(path, problem, 1) from None
    for column in row_format.columns:
        if header.count(column) != 1:
            problem = "the column is missing" if column not in header else "the column appears twice"
            raise TraceError(path, problem + format_hint(content, row_format.name), 1, column)


def read_columns(content: bytes, row_format: RowFormat) -> Trace | None:
    """Reads a file in the published layout at once; ``None`` for anything else, be it valid or not."""
    # Arrow takes a quote that is never closed for one long field, and the rest of the file with it.
    if b'"' in content:
        return None
    if row_format is AZURE:
        # Arrow wants an offset on every timestamp of a column or on none.
        second = len(first_line(content)) + 1
        has_offset = re.search(rb"\d(Z|[+-]\d\d:\d\d)\b", first_line(content[second : second + 1000]))
        timestamp_type = pa.timestamp("ns", tz="UTC" if has_offset else None)
    else:
        timestamp_type = pa.float64()
    types = (timestamp_type, pa.float64(), pa.float64())
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(content),
            convert_options=pa_csv.ConvertOptions(
                include_columns=row_format.columns,
                column_types=dict(zip(row_format.columns, types, strict=True)),
                null_values=[],
            ),
        )
    except pa.ArrowException:
        return None
    timestamps, prompt_tokens, output_tokens = table.columns
    ticks = timestamps.cast(pa.int64()) if row_format is AZURE else timestamps
    return trace_of_columns(row_format, ticks.to_numpy(), prompt_tokens.to_numpy(), output_tokens.to_numpy())


def read_rows(path: Path, content: bytes, row_format: RowFormat) -> Trace:
    """Reads any valid file row by row; raises as :func:`read_csv_trace` does."""
    rows = TraceRows(path, row_format)
    reader = csv.reader(io.StringIO(decode(path, content), newline=""), strict=True)
    line = 1
    try:
        header = next(reader)
        position = [header.index(column) for column in row_format.columns]
        line = reader.line_num + 1
        for row in reader:
            if row:
                if len(row) != len(header):
                    raise TraceError(path, f"has {len(row)} fields, the header has {len(header)}", line)
                timestamp, prompt, output = (row[k] for k in position)
                rows.add(
                    line,
                    _ticks(path, line, timestamp, row_format),
                    _number(path, line, prompt, row_format.prompt),
                    _number(path, line, output, row_format.output),
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise TraceError(path, f"is not CSV ({error})", line) from None
    return rows.trace()


def _ticks(path: Path, line: int, text: str, row_format: RowFormat) -> float:
    if row_format is not AZURE:
        return _number(path, line, text, row_format.timestamp)
    match = DATE.fullmatch(text.strip())
    if match:
        whole, decimals, offset = match.groups()
        time = "" if " " in whole or "T" in whole else "T00"
        with suppress(ValueError):
            seconds = round(datetime.fromisoformat(f"{whole}{time}{offset or '+00:00'}").timestamp())
            nanoseconds = seconds * 10**9 + int((decimals or ".")[1:].ljust(9, "0"))
            # Outside (years 1677 to 2262) they do not fit 64 bits.
            if abs(nanoseconds) < 2**63:
                return nanoseconds
    raise TraceError(
        path, f"{text!r} is not a date and time such as 2023-11-16 18:15:46.68", line, row_format.timestamp
    )


def _number(path: Path, line: int, text: str, column: str) -> float:
    number = float(text) if NUMBER.fullmatch(text.strip()) else math.nan
    if not math.isfinite(number):
        raise TraceError(path, f"{text!r} is not a number", line, column)
    return number
