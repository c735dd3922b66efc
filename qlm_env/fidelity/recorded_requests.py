"""``requests.jsonl`` of a recorded run: one JSON object per request.

========================  ===============================================================================
``request_id``            text
``input_toks``            prompt tokens
``output_toks``           generated tokens
``arrival_time``          seconds on the client's clock, when the request was handed to the server
``queued_ts``             seconds on the engine's clock, when the engine took it in; optional
``scheduled_ts``          seconds on the engine's clock, at its first entry into a batch; optional
``first_token_ts``        seconds on the engine's clock
``last_token_ts``         seconds on the engine's clock
``slo_class``             name of an SLO class; optional
========================  ===============================================================================

**Which clock is which.** vLLM stamps the arrival with wall-clock time in its front end and everything else with
monotonic time in the engine core. An engine takes new requests in between two steps, so ``queued_ts`` is late by up to
a step; but the least delayed request tells how far the clocks are apart, up to the time that the front end took for it
(tokenisation and hand-over, about a millisecond). Arrivals are moved to the engine's clock by that distance:

``arrival_s = arrival_time + min(queued_ts - arrival_time)``

so that latencies count from the arrival as the client saw it, waiting for the running step included. Where
``queued_ts`` is recorded for no request, all times are taken to be of one clock.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.fidelity.run_error import RunError
from qlm_env.workload.lengths import MAX_TOKENS

Float = NDArray[np.float64]
Int = NDArray[np.int64]

REQUIRED_TIMES = ("arrival_time", "first_token_ts", "last_token_ts")
OPTIONAL_TIMES = ("queued_ts", "scheduled_ts")
ENGINE_ORDER = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")


class RecordedRequests(NamedTuple):
    """Requests in order of arrival, arrays of shape (N,); times in seconds after the first arrival."""

    prompt_tokens: Int
    output_tokens: Int
    arrival_s: Float
    scheduled_s: Float
    """NaN where it was not recorded."""
    first_token_s: Float
    last_token_s: Float
    slo_class: tuple[str | None, ...]
    line: Int
    """Where in the file the request stands, from 1."""


def read_requests(path: Path) -> RecordedRequests:
    """The requests in ``path``.

    Raises:
        ConfigError: the file cannot be read, holds no request, or a line is no JSON object, lacks a field, or has a
            length or a time that cannot be; one line with file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(path, error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise RunError(path, "is not UTF-8 text") from None
    rows = [_read_line(path, number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        raise RunError(path, "holds no request")
    rows.sort(key=lambda row: row["arrival_time"])
    times = {name: np.array([row[name] for row in rows]) for name in (*REQUIRED_TIMES, *OPTIONAL_TIMES)}
    arrival = times["arrival_time"] + _clock_distance_s(times)
    line = np.array([row["line"] for row in rows])
    for row in (times["first_token_ts"] < arrival).nonzero()[0][:1]:
        raise RunError(path, "the first token came before the request", int(line[row]), "first_token_ts")
    start = arrival[0]
    return RecordedRequests(
        prompt_tokens=np.array([row["input_toks"] for row in rows]),
        output_tokens=np.array([row["output_toks"] for row in rows]),
        arrival_s=arrival - start,
        scheduled_s=times["scheduled_ts"] - start,
        first_token_s=times["first_token_ts"] - start,
        last_token_s=times["last_token_ts"] - start,
        slo_class=tuple(row["slo_class"] for row in rows),
        line=line,
    )


def _clock_distance_s(times: dict[str, Float]) -> float:
    """What has to be added to an arrival to have it on the engine's clock."""
    delay = times["queued_ts"] - times["arrival_time"]
    return 0.0 if np.isnan(delay).all() else float(np.nanmin(delay))


def _read_line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise RunError(path, f"is not JSON ({reason})", number) from None
    if not isinstance(values, dict):
        raise RunError(path, "is not a JSON object", number)
    row: dict[str, Any] = {"line": number}
    for name in ("input_toks", "output_toks"):
        row[name] = _length(path, number, values, name)
    for name in REQUIRED_TIMES:
        row[name] = _time(path, number, values, name)
    for name in OPTIONAL_TIMES:
        row[name] = math.nan if values.get(name) is None else _time(path, number, values, name)
    known = [name for name in ENGINE_ORDER if not math.isnan(row[name])]
    for earlier, later in itertools.pairwise(known):
        if row[later] < row[earlier]:
            raise RunError(path, f"is before {earlier}", number, later)
    slo_class = values.get("slo_class")
    if slo_class is not None and not isinstance(slo_class, str):
        raise RunError(path, f"{json.dumps(slo_class)} is no name of an SLO class", number, "slo_class")
    row["slo_class"] = slo_class
    return row


def _number(path: Path, line: int, values: dict[str, Any], field: str) -> int | float:
    if field not in values:
        raise RunError(path, "is missing", line, field)
    number = values[field]
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= sys.float_info.max:
        raise RunError(path, f"{json.dumps(number)} is not a finite number", line, field)
    return number


def _length(path: Path, line: int, values: dict[str, Any], field: str) -> int:
    number = _number(path, line, values, field)
    if number != int(number) or not 1 <= number <= MAX_TOKENS:
        raise RunError(path, f"{number} is not a whole number from 1 to {MAX_TOKENS}", line, field)
    return int(number)


def _time(path: Path, line: int, values: dict[str, Any], field: str) -> float:
    number = _number(path, line, values, field)
    if number < 0:
        raise RunError(path, f"{number} is negative", line, field)
    return float(number)
