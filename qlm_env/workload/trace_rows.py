"""What every trace format shares: the file as bytes, the rows as columns, and errors that say where.

A trace is read whole or not at all. Each format has a vectorised reader that gives up on anything
unusual, and a row-by-row reader that accepts every valid file and otherwise names the line and column.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.spec import ConfigError
from qlm_env.workload.lengths import MAX_TOKENS

TraceFormat = Literal["azure", "mooncake", "burstgpt"]

GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"


class TraceError(ConfigError):
    """A trace file that cannot be read; the message names the file, the line (from 1) and the column."""

    def __init__(self, path: Path, problem: str, line: int | None = None, column: str | None = None) -> None:
        where = f"{path}" + (f", line {line}" if line else "") + (f", column {column!r}" if column else "")
        super().__init__(f"{where}: {problem}")
        self.path, self.line, self.column = path, line, column


class Trace(NamedTuple):
    """Requests of a trace in order of arrival; arrays of shape (N,)."""

    arrival_s: NDArray[np.float64]
    """Seconds since the file's first timestamp."""
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    num_failed: int
    """Rows left out because the request failed (BurstGPT logs these with 0 tokens)."""


class RowFormat(NamedTuple):
    """Names of the three fields a trace format must have, and the meaning of their values."""

    name: TraceFormat
    timestamp: str
    prompt: str
    output: str
    ticks_per_s: float
    """Unit of the parsed timestamps."""
    zero_tokens_is_failure: bool

    @property
    def columns(self) -> tuple[str, str, str]:
        """Names of the timestamp, prompt and output columns."""
        return self.timestamp, self.prompt, self.output


class TraceRows:
    """Collects the rows of one trace and refuses the first that is wrong."""

    def __init__(self, path: Path, row_format: RowFormat) -> None:
        self._path, self._format = path, row_format
        self._ticks: list[float] = []
        self._kept_ticks: list[float] = []
        self._prompt_tokens: list[int] = []
        self._output_tokens: list[int] = []

    def add(self, line: int, ticks: float, prompt_tokens: float, output_tokens: float) -> None:
        """Append one row; ``ticks`` is its timestamp in the format's unit.

        Raises:
            TraceError: the timestamp is before the previous one, or a length is fractional, below 1
                (0 is a failed request in formats that log those) or above ``MAX_TOKENS``.
        """
        if self._ticks and ticks < self._ticks[-1]:
            raise self._error("is earlier than the row before it; rows must be in order of time", line)
        lengths = {self._format.prompt: prompt_tokens, self._format.output: output_tokens}
        minimum = 0 if self._format.zero_tokens_is_failure else 1
        for column, tokens in lengths.items():
            if tokens != int(tokens):
                raise self._error(f"{tokens} is not a whole number", line, column)
            if not minimum <= tokens <= MAX_TOKENS:
                raise self._error(f"{int(tokens)} is not a length from {minimum} to {MAX_TOKENS}", line, column)
        self._ticks.append(ticks)
        if min(prompt_tokens, output_tokens) > 0:
            self._kept_ticks.append(ticks)
            self._prompt_tokens.append(int(prompt_tokens))
            self._output_tokens.append(int(output_tokens))

    def trace(self) -> Trace:
        """The rows as a trace.

        Raises:
            TraceError: there is no row, or every request failed.
        """
        if not self._ticks:
            raise TraceError(self._path, "holds no requests")
        if not self._kept_ticks:
            raise TraceError(self._path, f"holds no requests: all {len(self._ticks)} failed (0 tokens)")
        return Trace(
            (np.array(self._kept_ticks) - self._ticks[0]) / self._format.ticks_per_s,
            np.array(self._prompt_tokens, dtype=np.int32),
            np.array(self._output_tokens, dtype=np.int32),
            len(self._ticks) - len(self._kept_ticks),
        )

    def _error(self, problem: str, line: int, column: str | None = None) -> TraceError:
        return TraceError(self._path, problem, line, column or self._format.timestamp)


def trace_of_columns(
    row_format: RowFormat,
    ticks: NDArray[np.int64] | NDArray[np.float64],
    prompt_tokens: NDArray[np.float64],
    output_tokens: NDArray[np.float64],
) -> Trace | None:
    """The trace of parsed columns of shape (N,), or ``None`` where :class:`TraceRows` would refuse a row."""
    minimum = 0 if row_format.zero_tokens_is_failure else 1
    for tokens in (prompt_tokens, output_tokens):
        # Written so that NaN fails.
        if not np.all((tokens >= minimum) & (tokens <= MAX_TOKENS) & (tokens == np.floor(tokens))):
            return None
    if not np.isfinite(ticks).all() or np.any(ticks[1:] < ticks[:-1]):
        return None
    kept = np.minimum(prompt_tokens, output_tokens) > 0
    if not kept.any():
        return None
    return Trace(
        (ticks[kept] - ticks[0]) / row_format.ticks_per_s,
        prompt_tokens[kept].astype(np.int32),
        output_tokens[kept].astype(np.int32),
        int(kept.size - np.count_nonzero(kept)),
    )


def read_bytes(path: Path) -> bytes:
    """The content of ``path``, without a byte order mark; gzip is recognised by content and decompressed.

    Raises:
        TraceError: the file is missing or unreadable, truncated gzip, or empty.
    """
    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise TraceError(path, "is not a complete gzip file") from None
    except OSError as error:
        raise TraceError(path, f"cannot be read ({error.strerror})") from None
    content = content.removeprefix(UTF8_BOM)
    if not content or content.isspace():
        raise TraceError(path, "is empty")
    return content


def decode(path: Path, content: bytes) -> str:
    """``content`` as UTF-8 text.

    Raises:
        TraceError: a byte is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TraceError(path, "is not UTF-8 text", line) from None


def first_line(content: bytes) -> bytes:
    """The first line of ``content``, without its end."""
    end = content.find(b"\n")
    return content if end < 0 else content[:end]


def format_hint(content: bytes, chosen: TraceFormat) -> str:
    """A remark naming the format the first line looks like, where that is not the ``chosen`` one."""
    first = first_line(content.lstrip())
    signs: dict[TraceFormat, bool] = {
        "azure": b"ContextTokens" in first or b"GeneratedTokens" in first,
        "burstgpt": b"Request tokens" in first or b"Response tokens" in first,
        "mooncake": first.startswith(b"{"),
    }
    likely = [name for name, seen in signs.items() if seen and name != chosen]
    return f"; the file looks like format: {likely[0]}" if likely else ""
