"""Reading measured tables so that a mistake in one ends in a line that names it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qlm_env.spec import ConfigError

Float = NDArray[np.float64]

SHORTEST_LAYER_S = 1e-7
SHORTEST_STEP_S = 1e-6
"""No kernel, and no engine step, is faster; a time below it is in another unit than its column says."""

LONGEST_STEP_S = 3600.0

OUTLIER_RATIO = 50.0
"""Every step reads the weights, so none is this much faster than the fastest tenth of them."""


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file with a header.

    Raises:
        ConfigError: it cannot be read or is no such file; one line.
    """
    try:
        return pd.read_csv(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # also what pandas raises for malformed and empty files
        raise ConfigError(f"{path}: not a CSV table: {' '.join(str(error).split())}") from None


def require_columns(frame: pd.DataFrame, columns: Sequence[str], path: Path) -> None:
    """Raise ConfigError unless ``frame`` has all ``columns``."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ConfigError(f"{path}: missing columns {', '.join(missing)}; it has: {', '.join(map(str, frame.columns))}")


def numbers(frame: pd.DataFrame, name: str, path: Path) -> Float:
    """A column as floats, shape (N,).

    Raises:
        ConfigError: a value is no finite number, or negative; the line of the file is named.
    """
    values = np.asarray(pd.to_numeric(frame[name], errors="coerce"), dtype=np.float64)
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ConfigError(f"{at_row(frame, row, path)}: {name} must be a number >= 0, not {frame[name].iloc[row]}")
    return values


def check_seconds(frame: pd.DataFrame, name: str, seconds: Float, path: Path, shortest_s: float) -> None:
    """Refuse times, shape (N,) as the rows of ``frame``, that no step can take.

    Raises:
        ConfigError: a time is below ``shortest_s``, above an hour, or a small fraction of all the others; the
            line of the file is named.
    """
    if not len(seconds):
        return
    least_s = max(shortest_s, float(np.quantile(seconds, 0.1)) / OUTLIER_RATIO)
    wrong = (seconds < least_s) | (seconds > LONGEST_STEP_S)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ConfigError(
            f"{at_row(frame, row, path)}: {name}={frame[name].iloc[row]} is {seconds[row]:.3g} s, where a time of "
            f"{least_s:.3g} s to {LONGEST_STEP_S:g} s is expected; are units mixed?"
        )


def at_row(frame: pd.DataFrame, row: int, path: Path) -> str:
    """File and line of a row: a header precedes the rows, and rows left out keep their index."""
    return f"{path}, line {int(frame.index[row]) + 2}"
