"""``timeseries.csv`` of a recorded run: the engine's own counts, once per tick."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qlm_env.fidelity.run_error import RunError

Float = NDArray[np.float64]

COLUMNS = ("t", "running", "waiting")


class RecordedSeries(NamedTuple):
    """What the engine held over time, shape (T,)."""

    time_s: Float
    """Since the recording of the series began, which is about the first arrival."""
    running: Float
    waiting: Float


def read_series(path: Path) -> RecordedSeries:
    """The columns ``t``, ``running`` and ``waiting`` of ``path``.

    Raises:
        ConfigError: the file cannot be read, lacks a column, or holds something else than non-negative numbers with
            ascending times.
    """
    try:
        frame = pd.read_csv(path, usecols=list(COLUMNS))
    except OSError as error:
        raise RunError(path, error.strerror or str(error)) from None
    except ValueError as error:
        raise RunError(path, " ".join(str(error).split())) from None
    columns = []
    for name in COLUMNS:
        values = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64)
        for row in (~(values >= 0)).nonzero()[0][:1]:
            raise RunError(path, f"'{frame[name].iloc[row]}' is not a non-negative number", int(row) + 2, name)
        columns.append(values)
    for row in (np.diff(columns[0]) <= 0).nonzero()[0][:1]:
        raise RunError(path, "times do not ascend", int(row) + 3, "t")
    return RecordedSeries(*columns)
