"""Tables of engine steps and how long each took, and the readers of published formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qlm_env.profiles.table_checks import SHORTEST_STEP_S, at_row, check_seconds, numbers, read_table, require_columns
from qlm_env.spec import ConfigError

REGIMES = ("prefill", "decode", "mixed")

Float = NDArray[np.float64]


class StepTable(NamedTuple):
    """Engine steps and how long each took. All arrays have shape (N,)."""

    new_tokens: Float
    decodes: Float
    """Decoding sequences in the step."""
    kv_tokens: Float
    """Tokens cached before the step by its decodes, summed."""
    attention_tokens2: Float
    """``q*(k + q/2)`` summed over the prefill chunks of ``q`` new and ``k`` cached tokens."""
    latency_s: Float
    regime: NDArray[np.int64]
    """Index into :data:`REGIMES`."""

    def rows(self, chosen: NDArray[np.bool_]) -> StepTable:
        """The rows where ``chosen``, shape (N,), is true."""
        return StepTable(
            self.new_tokens[chosen],
            self.decodes[chosen],
            self.kv_tokens[chosen],
            self.attention_tokens2[chosen],
            self.latency_s[chosen],
            self.regime[chosen],
        )


AEGAEON_COLUMNS = ("input_len", "batch", "prefill_s", "decode_s")
AEGAEON_TOKEN_LIMIT = 4096
AEGAEON_BATCH_LIMIT = 120
"""Aegaeon's engine split larger prefills and batches over several steps."""

AEGAEON_DECODE_STEPS = 9
"""Its benchmark generates ten tokens, one by the prefill and nine by the steps that ``decode_s`` averages."""

STEP_COLUMNS = ("kind", "prefill_tokens", "prefix", "decode_seqs", "context_len")
LATENCY_UNITS = {"latency_ms": 1e-3, "latency_s": 1.0, "latency_us": 1e-6}
REGIME_RATIO = 200.0
"""Between the fastest steps of two regimes: far above what lengths explain, and below a factor of 1,000."""

SELECTORS = ("system", "device", "backend", "model", "tp")
"""Columns that tell several measured systems in one file apart."""


def read_step_table(path: Path, selection: Mapping[str, str | int | None]) -> StepTable:
    """The steps in a CSV file, in either of two formats told apart by the header.

    *One step a row* (AIConfigurator's columns): ``kind`` (prefill, decode or mixed), a prefill chunk of
    ``prefill_tokens`` after ``prefix`` cached ones, ``decode_seqs`` decodes of ``context_len`` cached tokens
    each, and the time in ``latency_ms`` (or ``latency_s`` or ``latency_us``).

    *Aegaeon's* (SOSP 2025 artifact): ``input_len``, ``batch``, ``prefill_s``, ``decode_s``. A row gives two
    steps: the prefill of ``batch`` prompts of ``input_len`` tokens, and a decode of ``batch`` sequences. The
    latter is the mean over nine decode steps, so its cached tokens are, on average, ``input_len + 4`` per
    sequence.

    Args:
        selection: values that the columns of :data:`SELECTORS` must have, where the file has them; ``None``
            and columns not mentioned leave the choice open.

    Raises:
        ConfigError: the file cannot be read; a column is missing; there are no rows, or several systems, for
            the selection; two latency columns; a value that is no number, negative, or a time that no step can
            take. One line with file and cause.
    """
    frame = read_table(path)
    if {"input_len", "batch"} <= set(frame.columns):
        require_columns(frame, AEGAEON_COLUMNS, path)
        table = _aegaeon_steps(_select(frame, path, selection), path)
    else:
        latency = _latency_column(frame, path)
        require_columns(frame, [*STEP_COLUMNS, latency], path)
        table = _steps(_select(frame, path, selection), path, latency)
    _check_one_unit(table, path)
    return table


