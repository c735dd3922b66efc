"""What is not fitted to steps: memory, residency and scaling to a neighbour."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES, num_gpu_blocks
from qlm_env.profiles.power import fit_busy_power
from qlm_env.profiles.quantities import power, residency
from qlm_env.profiles.residency import A100_TIMES, WEIGHT_BYTES, TransferTime, fit_residency
from qlm_env.profiles.scaling import ParallelEfficiency, roofline, scale_architecture, scale_tp
from qlm_env.profiles.schema import StepTimeCoefficients
from qlm_env.spec import ConfigError

SMALL, MIDDLE, LARGE, HUGE = WEIGHT_BYTES
FITTED = StepTimeCoefficients(1.0, 2.0, 64.0, 3.0, 4.0, 5.0, 6.0, 7.0)


BIASED_QKV = ("qwen-7b", "qwen-14b", "qwen1.5-14b", "qwen2.5-7b")


def test_kv_bytes_of_published_configurations() -> None:
    kv_bytes = {name: architecture.kv_bytes_per_token for name, architecture in ARCHITECTURES.items()}
    assert kv_bytes["llama-2-7b"] == 524_288
    assert kv_bytes["llama-2-13b"] == kv_bytes["vicuna-13b"] == 819_200
    assert kv_bytes["llama-3.1-8b"] == kv_bytes["mistral-7b"] == kv_bytes["internlm2.5-7b"] == 131_072
    assert kv_bytes["llama-3.1-70b"] == 327_680
    assert kv_bytes["qwen3-32b"] == 262_144
    assert kv_bytes["qwen2.5-7b"] == 57_344


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_follow_from_the_dimensions(name: str) -> None:
    """Embedding and head, per layer attention, gated MLP and two norms, a last norm; biases and QK norms."""
    a = ARCHITECTURES[name]
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    layer = a.hidden_size * (2 * queries + 2 * keys + 3 * a.intermediate_size) + 2 * a.hidden_size
    layer += queries + 2 * keys if name in BIASED_QKV else 0
    layer += 2 * a.head_dim if name.startswith("qwen3") else 0
    assert a.parameters == 2 * a.vocab_size * a.hidden_size + a.layers * layer + a.hidden_size


def test_the_weights_of_linear_layers_are_nearly_all_of_the_model() -> None:
    a = ARCHITECTURES["llama-3.1-8b"]
    in_layers = a.layers * sum(count for name, count in a.linear_parameters.items() if name != "lm_head")
    assert in_layers == 32 * (4096 * 6144 + 4096 * 4096 + 4096 * 28_672 + 14_336 * 4096)
    assert in_layers + 2 * a.linear_parameters["lm_head"] == pytest.approx(a.parameters, rel=1e-4)


def test_kv_blocks_agree_with_what_vllm_reported() -> None:
    """7,351 for Llama-2-7B on one A100 80 GB: vllm-project/vllm#2031."""
    assert num_gpu_blocks(DEVICES["A100"], ARCHITECTURES["llama-2-7b"], 1) == pytest.approx(7351, rel=0.01)


def test_no_70b_model_fits_an_a10_instance() -> None:
    assert all(num_gpu_blocks(DEVICES["A10"], ARCHITECTURES["llama-3.1-70b"], tp) <= 0 for tp in (1, 2, 4))


def sleep_mode_table(path: Path, *, wake_tp4_s: float) -> Path:
    """Times on exact lines: wake 0.5 s + 1/20 s per GB, sleep 0.1 s + 1/10 s, cold start 30 s + 1/5 s."""
    lines = ["gpu,model,tp,weight_dtype,level,op,mean_s,n"]
    for model, tp in ((SMALL, 1), (MIDDLE, 1), (LARGE, 1), (HUGE, 4)):
        gigabytes = WEIGHT_BYTES[model] / 1e9
        times = {
            ("wake", 1): 0.5 + gigabytes / 20 if tp == 1 else wake_tp4_s,
            ("sleep", 1): 0.1 + gigabytes / (10 * tp),
            ("cold_load", 0): 30 + gigabytes / 5,
            ("wake", 2): 99.0,
        }
        lines += [f"A100,{model},{tp},bf16,{level},{op},{time_s},3" for (op, level), time_s in times.items()]
    lines.append(f"A4000,{SMALL},1,bf16,1,wake,99,3")
    path.write_text("\n".join(lines))
    return path


def test_residency_lines_are_recovered(tmp_path: Path) -> None:
    wake_tp4_s = 0.5 + WEIGHT_BYTES[HUGE] / 50e9
    times = fit_residency(sleep_mode_table(tmp_path / "sleep.csv", wake_tp4_s=wake_tp4_s))
    assert times.wake == pytest.approx((0.5, 20e9, 50e9, 0.0), rel=1e-6, abs=1e-6)
    assert times.sleep == pytest.approx((0.1, 10e9, 40e9, 0.0), rel=1e-6, abs=1e-6)
    assert times.cold_start == pytest.approx((30.0, 5e9, 0.0), rel=1e-6, abs=1e-6)
    assert times.cold_start.seconds(10e9) == pytest.approx(32.0)


