"""How long weights take between storage, host memory and GPU, fitted to vLLM's sleep-mode measurements."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from qlm_env.spec import ConfigError

DEVICE = "A100"
HOST_LINK_BYTES_PER_S = 32e9
"""The PCIe rating of the measured instances, one direction."""

WEIGHT_BYTES = {
    "Qwen3-0.6B": 2 * 0.596e9,
    "Phi-3-vision-128k-instruct": 2 * 4.147e9,
    "Qwen3-Coder-30B-A3B-Instruct": 2 * 30.53e9,
    "Qwen3-235B-A22B-Instruct-2507-FP8": 235.1e9,
}
"""Of the measured models: published parameter counts times bytes per weight."""


class TransferTime(NamedTuple):
    """``base + bytes / bandwidth`` between host memory and the GPUs of one instance.

    The GPUs load in parallel, each over its own link, until host memory is the bottleneck. Four A100 moved
    weights at twice the rate of one, not four times, hence the second bandwidth.
    """

    base_s: float
    link_bytes_per_s: float
    """Of one GPU."""
    host_bytes_per_s: float
    """Of all GPUs together."""
    fit_error: float
    """Mean absolute relative error at the measurements."""

    def bandwidth_bytes_per_s(self, tp: int) -> float:
        return min(tp * self.link_bytes_per_s, self.host_bytes_per_s)

    def seconds(self, num_bytes: float, tp: int) -> float:
        """Time to move ``num_bytes``, counted over all ``tp`` GPUs."""
        return self.base_s + num_bytes / self.bandwidth_bytes_per_s(tp)

    def faster(self, ratio: float) -> TransferTime:
        """The same over links and host memory with ``ratio`` times the bandwidth."""
        return self._replace(
            link_bytes_per_s=ratio * self.link_bytes_per_s, host_bytes_per_s=ratio * self.host_bytes_per_s
        )


class ColdStartTime(NamedTuple):
    """``base + bytes / bandwidth`` from storage to a serving engine; the base is its process's start-up."""

    base_s: float
    storage_bytes_per_s: float
    fit_error: float

    def seconds(self, num_bytes: float) -> float:
        return self.base_s + num_bytes / self.storage_bytes_per_s


class ResidencyTimes(NamedTuple):
    """The three fits."""

    wake: TransferTime
    sleep: TransferTime
    cold_start: ColdStartTime


A100_TIMES = ResidencyTimes(
    wake=TransferTime(0.334882219, 23_927_254_238.0, 46_324_048_063.0, 0.164343809),
    sleep=TransferTime(0.041126344, 22_292_085_117.0, 40_195_773_377.0, 0.005408061),
    cold_start=ColdStartTime(43.123698516, 4_473_400_348.0, 0.149657134),
)
"""What :func:`fit_residency` gives, for profiles made where the measurements are not at hand."""


def fit_residency(path: Path) -> ResidencyTimes:
    """Fit wake, sleep (level 1) and cold-start times on A100 from a table of sleep-mode measurements.

    Raises:
        ConfigError: the file cannot be read, or lacks what the fits need.
    """
    try:
        frame = pd.read_csv(path, usecols=["gpu", "model", "tp", "level", "op", "mean_s"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    frame = frame[(frame.gpu == DEVICE) & frame.model.isin(list(WEIGHT_BYTES)) & (frame.level != 2)]
    for op in ("wake", "sleep", "cold_load"):
        chosen = frame[frame.op == op]
        if len(chosen[chosen.tp == 1]) < 2 or not (chosen.tp > 1).any():
            raise ConfigError(f"{path} lacks {op} times on {DEVICE} at tp 1 (two models) and above")
    return ResidencyTimes(
        wake=_fit_transfer(frame[frame.op == "wake"]),
        sleep=_fit_transfer(frame[frame.op == "sleep"]),
        cold_start=_fit_cold_start(frame[frame.op == "cold_load"]),
    )


def _fit_transfer(frame: pd.DataFrame) -> TransferTime:
    """Base and link from the single-GPU rows; what host memory gives from the largest instance."""
    base_s, link = _line(frame[frame.tp == 1])
    largest = frame.loc[frame.tp.idxmax()]
    host = WEIGHT_BYTES[largest.model] / (float(largest.mean_s) - base_s)
    fit = TransferTime(base_s, link, host, 0.0)
    predicted = [fit.seconds(WEIGHT_BYTES[row.model], row.tp) for row in frame.itertuples()]
    return fit._replace(fit_error=_relative_error(predicted, frame))


def _fit_cold_start(frame: pd.DataFrame) -> ColdStartTime:
    fit = ColdStartTime(*_line(frame), 0.0)
    predicted = [fit.seconds(WEIGHT_BYTES[model]) for model in frame.model]
    return fit._replace(fit_error=_relative_error(predicted, frame))


def _line(frame: pd.DataFrame) -> tuple[float, float]:
    """Base in seconds and bandwidth in bytes/s of the least-squares line through time against bytes."""
    gigabytes = [WEIGHT_BYTES[model] / 1e9 for model in frame.model]
    s_per_gigabyte, base_s = np.polyfit(gigabytes, frame.mean_s.to_numpy(dtype=float), 1)
    return float(base_s), 1e9 / float(s_per_gigabyte)


def _relative_error(predicted_s: list[float], frame: pd.DataFrame) -> float:
    return float(np.mean(np.abs(np.array(predicted_s) / frame.mean_s.to_numpy(dtype=float) - 1.0)))