def _check_one_unit(table: StepTable, path: Path) -> None:
    """Refuse a table whose regimes differ in unit: the fastest step of each reads the same weights."""
    fastest = {
        name: float(table.latency_s[table.regime == index].min())
        for index, name in enumerate(REGIMES)
        if (table.regime == index).any()
    }
    low, high = min(fastest, key=fastest.__getitem__), max(fastest, key=fastest.__getitem__)
    if fastest[high] > REGIME_RATIO * fastest[low]:
        raise ConfigError(
            f"{path}: mixed units: the fastest {high} step takes {fastest[high]:.3g} s and the fastest {low} step "
            f"{fastest[low]:.3g} s"
        )


def _latency_column(frame: pd.DataFrame, path: Path) -> str:
    present = [name for name in LATENCY_UNITS if name in frame.columns]
    if len(present) > 1:
        raise ConfigError(f"{path}: mixed units: it has the columns {' and '.join(present)}; keep one")
    return present[0] if present else "latency_ms"


def _select(frame: pd.DataFrame, path: Path, selection: Mapping[str, str | int | None]) -> pd.DataFrame:
    columns = [name for name in SELECTORS if name in frame.columns]
    for name in columns:
        chosen, values = selection.get(name), frame[name].astype(str)
        if chosen is not None:
            if str(chosen) not in set(values):
                raise ConfigError(f"{path} has no rows for {name}={chosen}; it has: {', '.join(sorted(set(values)))}")
            frame = frame[values == str(chosen)]
    for name in columns:
        choices = sorted(set(frame[name].astype(str)))
        if len(choices) > 1:
            raise ConfigError(f"{path} holds several systems; choose {name} among: {', '.join(choices)}")
    if frame.empty:
        raise ConfigError(f"{path} has no rows")
    return frame


def _steps(frame: pd.DataFrame, path: Path, latency: str) -> StepTable:
    unknown = sorted(set(frame.kind.astype(str)) - set(REGIMES))
    if unknown:
        raise ConfigError(f"{path}: kind must be one of {', '.join(REGIMES)}, not {unknown[0]}")
    regime = np.array([REGIMES.index(kind) for kind in frame.kind], dtype=np.int64)
    chunk, prefix, decodes, context = (numbers(frame, name, path) for name in STEP_COLUMNS[1:])
    does_not_fit = (chunk > 0) != (regime != REGIMES.index("decode"))
    does_not_fit |= (decodes > 0) != (regime != REGIMES.index("prefill"))
    if does_not_fit.any():
        row = int(np.argmax(does_not_fit))
        raise ConfigError(
            f"{at_row(frame, row, path)}: a {frame.kind.iloc[row]} step cannot have "
            f"{chunk[row]:g} prefill_tokens and {decodes[row]:g} decode_seqs"
        )
    seconds = numbers(frame, latency, path) * LATENCY_UNITS[latency]
    check_seconds(frame, latency, seconds, path, SHORTEST_STEP_S)
    return StepTable(
        new_tokens=chunk + decodes,
        decodes=decodes,
        kv_tokens=decodes * context,
        attention_tokens2=chunk * (prefix + chunk / 2),
        latency_s=seconds,
        regime=regime,
    )


def _aegaeon_steps(frame: pd.DataFrame, path: Path) -> StepTable:
    prompt, batch = numbers(frame, "input_len", path), numbers(frame, "batch", path)
    frame = frame[(prompt * batch <= AEGAEON_TOKEN_LIMIT) & (batch <= AEGAEON_BATCH_LIMIT)]
    prompt, batch, prefill_s, decode_s = (numbers(frame, name, path) for name in AEGAEON_COLUMNS)
    for name, seconds in (("prefill_s", prefill_s), ("decode_s", decode_s)):
        check_seconds(frame, name, seconds, path, SHORTEST_STEP_S)
    context = prompt + (AEGAEON_DECODE_STEPS - 1) / 2
    none = np.zeros_like(batch)
    return StepTable(
        new_tokens=np.concatenate([batch * prompt, batch]),
        decodes=np.concatenate([none, batch]),
        kv_tokens=np.concatenate([none, batch * context]),
        attention_tokens2=np.concatenate([batch * prompt**2 / 2, none]),
        latency_s=np.concatenate([prefill_s, decode_s]),
        regime=np.repeat([REGIMES.index("prefill"), REGIMES.index("decode")], len(batch)),
    )
