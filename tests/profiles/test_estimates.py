"""What is not fitted to steps: memory, residency and scaling to a neighbour."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES, Architecture, num_gpu_blocks
from qlm_env.profiles.residency import WEIGHT_BYTES, TransferTime, fit_residency
from qlm_env.profiles.scaling import ParallelEfficiency, roofline, scale_architecture, scale_tp
from qlm_env.profiles.schema import StepTimeCoefficients
from qlm_env.spec import ConfigError

SMALL, MIDDLE, LARGE, HUGE = WEIGHT_BYTES
FITTED = StepTimeCoefficients(1.0, 2.0, 64.0, 3.0, 4.0, 5.0, 6.0)


def test_published_configurations() -> None:
    kv_bytes = {name: architecture.kv_bytes_per_token for name, architecture in ARCHITECTURES.items()}
    assert kv_bytes == {
        "llama-2-7b": 524_288,
        "llama-2-13b": 819_200,
        "llama-3.1-8b": 131_072,
        "qwen3-32b": 262_144,
        "llama-3.1-70b": 327_680,
    }
    # Llama-2-7B by hand: embeddings and head, 32 layers of attention, gated MLP and two norms, a last norm.
    layer = 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    assert ARCHITECTURES["llama-2-7b"].parameters == 2 * 32_000 * 4096 + 32 * layer + 4096


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


def test_a_table_without_the_rows_needed_is_refused(tmp_path: Path) -> None:
    path = sleep_mode_table(tmp_path / "sleep.csv", wake_tp4_s=5.0)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if HUGE not in line))
    with pytest.raises(ConfigError, match="lacks wake times"):
        fit_residency(path)
    with pytest.raises(ConfigError, match="absent"):
        fit_residency(tmp_path / "absent.csv")


def test_each_coefficient_scales_with_its_own_resource() -> None:
    source = Architecture("source", 100, layers=10, heads=8, kv_heads=8, head_dim=64, context_tokens=1)
    target = Architecture("target", 300, layers=20, heads=16, kv_heads=2, head_dim=64, context_tokens=1)
    assert scale_architecture(FITTED, source, target) == pytest.approx((3.0, 6.0, 64.0, 9.0, 2.0, 20.0, 6.0))
    assert scale_tp(FITTED, 2, ParallelEfficiency(0.5, 0.25, "")) == pytest.approx(
        (1.0, 4.0, 64.0, 6.0, 4.0, 10.0, 6.0)
    )


def test_the_roofline_by_hand() -> None:
    least = roofline(DEVICES["A100"], ARCHITECTURES["llama-2-13b"], 2)
    assert least.c3_s_per_kv_token == pytest.approx(819_200 / (2 * 2.039e12))
    assert least.c4_s_per_token2 == pytest.approx(4 * 40 * 40 * 128 / (2 * 312e12))


@given(st.sampled_from(sorted(ARCHITECTURES)), st.sampled_from(sorted(ARCHITECTURES)))
def test_scaling_there_and_back_changes_nothing(first: str, second: str) -> None:
    there = scale_architecture(FITTED, ARCHITECTURES[first], ARCHITECTURES[second])
    assert scale_architecture(there, ARCHITECTURES[second], ARCHITECTURES[first]) == pytest.approx(FITTED)
