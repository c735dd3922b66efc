"""Quantile tables of published request lengths, as shipped in ``data/``.

A table keeps the dependence between prompt and output without shipping the data: the quantiles of the
prompt length and, for each of several equally likely ranges of the prompt length, those of the output
length. :mod:`qlm_env.workload.quantiles` makes them.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray


class LengthTable(NamedTuple):
    """Quantiles of prompt and output tokens; between them lengths are interpolated linearly."""

    probabilities: NDArray[np.float64]
    """Shape (P,), from 0 to 1."""
    prompt_tokens: NDArray[np.float64]
    """Shape (P,)."""
    output_tokens: NDArray[np.float64]
    """Shape (B, P): one row per equally likely range of the prompt length, shortest first."""


@functools.cache
def load_length_table(name: str) -> LengthTable:
    """The shipped table ``name`` (``sharegpt`` or ``azure_conv``), as read-only arrays."""
    text = resources.files("qlm_env.workload.data").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    table = LengthTable(*(np.array(values[field], dtype=np.float64) for field in LengthTable._fields))
    for column in table:
        column.flags.writeable = False
    return table
