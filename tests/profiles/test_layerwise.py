"""Whole steps composed from layer times, by hand on round numbers and on the published measurements."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES, Architecture, rated_collective
from qlm_env.profiles.layerwise import all_reduce_s, compose_steps, read_layer_times, step_outside_attention_s
from qlm_env.profiles.step_tables import REGIMES
from qlm_env.spec import ConfigError

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "profiles" / "vllm_layerwise"
RTX4090 = DATA / "RTX4090" / "meta-llama" / "Llama-3.1-8B" / "bf16"

needs_data = pytest.mark.skipif(not RTX4090.exists(), reason="the published measurements are not in ../shared/data")

TOY = Architecture("toy", 1, 3, 16, 32, heads=4, kv_heads=2, head_dim=4, vocab_size=64, context_tokens=4096)
FAST = DEVICES["A100"]._replace(bandwidth_bytes_per_s=1e18)
"""Reads weights in no time."""

LAYERS = {
    "layernorm": 1,
    "qkv_proj": 10,
    "rotary_emb": 2,
    "o_proj": 20,
    "gate_up_proj": 30,
    "act_fn": 3,
    "down_proj": 40,
}
ONCE = {"embedding": 100, "final_layernorm": 200}
META = """tp_degrees: [1, 2]
engine_effective: {hf_overrides: {num_attention_heads: 2}}
"""


def write_layers(folder: Path, tp: int = 1, **extra_us: float) -> Path:
    """Every layer takes its number of us at 1 token and twice that at 101; attention 1,000 us a decode, say."""
    degree = folder / f"tp{tp}"
    degree.mkdir(parents=True)
    (folder / "meta.yaml").write_text(META)
    dense = ["layer,tokens,time_us"]
    dense += [
        line
        for name, us in {**LAYERS, **ONCE, **extra_us}.items()
        for line in (f"{name},101,{2 * us}", f"{name},1,{us}")
    ]
    (degree / "dense.csv").write_text("\n".join(dense))
    (degree / "per_sequence.csv").write_text(
        "layer,sequences,time_us\nlm_head,1,1000\nlm_head,11,2000\nsampler,1,500\nsampler,11,500\n"
    )
    (degree / "attention.csv").write_text(
        "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
        "0,0,1,64,7\n"
        "51,100,0,0,8\n"
        "41,0,10,50,9\n"
        "101,0,10,50,9\n"
        "0,0,1,4000,9\n"
    )
    return folder


def test_a_step_is_the_sum_of_its_layers(tmp_path: Path) -> None:
    times = read_layer_times(write_layers(tmp_path), 1)
    table = compose_steps(times, TOY, FAST)
    # The fourth row has 111 tokens, beyond what the dense layers were measured at.
    assert [REGIMES[index] for index in table.regime] == ["decode", "prefill", "mixed", "decode"]
    assert table.new_tokens.tolist() == [1, 51, 51, 1]
    assert table.decodes.tolist() == [1, 0, 10, 1]
    assert table.kv_tokens.tolist() == [64, 0, 500, 4000]
    assert table.attention_tokens2.tolist() == [0, 51 * (100 + 25.5), 41 * 20.5, 0]
    layer_us = 2 * 1 + 10 + 2 + 20 + 30 + 3 + 40  # the norm runs twice
    decode_us = 3 * (layer_us + 7) + 300 + 1500
    prefill_us = 3 * (1.5 * layer_us + 8) + 1.5 * 300 + 1500
    mixed_us = 3 * (1.5 * layer_us + 9) + 1.5 * 300 + 2000 + 500  # eleven sequences
    assert table.latency_s[:3] * 1e6 == pytest.approx([decode_us, prefill_us, mixed_us])


def test_steps_that_do_not_fit_the_kv_cache_are_left_out(tmp_path: Path) -> None:
    times = read_layer_times(write_layers(tmp_path), 1)
    assert compose_steps(times, TOY, FAST, max_kv_tokens=4000).kv_tokens.tolist() == [64, 0, 500]
    assert compose_steps(times, TOY, FAST, max_kv_tokens=65).kv_tokens.tolist() == [64]
    with pytest.raises(ConfigError, match="no measured step of toy fits 64 tokens of KV cache"):
        compose_steps(times, TOY, FAST, max_kv_tokens=64)


def test_a_norm_of_queries_and_keys_runs_twice_and_on_a_gpus_own_heads(tmp_path: Path) -> None:
    """The file repeats the times of one GPU: two of them norm 51 tokens each as fast as one norms 25.5."""
    tokens, sequences = np.array([51.0]), np.array([1.0])
    plain, normed = tmp_path / "plain", tmp_path / "normed"
    for folder, extra in ((plain, {}), (normed, {"qk_norm": 100.0})):
        for tp in (1, 2):
            write_layers(folder, tp, **extra)
    added_us = {
        tp: 1e6
        * float(
            step_outside_attention_s(read_layer_times(normed, tp), TOY, FAST, tokens, sequences)[0]
            - step_outside_attention_s(read_layer_times(plain, tp), TOY, FAST, tokens, sequences)[0]
        )
        for tp in (1, 2)
    }
    assert added_us == pytest.approx({1: 3 * 2 * 150, 2: 3 * 2 * 124.5})


def test_no_layer_is_faster_than_its_weights_are_read(tmp_path: Path) -> None:
    """One transformer layer's weights stay in cache between steps; those of a whole model do not."""
    times = read_layer_times(write_layers(tmp_path), 1)
    slow = FAST._replace(bandwidth_bytes_per_s=2 * TOY.linear_parameters["down_proj"] / 100e-6)
    tokens, sequences = np.array([1.0]), np.array([1.0])
    difference_s = step_outside_attention_s(times, TOY, slow, tokens, sequences) - step_outside_attention_s(
        times, TOY, FAST, tokens, sequences
    )
    # Of 512 weights in 100 us: 40 -> 100 us, and 30 -> 200, 10 -> 100 and 20 -> 50 us for 1,024, 512 and 256.
    assert difference_s[0] * 1e6 == pytest.approx(3 * (60 + 170 + 90 + 30))


