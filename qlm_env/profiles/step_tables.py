"""Readers of published step-latency tables."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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


AEGAEON_TOKEN_LIMIT = 4096
AEGAEON_BATCH_LIMIT = 120
"""Aegaeon's engine split larger prefills and batches over several steps."""

AEGAEON_DECODE_STEPS = 9
"""Its benchmark generates ten tokens, one by the prefill and nine by the steps that ``decode_s`` averages."""


def read_aegaeon(path: Path, model: str, device: str) -> StepTable:
    """Steps of ``model`` on ``device`` from Aegaeon's measurements (SOSP 2025 artifact; fp16, eager, tp 1).

    A row gives two steps: the prefill of ``batch`` prompts of ``input_len`` tokens, and a decode of ``batch``
    sequences. The latter is the mean over nine decode steps, so its cached tokens are, on average,
    ``input_len + 4`` per sequence.

    Raises:
        ConfigError: the file cannot be read, or has no such rows.
    """
    frame = _read(path, ["model", "device", "input_len", "batch", "prefill_s", "decode_s"])
    frame = frame[(frame.model == model) & (frame.device == device)]
    frame = frame[(frame.input_len * frame.batch <= AEGAEON_TOKEN_LIMIT) & (frame.batch <= AEGAEON_BATCH_LIMIT)]
    _require_rows(frame, path, f"{model} on {device}")
    prompt, batch = _column(frame, "input_len"), _column(frame, "batch")
    context = prompt + (AEGAEON_DECODE_STEPS - 1) / 2
    none = np.zeros_like(batch)
    return StepTable(
        new_tokens=np.concatenate([batch * prompt, batch]),
        decodes=np.concatenate([none, batch]),
        kv_tokens=np.concatenate([none, batch * context]),
        attention_tokens2=np.concatenate([batch * prompt**2 / 2, none]),
        latency_s=np.concatenate([_column(frame, "prefill_s"), _column(frame, "decode_s")]),
        regime=np.repeat([REGIMES.index("prefill"), REGIMES.index("decode")], len(batch)),
    )


def read_aiconfigurator(path: Path, model: str, system: str, tp: int) -> StepTable:
    """Steps of ``model`` on ``tp`` GPUs of ``system`` as AIConfigurator predicts them for vLLM.

    A row is one step: a prefill chunk of ``prefill_tokens`` after ``prefix`` cached ones, together with
    ``decode_seqs`` decodes of ``context_len`` cached tokens each.

    Raises:
        ConfigError: the file cannot be read, or has no such rows.
    """
    frame = _read(
        path,
        [
            "system",
            "model",
            "tp",
            "kind",
            "prefill_tokens",
            "prefix",
            "decode_seqs",
            "context_len",
            "latency_ms",
        ],
    )
    frame = frame[(frame.model == model) & (frame.system == system) & (frame.tp == tp)]
    _require_rows(frame, path, f"{model} on {system} tp={tp}")
    chunk, decodes = _column(frame, "prefill_tokens"), _column(frame, "decode_seqs")
    return StepTable(
        new_tokens=chunk + decodes,
        decodes=decodes,
        kv_tokens=decodes * _column(frame, "context_len"),
        attention_tokens2=chunk * (_column(frame, "prefix") + chunk / 2),
        latency_s=_column(frame, "latency_ms") / 1e3,
        regime=np.array([REGIMES.index(kind) for kind in frame.kind], dtype=np.int64),
    )


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        return pd.read_csv(path, usecols=columns)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _require_rows(frame: pd.DataFrame, path: Path, what: str) -> None:
    if frame.empty:
        raise ConfigError(f"{path} has no rows for {what}")


def _column(frame: pd.DataFrame, name: str) -> Float:
    return np.asarray(frame[name], dtype=np.float64)