def test_gpus_share_host_memory() -> None:
    wake = TransferTime(0.5, 20e9, 50e9, 0.0)
    assert [wake.seconds(100e9, tp) for tp in (1, 2, 4)] == pytest.approx([5.5, 3.0, 2.5])
    assert [wake.faster(2.0).seconds(100e9, tp) for tp in (1, 2, 4)] == pytest.approx([3.0, 1.75, 1.5])


POWER = """model,hardware,prompt_size,token_size,average_power,tensor_parallel
llama2-70b,a100-80gb,512,128,0.7,2
llama2-70b,a100-80gb,1024,128,0.5,2
llama2-70b,a100-80gb,512,128,0.4,8
llama2-70b,a100-80gb,512,256,0.0,8
llama2-70b,a100-80gb,8192,128,0.2,2
llama2-70b,h100-80gb,512,128,0.9,2
bloom-176b,a100-80gb,512,128,0.9,2
"""


def test_busy_power_is_the_mean_of_the_readings_within_the_context(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text(POWER)
    busy = fit_busy_power(path)
    assert dict(busy.shares) == pytest.approx({2: 0.6, 8: 0.4})
    assert [busy.share(tp)[1] for tp in (1, 2, 4, 5, 6, 16)] == [2, 2, 2, 2, 8, 8]
    watts = power(DEVICES["A100"], 4, busy)
    assert watts["peak_power_w"].value == 1600
    assert watts["busy_power_w"].value == pytest.approx(4 * 0.6 * 400)
    assert "at tp=2" in watts["busy_power_w"].source


def test_a_power_table_without_readings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text(POWER.replace("a100-80gb", "mi300"))
    with pytest.raises(ConfigError, match="no power readings of llama2-70b on a100-80gb"):
        fit_busy_power(path)


def test_a_faster_link_shortens_transfers_and_is_said() -> None:
    weight_bytes = ARCHITECTURES["llama-3.1-8b"].weight_bytes
    slow = residency(DEVICES["L40S"], weight_bytes, 1, A100_TIMES)
    fast = residency(DEVICES["H100"], weight_bytes, 1, A100_TIMES)
    base_s = A100_TIMES.wake.base_s
    assert slow["wake_s"].value - base_s == pytest.approx(2 * (fast["wake_s"].value - base_s), rel=1e-3)
    assert fast["cold_start_s"].value == slow["cold_start_s"].value
    assert fast["kv_swap_bytes_per_s"].value == 2 * slow["kv_swap_bytes_per_s"].value
    assert "bandwidths x 2 for the PCIe 5.0 x16 link of H100" in fast["wake_s"].source
    assert {quantity.kind for quantity in fast.values()} == {"estimated"}


def test_a_table_without_the_rows_needed_is_refused(tmp_path: Path) -> None:
    path = sleep_mode_table(tmp_path / "sleep.csv", wake_tp4_s=5.0)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if HUGE not in line))
    with pytest.raises(ConfigError, match="lacks wake times"):
        fit_residency(path)
    with pytest.raises(ConfigError, match="absent"):
        fit_residency(tmp_path / "absent.csv")


def test_each_coefficient_scales_with_its_own_resource() -> None:
    source = ARCHITECTURES["llama-2-7b"]._replace(parameters=100, layers=10, heads=8, kv_heads=8, head_dim=64)
    target = ARCHITECTURES["llama-2-7b"]._replace(parameters=300, layers=20, heads=16, kv_heads=2, head_dim=64)
    assert scale_architecture(FITTED, source, target) == pytest.approx((3.0, 6.0, 64.0, 9.0, 2.0, 20.0, 6.0, 3.5))
    assert scale_tp(FITTED, 2, ParallelEfficiency(0.5, 0.25, "")) == pytest.approx(
        (1.0, 4.0, 64.0, 6.0, 4.0, 10.0, 6.0, 7.0)
    )


def test_the_roofline_by_hand() -> None:
    least = roofline(DEVICES["A100"], ARCHITECTURES["llama-2-13b"], 2)
    assert least.c3_s_per_kv_token == pytest.approx(819_200 / (2 * 2.039e12))
    assert least.c4_s_per_token2 == pytest.approx(4 * 40 * 40 * 128 / (2 * 312e12))


@given(st.sampled_from(sorted(ARCHITECTURES)), st.sampled_from(sorted(ARCHITECTURES)))
def test_scaling_there_and_back_changes_nothing(first: str, second: str) -> None:
    there = scale_architecture(FITTED, ARCHITECTURES[first], ARCHITECTURES[second])
    assert scale_architecture(there, ARCHITECTURES[second], ARCHITECTURES[first]) == pytest.approx(FITTED)
