"""Whole engine steps composed from vLLM's time per layer.

LLMServingSim 2.0 (MIT) measures the GPU time of each layer of a vLLM engine that holds one transformer layer,
in eager mode, by the number of tokens in the step. Its folder for one model holds ``meta.yaml`` and, per
tensor-parallel degree, ``tpN/dense.csv`` (layer, tokens, time_us), ``tpN/per_sequence.csv`` (layer, sequences,
time_us) and ``tpN/attention.csv`` (prefill_chunk, kv_prefill, n_decode, kv_decode, time_us).

A step of the whole model takes

``layers * (norms, projections, MLP of n tokens + attention) + embedding and final norm of n + head and sampler
of s``

for ``n`` new tokens and ``s`` sequences, since vLLM computes logits for the last token of every request in the
step. What this leaves out: the engine's work on the CPU between steps and the gaps between kernels, which the
measurements exclude by design.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from qlm_env.profiles.hardware import Architecture, Device
from qlm_env.profiles.step_tables import REGIMES, StepTable
from qlm_env.profiles.table_checks import SHORTEST_LAYER_S, check_seconds, numbers, read_table, require_columns
from qlm_env.profiles.token_curve import MAX_KNOTS, Knots
from qlm_env.spec import ConfigError

Float = NDArray[np.float64]

CALLS_PER_LAYER = {
    "layernorm": 2,
    "qkv_proj": 1,
    "qk_norm": 2,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
"""How often a transformer layer runs each dense layer; a row is the mean of one call. The norms run before
attention and before the MLP; ``qk_norm``, which only some architectures have, on queries and on keys."""

CALLS_PER_STEP = ("embedding", "final_layernorm")
CALLS_PER_SEQUENCE = ("lm_head", "sampler")
OPTIONAL = ("qk_norm",)

ACTIVATION_BYTES = 2


class Curve(NamedTuple):
    """Time of one layer against a number of tokens or sequences, both of shape (N,), by ascending number."""

    number: Float
    seconds: Float

    def at(self, number: Float) -> Float:
        """Linear interpolation, shape as ``number``; constant outside the measured range."""
        return np.interp(number, self.number, self.seconds)


class AttentionTimes(NamedTuple):
    """Attention of one layer: one prefill chunk and a number of decodes in one call. Shapes (N,)."""

    prefill_chunk: Float
    kv_prefill: Float
    """Tokens cached before the chunk."""
    n_decode: Float
    kv_decode: Float
    """Tokens cached of each decode."""
    seconds: Float


class LayerTimes(NamedTuple):
    """The measurements of one model at one tensor-parallel degree, per GPU."""

    tp: int
    heads: int
    """Of the whole model."""
    dense: Mapping[str, Curve]
    per_sequence: Mapping[str, Curve]
    attention: AttentionTimes

    @property
    def max_tokens(self) -> float:
        return min(float(curve.number[-1]) for curve in self.dense.values())

    @property
    def max_sequences(self) -> float:
        return min(float(curve.number[-1]) for curve in self.per_sequence.values())


def read_layer_times(folder: Path, tp: int) -> LayerTimes:
    """The measurements in ``folder``, which holds ``meta.yaml``, for ``tp`` GPUs.

    Raises:
        ConfigError: a file cannot be read, lacks a column or a layer, or holds a time that cannot be; one line
            with file and cause.
    """
    heads = _heads(folder / "meta.yaml")
    degree = folder / f"tp{tp}"
    if not degree.is_dir():
        degrees = sorted(path.name.removeprefix("tp") for path in folder.glob("tp*") if path.is_dir())
        raise ConfigError(f"{folder} has no measurements at tp={tp}; it has: {', '.join(degrees) or 'none'}")
    dense = _curves(degree / "dense.csv", "tokens", (*CALLS_PER_LAYER, *CALLS_PER_STEP))
    per_sequence = _curves(degree / "per_sequence.csv", "sequences", CALLS_PER_SEQUENCE)
    return LayerTimes(tp, heads, dense, per_sequence, _attention(degree / "attention.csv"))


def step_outside_attention_s(
    times: LayerTimes, architecture: Architecture, device: Device, tokens: Float, sequences: Float
) -> Float:
    """Everything in a step but attention, for the whole model, shape (N,) as ``tokens`` and ``sequences``.

    No linear layer is taken to be faster than its weights can be read: with a single transformer layer a small
    one stays in the GPU's cache between steps, as it cannot among all the layers of the model.

    At ``tp`` above 1 the all-reduces after attention, MLP and embedding, and the gathering of the logits, which
    one GPU's layers do not show, are added by :func:`all_reduce_s`.
    """
    least_s = {
        name: 2 * count / (times.tp * device.bandwidth_bytes_per_s)
        for name, count in architecture.linear_parameters.items()
    }

    def at_least(name: str, seconds: Float) -> Float:
        return np.maximum(seconds, least_s.get(name, 0.0))

    layer = np.zeros_like(tokens)
    for name, calls in CALLS_PER_LAYER.items():
        if name not in times.dense:
            continue
        # The profiler repeats qk_norm's times of one GPU at every degree. A GPU norms its own heads only, so
        # its work on n tokens is that of n / tp tokens with all heads.
        count = tokens / times.tp if name == "qk_norm" else tokens
        layer += calls * at_least(name, times.dense[name].at(count))
    step = architecture.layers * layer
    step += sum(times.dense[name].at(tokens) for name in CALLS_PER_STEP)
    step += sum(at_least(name, times.per_sequence[name].at(sequences)) for name in CALLS_PER_SEQUENCE)
    if times.tp > 1:
        hidden_bytes = ACTIVATION_BYTES * architecture.hidden_size * tokens
        step += (2 * architecture.layers + 1) * all_reduce_s(hidden_bytes, device, times.tp)
        # An all-gather sends each GPU's share of the logits to the others; an all-reduce takes twice its steps.
        logits_bytes = ACTIVATION_BYTES * architecture.vocab_size * sequences
        step += all_reduce_s(logits_bytes / 2, device, times.tp)
    return step


def measured_token_curve(times: LayerTimes, architecture: Architecture, device: Device) -> Knots:
    """What the new tokens of a step cost outside attention, with the head and sampler of one sequence."""
    tokens = np.unique(np.concatenate([curve.number for curve in times.dense.values()]))
    tokens = tokens[tokens <= times.max_tokens]
    seconds = step_outside_attention_s(times, architecture, device, tokens, np.ones_like(tokens))
    return Knots(tokens, seconds).thinned(MAX_KNOTS)


def all_reduce_s(num_bytes: Float, device: Device, tp: int) -> Float:
    """Time to sum ``num_bytes``, shape (N,), over ``tp`` GPUs.

    A ring takes ``2 * (tp - 1)`` steps, each of a ``tp``-th of the bytes, of which the device's numbers hold two.
    """
    latency_s, bytes_per_s, _ = device.collective
    return (tp - 1) * (latency_s + 2 / tp * num_bytes / bytes_per_s)


def compose_steps(
    times: LayerTimes, architecture: Architecture, device: Device, max_kv_tokens: int | None = None
) -> StepTable:
    """One step of the whole model for every row of the attention grid.

    Left out are steps beyond the tokens or sequences of the other layers' measurements, and those that need
    more than ``max_kv_tokens`` of KV cache, which one layer had room for but the whole model has not.

    Raises:
        ConfigError: the measurements are of a model with another number of heads, or no step is left.
    """
    if times.heads != architecture.heads:
        raise ConfigError(
            f"the layers were measured on a model with {times.heads} heads; {architecture.name} has "
            f"{architecture.heads}"
        )
    chunk, before, decodes, context, attention_s = times.attention
    tokens, sequences = chunk + decodes, decodes + (chunk > 0)
    kv_tokens = (before + chunk) * (chunk > 0) + decodes * (context + 1)
    possible = (tokens <= times.max_tokens) & (sequences <= times.max_sequences) & (tokens > 0)
    if max_kv_tokens is not None:
        possible &= kv_tokens <= max_kv_tokens
    if not possible.any():
        raise ConfigError(f"no measured step of {architecture.name} fits {max_kv_tokens} tokens of KV cache")
    outside_s = step_outside_attention_s(times, architecture, device, tokens, sequences)
    regime = np.where(decodes == 0, REGIMES.index("prefill"), REGIMES.index("mixed"))
    regime[chunk == 0] = REGIMES.index("decode")
    return StepTable(
        new_tokens=tokens,
        decodes=decodes,
        kv_tokens=decodes * context,
        attention_tokens2=chunk * (before + chunk / 2),
        latency_s=outside_s + architecture.layers * attention_s,
        regime=regime,
    ).rows(possible)


def _heads(path: Path) -> int:
    """Attention heads of the whole model; the last engine, of the largest degree, had its share of them."""
    try:
        meta: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        heads: int = int(meta["engine_effective"]["hf_overrides"]["num_attention_heads"]) * max(meta["tp_degrees"])
        return heads
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: lacks tp_degrees or engine_effective.hf_overrides.num_attention_heads") from None


def _attention(path: Path) -> AttentionTimes:
    frame = read_table(path)
    require_columns(frame, ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"], path)
    seconds = numbers(frame, "time_us", path) / 1e6
    check_seconds(frame, "time_us", seconds, path, SHORTEST_LAYER_S)
    return AttentionTimes(
        prefill_chunk=numbers(frame, "prefill_chunk", path),
        kv_prefill=numbers(frame, "kv_prefill", path),
        n_decode=numbers(frame, "n_decode", path),
        kv_decode=numbers(frame, "kv_decode", path),
        seconds=seconds,
    )


def _curves(path: Path, count: str, layers: tuple[str, ...]) -> dict[str, Curve]:
    frame = read_table(path)
    require_columns(frame, ["layer", count, "time_us"], path)
    counts, seconds = numbers(frame, count, path), numbers(frame, "time_us", path) / 1e6
    check_seconds(frame, "time_us", seconds, path, SHORTEST_LAYER_S)
    curves = {}
    for layer in layers:
        chosen = np.asarray(frame.layer == layer)
        if chosen.any():
            order = np.argsort(counts[chosen])
            curves[layer] = Curve(counts[chosen][order], seconds[chosen][order])
        elif layer not in OPTIONAL:
            raise ConfigError(f"{path}: no rows for the layer {layer}")
    return curves
