"""A recorded run replayed with step times interpolated between measured layers, one step at a time.

The emulator's step-time formula is linear in the cached tokens, which is what lets it leap. This replay keeps every
bend of the measurements instead, on the step-by-step reference engine; what it predicts better than
:func:`qlm_env.fidelity.replay.replay` is what the formula costs, and what it misses is not in the layers' times.

Attention is measured for one prefill chunk beside decodes of equal length. For other steps it is put together so:

- decodes of unequal length take the time of as many of the mean length, plus a share ``alpha`` of what they would take
  at the greatest length beyond that (``t(mean) + alpha * (t(max) - t(mean))``, the profiler's own form and constant);
- several prefill chunks take the sum of their times, less the time of a smallest call for each after the first;
- decodes beside prefill chunks add what they were measured to add to the measured chunk nearest to these chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from qlm_env.backends.emulator.reference import Chunk, StepEngine, StepRequest, serve_by_steps
from qlm_env.fidelity.recorded import RecordedRun
from qlm_env.fidelity.replay import ReplayedRun, make_requests
from qlm_env.profiles import Profile, usable_kv_blocks
from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES
from qlm_env.profiles.layerwise import LayerTimes, read_layer_times, step_outside_attention_s
from qlm_env.spec import ConfigError

Float = NDArray[np.float64]


class Surface(NamedTuple):
    """A time against two counts, shapes (X,), (Y,) and (X, Y)."""

    x: Float
    y: Float
    seconds: Float

    def at(self, x: float, y: float) -> float:
        """Bilinear interpolation; constant beyond the grid in ``x``, and along its last slope in ``y``."""
        x = min(max(x, self.x[0]), self.x[-1])
        y = max(y, self.y[0])
        i = min(max(int(np.searchsorted(self.x, x)) - 1, 0), max(0, len(self.x) - 2))
        j = min(max(int(np.searchsorted(self.y, y)) - 1, 0), max(0, len(self.y) - 2))
        u = (x - self.x[i]) / (self.x[i + 1] - self.x[i]) if len(self.x) > 1 else 0.0
        v = (y - self.y[j]) / (self.y[j + 1] - self.y[j]) if len(self.y) > 1 else 0.0
        corner = self.seconds[i : i + 2, j : j + 2]
        low = corner[0] if u == 0.0 else corner[0] + u * (corner[1] - corner[0])
        return float(low[0] if len(low) == 1 else low[0] + v * (low[1] - low[0]))


def make_surface(x: Float, y: Float, seconds: Float) -> Surface:
    """The surface through scattered grid points, shapes (N,).

    Points that were not measured (the largest batches at the longest contexts) continue their row's last slope.

    Raises:
        ConfigError: a row has no measured point.
    """
    surface = Surface(np.unique(x), np.unique(y), np.full((len(np.unique(x)), len(np.unique(y))), np.nan))
    surface.seconds[np.searchsorted(surface.x, x), np.searchsorted(surface.y, y)] = seconds
    for row in surface.seconds:
        known = np.isfinite(row).nonzero()[0]
        row[:] = np.interp(surface.y, surface.y[known], row[known])
        if len(known) > 1:
            last, before = known[-1], known[-2]
            slope = (row[last] - row[before]) / (surface.y[last] - surface.y[before])
            row[last + 1 :] = row[last] + slope * (surface.y[last + 1 :] - surface.y[last])
    return surface


class LayerSteps:
    """The time of any step of one model, interpolated between the times of its layers."""

    def __init__(self, times: LayerTimes, architecture: str, device: str, alpha: float) -> None:
        self._times = times
        self._architecture, self._device = ARCHITECTURES[architecture], DEVICES[device]
        self._alpha = alpha
        attention = times.attention
        alone = (attention.prefill_chunk == 0) & (attention.n_decode > 0)
        chunks = (attention.prefill_chunk > 0) & (attention.n_decode == 0)
        self._decodes = make_surface(attention.n_decode[alone], attention.kv_decode[alone], attention.seconds[alone])
        self._chunks = make_surface(
            attention.prefill_chunk[chunks], attention.kv_prefill[chunks], attention.seconds[chunks]
        )
        self._smallest_s = float(attention.seconds.min())
        self._beside: dict[tuple[float, float], Surface] = {}
        self._outside: dict[tuple[int, int], float] = {}

    def seconds(self, chunks: Sequence[tuple[int, int]], contexts: Sequence[int]) -> float:
        """One step.

        Args:
            chunks: new and cached tokens of each prefill chunk.
            contexts: cached tokens of each decode.
        """
        # vLLM computes the logits of one token of every request in the step, whether or not it is its last.
        outside = (sum(new for new, _ in chunks) + len(contexts), len(chunks) + len(contexts))
        if outside not in self._outside:
            self._outside[outside] = float(
                step_outside_attention_s(
                    self._times, self._architecture, self._device, *(np.array([float(number)]) for number in outside)
                )[0]
            )
        return self._outside[outside] + self._architecture.layers * self._attention_s(chunks, contexts)

    def _attention_s(self, chunks: Sequence[tuple[int, int]], contexts: Sequence[int]) -> float:
        if not chunks:
            return self._uneven(self._decodes, contexts)
        seconds = sum(self._chunks.at(*chunk) for chunk in chunks) - (len(chunks) - 1) * self._smallest_s
        if contexts:
            tokens = sum(new for new, _ in chunks)
            cached = sum(new * cached for new, cached in chunks) / tokens
            seconds += max(0.0, self._uneven(self._added_beside(tokens, cached), contexts))
        return seconds

    def _uneven(self, surface: Surface, contexts: Sequence[int]) -> float:
        mean_s = surface.at(len(contexts), sum(contexts) / len(contexts))
        if self._alpha == 0.0:
            return mean_s
        return mean_s + self._alpha * (surface.at(len(contexts), max(contexts)) - mean_s)

    def _added_beside(self, tokens: float, cached: float) -> Surface:
        """What decodes add to a chunk of about ``tokens`` after about ``cached``."""
        chunk = self._chunks.x[np.argmin(np.abs(np.log(self._chunks.x / tokens)))]
        before = self._chunks.y[np.argmin(np.abs(self._chunks.y - cached))]
        if (chunk, before) not in self._beside:
            attention = self._times.attention
            beside = (attention.prefill_chunk == chunk) & (attention.n_decode > 0)
            if (beside & (attention.kv_prefill == before)).any():
                beside &= attention.kv_prefill == before
            else:
                beside &= attention.kv_prefill == attention.kv_prefill[beside].min()
            self._beside[chunk, before] = make_surface(
                attention.n_decode[beside],
                attention.kv_decode[beside],
                attention.seconds[beside] - self._chunks.at(chunk, before),
            )
        return self._beside[chunk, before]


@dataclass
class LayerStepEngine(StepEngine):
    """The reference engine with interpolated step times."""

    layer_steps: LayerSteps | None = None

    def step_time_s(self, chunks: list[Chunk]) -> float:
        assert self.layer_steps is not None
        return self.layer_steps.seconds(
            [(chunk.tokens, chunk.cached) for chunk in chunks if not chunk.decode],
            [chunk.cached for chunk in chunks if chunk.decode],
        )


def read_layer_steps(folder: Path, profile: Profile) -> LayerSteps:
    """The layer times in ``folder``, of the profile's architecture, device and tp.

    Raises:
        ConfigError: a file is missing or malformed, or the profile's device or architecture is not known.
    """
    for name, known in (("device", DEVICES), ("architecture", ARCHITECTURES)):
        if getattr(profile, name) not in known:
            raise ConfigError(
                f"'layer_times': the {name} {getattr(profile, name)} is not known; allowed: {', '.join(known)}"
            )
    times = read_layer_times(folder, profile.tp)
    return LayerSteps(times, profile.architecture, profile.device, _skew_share(folder / "meta.yaml", profile.tp))


def replay_by_steps(
    run: RecordedRun, profile: Profile, layer_steps: LayerSteps, class_names: tuple[str, ...]
) -> ReplayedRun:
    """As :func:`qlm_env.fidelity.replay.replay`, with the profile's memory but interpolated step times.

    Raises:
        ConfigError: as there.
    """
    table = make_requests(run, profile, class_names)
    settings = run.engine.settings
    columns = (table[name].tolist() for name in ("arrival_s", "prompt_tokens", "output_tokens", "slo_class"))
    requests = [StepRequest(row, *values) for row, values in enumerate(zip(*columns, strict=True))]
    engine = LayerStepEngine(
        coefficients=(),
        num_blocks=usable_kv_blocks(profile, settings),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        chunked_prefill=settings.enable_chunked_prefill,
        priority=settings.scheduling_policy == "priority",
        async_scheduling=settings.async_scheduling,
        enable_prefix_caching=settings.enable_prefix_caching,
        layer_steps=layer_steps,
    )
    serve_by_steps(engine, requests)
    return ReplayedRun(
        scheduled_s=np.array([request.scheduled_s for request in requests]),
        first_token_s=np.array([request.first_token_s for request in requests]),
        last_token_s=np.array([request.finish_s for request in requests]),
        preemptions=sum(request.preemptions for request in requests),
        recomputed_tokens=sum(request.recomputed for request in requests),
        engine_steps=engine.steps,
    )


def _skew_share(path: Path, tp: int) -> float:
    """The profiler's ``alpha``, or 0 where it did not measure unequal contexts."""
    try:
        skew = yaml.safe_load(path.read_text(encoding="utf-8")).get("skew_fit", {})
        return float(skew["per_tp"][tp]["alpha_default"]) if skew.get("enabled") else 0.0
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: skew_fit lacks per_tp.{tp}.alpha_default") from None
