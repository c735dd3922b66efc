"""Step times interpolated between layers, against the measured grid and against sums worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from qlm_env.fidelity import read_run, replay
from qlm_env.fidelity.layer_steps import LayerSteps, make_surface, read_layer_steps, replay_by_steps
from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES
from qlm_env.profiles.layerwise import compose_steps, read_layer_times
from qlm_env.spec import ConfigError, EngineSpec
from tests.fidelity_runs.runs import random_requests, run_by_steps
from tests.profiles.toy import toy_profile

DEVICE, ARCHITECTURE = "RTX4090", "llama-3.1-8b"
LAYERS = ARCHITECTURES[ARCHITECTURE].layers

TOKENS = (1, 64, 512, 2048)
CHUNKS, CACHED, DECODES, CONTEXTS = (16, 256, 2048), (0, 512), (1, 16, 256), (16, 1024, 4096)


def bent_us(chunk: float, cached: float, decodes: float, context: float) -> float:
    """Attention time of a layer: decodes cost twice as much beside a chunk."""
    reading = decodes * context * 5e-3 * (2 if chunk else 1)
    return 8 + decodes * 0.1 + reading + chunk * (cached + chunk / 2) * 1e-4


def write_layer_times(
    folder: Path,
    attention_us: Callable[[float, float, float, float], float] = bent_us,
    dense_us: Callable[[float], float] = lambda tokens: 1e3 + tokens,
    alpha: float | None = None,
) -> Path:
    """A folder of layer times, in the profiler's format, of functions instead of measurements."""
    degree = folder / "tp1"
    degree.mkdir(parents=True)
    meta = {
        "tp_degrees": [1],
        "engine_effective": {"hf_overrides": {"num_attention_heads": ARCHITECTURES[ARCHITECTURE].heads}},
        "skew_fit": {"enabled": alpha is not None, "per_tp": {1: {"alpha_default": alpha}}},
    }
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta), encoding="utf-8")
    dense = ("layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
    lines = [f"{layer},{n},{dense_us(n)}" for layer in (*dense, "embedding", "final_layernorm") for n in TOKENS]
    (degree / "dense.csv").write_text("layer,tokens,time_us\n" + "\n".join(lines) + "\n", encoding="utf-8")
    lines = [f"{layer},{n},{2e3 + n}" for layer in ("lm_head", "sampler") for n in (1, 256)]
    (degree / "per_sequence.csv").write_text("layer,sequences,time_us\n" + "\n".join(lines) + "\n", encoding="utf-8")
    points = [(0, 0, n, kv) for n in DECODES for kv in CONTEXTS if n * kv < 1e6]
    points += [(q, k, 0, 0) for q in CHUNKS for k in CACHED]
    points += [(q, k, n, kv) for q in CHUNKS for k in CACHED for n in DECODES for kv in CONTEXTS]
    lines = [",".join(map(str, (*point, attention_us(*point)))) for point in points]
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
    (degree / "attention.csv").write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def layer_steps(folder: Path) -> LayerSteps:
    return read_layer_steps(folder, toy_profile(DEVICE, ARCHITECTURE))


def test_a_surface_goes_through_its_points_and_continues_its_rows() -> None:
    x, y = np.array([1.0, 1.0, 1.0, 4.0, 4.0]), np.array([10.0, 20.0, 40.0, 10.0, 20.0])
    surface = make_surface(x, y, np.array([1.0, 2.0, 3.0, 5.0, 9.0]))
    assert surface.at(4, 20) == 9.0
    assert surface.at(2.5, 15) == pytest.approx((1.5 + 7.0) / 2)
    assert surface.at(4, 40) == pytest.approx(9.0 + 2 * 4.0)
    assert surface.at(1, 80) == pytest.approx(3.0 + 2.0)
    assert surface.at(100, 10) == 5.0
    assert surface.at(0, 0) == 1.0


def test_measured_steps_are_those_of_the_composition(tmp_path: Path) -> None:
    folder = write_layer_times(tmp_path / "bf16")
    steps = layer_steps(folder)
    times = read_layer_times(folder, 1)
    table = compose_steps(times, ARCHITECTURES[ARCHITECTURE], DEVICES[DEVICE])
    attention = times.attention
    possible = (attention.prefill_chunk + attention.n_decode <= TOKENS[-1]) & (
        attention.n_decode + (attention.prefill_chunk > 0) <= DECODES[-1]
    )
    grid = np.column_stack(attention[:4])[possible].astype(int)
    assert len(grid) == len(table.latency_s)
    for (chunk, cached, decodes, context), expected in zip(grid.tolist(), table.latency_s, strict=True):
        seconds = steps.seconds([(chunk, cached)] if chunk else [], [context] * decodes)
        assert seconds == pytest.approx(expected, rel=1e-9), (chunk, cached, decodes, context)


def test_chunks_share_one_call(tmp_path: Path) -> None:
    steps = layer_steps(write_layer_times(tmp_path / "bf16"))
    one, other = (steps.seconds([chunk], []) for chunk in ((256, 0), (16, 512)))
    both = steps.seconds([(256, 0), (16, 512)], [])
    attention_us = bent_us(256, 0, 0, 0) + bent_us(16, 512, 0, 0) - bent_us(16, 0, 0, 0)
    outside = one - LAYERS * bent_us(256, 0, 0, 0) / 1e6
    # The rest grows with the tokens: eight dense layers per transformer layer, two per step; head and sampler.
    assert both - outside == pytest.approx(LAYERS * attention_us / 1e6 + 16e-6 * (8 * LAYERS + 2) + 2e-6, rel=1e-6)
    assert both < one + other


def test_unequal_contexts_cost_their_share_where_it_was_measured(tmp_path: Path) -> None:
    contexts = [1024] * 12 + [4096] * 4
    equal = layer_steps(write_layer_times(tmp_path / "equal")).seconds([], contexts)
    skewed = layer_steps(write_layer_times(tmp_path / "skewed", alpha=0.1)).seconds([], contexts)
    gap_us = bent_us(0, 0, 16, 4096) - bent_us(0, 0, 16, 1792)
    assert skewed - equal == pytest.approx(0.1 * LAYERS * gap_us / 1e6, rel=1e-6)


def test_linear_layers_replay_as_their_coefficients(tmp_path: Path) -> None:
    """Where every layer is linear there is nothing to interpolate, and both engines must agree."""

    def linear_us(chunk: float, cached: float, decodes: float, context: float) -> float:
        return 10 + 2e-3 * decodes * context

    folder = write_layer_times(tmp_path / "bf16", linear_us)
    per_token_s = (8 * LAYERS + 2) * 1e-6
    # A chunk's logits are computed as well, which the formula has no term for: it goes to the sequences.
    profile = toy_profile(
        DEVICE,
        ARCHITECTURE,
        c0_s=(8e-3 + 10e-6) * LAYERS + 6e-3,
        c1_s_per_token=per_token_s,
        c2_s_per_token=per_token_s,
        c3_s_per_kv_token=2e-9 * LAYERS,
        c4_s_per_token2=0.0,
        c5_s_per_sequence=2e-6,
        c6_s_per_mixed_kv_token=0.0,
    )
    engine = EngineSpec(max_num_seqs=16, max_num_batched_tokens=256, num_gpu_blocks=60, async_scheduling=True)
    requests = random_requests(np.random.default_rng(2), 40, ("a",))
    run = read_run(run_by_steps(tmp_path / "run", profile, engine, requests, ("a",)))
    leaping = replay(run, profile, ("a",))
    stepping = replay_by_steps(run, profile, layer_steps(folder), ("a",))
    assert stepping.engine_steps == pytest.approx(leaping.engine_steps, rel=0.02)
    np.testing.assert_allclose(stepping.last_token_s, leaping.last_token_s, rtol=2e-3)
    np.testing.assert_allclose(stepping.scheduled_s, leaping.scheduled_s, rtol=2e-3, atol=0.02)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    folder = write_layer_times(tmp_path / "bf16", alpha=0.1)
    with pytest.raises(ConfigError, match="'layer_times': the device TOY is not known; allowed: A10,"):
        read_layer_steps(folder, toy_profile(architecture=ARCHITECTURE))
    with pytest.raises(ConfigError, match="'layer_times': the architecture toy-1b is not known; allowed: "):
        read_layer_steps(folder, toy_profile(DEVICE))
    with pytest.raises(ConfigError, match="has no measurements at tp=2; it has: 1"):
        read_layer_steps(folder, toy_profile(DEVICE, ARCHITECTURE, tp=2))
    meta = yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))
    meta["skew_fit"]["per_tp"] = {}
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"meta.yaml: skew_fit lacks per_tp.1.alpha_default"):
        layer_steps(folder)