def test_gpus_pay_for_their_sums(tmp_path: Path) -> None:
    for tp in (1, 2):
        write_layers(tmp_path, tp)
    device = FAST._replace(collective=rated_collective(1e9)._replace(latency_s=5e-6))
    tokens, sequences = np.array([10.0]), np.array([2.0])
    one, two = (
        step_outside_attention_s(read_layer_times(tmp_path, tp), TOY, device, tokens, sequences) for tp in (1, 2)
    )
    bandwidth = 0.7e9
    all_reduce = 5e-6 + 2 * 16 * 10 / bandwidth
    gather = 5e-6 + 2 * 64 * 2 / 2 / bandwidth
    assert (two - one)[0] == pytest.approx((2 * 3 + 1) * all_reduce + gather)


def test_a_ring_of_four_takes_six_steps_of_a_quarter() -> None:
    device = FAST._replace(collective=rated_collective(1e9)._replace(latency_s=5e-6))
    two, four = (all_reduce_s(np.array([7e6]), device, tp)[0] for tp in (2, 4))
    assert two == pytest.approx(5e-6 + 0.01)
    assert four == pytest.approx(3 * 5e-6 + 0.015)


def test_measurements_of_another_model_are_refused(tmp_path: Path) -> None:
    times = read_layer_times(write_layers(tmp_path), 1)
    with pytest.raises(ConfigError, match="measured on a model with 4 heads; llama-2-7b has 32"):
        compose_steps(times, ARCHITECTURES["llama-2-7b"], FAST)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("tp1/dense.csv", "qkv_proj", "qkv", "no rows for the layer qkv_proj"),
        ("tp1/dense.csv", "time_us", "time_ms", "missing columns time_us"),
        ("tp1/dense.csv", "down_proj,1,40", "down_proj,1,-40", r"line \d+: time_us must be a number >= 0, not -40"),
        ("tp1/dense.csv", "down_proj,1,40", "down_proj,1,0", r"line \d+: time_us=0.* is 0 s, where a time"),
        ("tp1/per_sequence.csv", "sampler", "sample", "no rows for the layer sampler"),
        ("tp1/attention.csv", "kv_decode", "kv", "missing columns kv_decode"),
        ("tp1/attention.csv", "64,7", "64,fast", "line 2: time_us must be a number >= 0, not fast"),
        ("meta.yaml", "tp_degrees", "degrees", "lacks tp_degrees or engine_effective"),
        ("meta.yaml", "{", "{{", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    path = write_layers(tmp_path) / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message) as error:
        read_layer_times(tmp_path, 1)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"meta\.yaml: No such file"):
        read_layer_times(tmp_path, 1)
    write_layers(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} has no measurements at tp=4; it has: 1")):
        read_layer_times(tmp_path, 4)
    (tmp_path / "tp1" / "attention.csv").unlink()
    with pytest.raises(ConfigError, match=r"attention\.csv: No such file"):
        read_layer_times(tmp_path, 1)


@needs_data
def test_a_whole_step_reads_the_weights_and_little_else_takes_time() -> None:
    """At one token a step takes hardly longer than reading every weight but the embedding's, and not less."""
    device, architecture = DEVICES["RTX4090"], ARCHITECTURES["llama-3.1-8b"]
    table = compose_steps(read_layer_times(RTX4090, 1), architecture, device, 40_000)
    least_s = 2 * (architecture.parameters_per_token + architecture.linear_parameters["lm_head"])
    least_s /= device.bandwidth_bytes_per_s
    one = table.rows((table.regime == REGIMES.index("decode")) & (table.decodes == 1) & (table.kv_tokens <= 64))
    assert len(one.latency_s) == 3
    assert np.all((one.latency_s > least_s) & (one.latency_s < 1.2 * least_s))
