"""What GPUs draw while they serve, from Splitwise's measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from qlm_env.profiles.table_checks import numbers, read_table, require_columns
from qlm_env.spec import ConfigError

MODEL = "llama2-70b"
HARDWARE = "a100-80gb"
CONTEXT_TOKENS = 4096
"""Of the model measured: runs beyond it drew hardly more than an idle GPU."""


class BusyPower(NamedTuple):
    """Mean power of a GPU that serves, as a share of its board's limit, by tensor-parallel degree."""

    shares: Mapping[int, float]
    source: str

    def share(self, tp: int) -> tuple[float, int]:
        """The share at the measured degree nearest to ``tp``, and that degree."""
        nearest = min(self.shares, key=lambda measured: (abs(measured - tp), measured))
        return self.shares[nearest], nearest


SOURCE = "the mean share of the limit over Splitwise's runs of Llama-2-70B on A100 (splitwise-sim, MIT)"

A100_BUSY = BusyPower({2: 0.742216, 4: 0.602263, 8: 0.435934}, SOURCE)
"""What :func:`fit_busy_power` gives, for profiles made where the measurements are not at hand."""


def fit_busy_power(path: Path) -> BusyPower:
    """Mean power shares on A100 by tensor-parallel degree; the table gives power relative to the limit.

    Rows without a reading are left out; on H100 there is none.

    Raises:
        ConfigError: the file cannot be read, or has no readings for the model on A100.
    """
    frame = read_table(path)
    columns = ("prompt_size", "token_size", "average_power", "tensor_parallel")
    require_columns(frame, ["model", "hardware", *columns], path)
    frame = frame[(frame.model == MODEL) & (frame.hardware == HARDWARE)]
    prompt, tokens, share, tp = (numbers(frame, name, path) for name in columns)
    chosen = (share > 0) & (prompt + tokens <= CONTEXT_TOKENS)
    if not chosen.any():
        raise ConfigError(f"{path} has no power readings of {MODEL} on {HARDWARE}")
    return BusyPower(
        {int(degree): float(share[chosen & (tp == degree)].mean()) for degree in sorted(set(tp[chosen]))}, SOURCE
    )
