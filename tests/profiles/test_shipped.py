"""The shipped profiles, and the command that writes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from qlm_env.backends.vllm.model_folders import MADE
from qlm_env.profiles import Profile, ProfileKey, list_profiles, load_profile
from qlm_env.profiles.catalogue import AEGAEON, AICONFIGURATOR, ESTIMATED_FROM, FITTED, LAYERWISE, Fit, fit_step_times
from qlm_env.profiles.fit import main
from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES
from qlm_env.profiles.load import SHIPPED
from qlm_env.profiles.power import A100_BUSY, fit_busy_power
from qlm_env.profiles.report import insert_tables
from qlm_env.profiles.residency import A100_TIMES, fit_residency
from qlm_env.profiles.scaling import PARALLEL_EFFICIENCY
from qlm_env.profiles.step_tables import REGIMES
from qlm_env.spec import ConfigError

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / ".." / "shared" / "data"

needs_data = pytest.mark.skipif(
    not (DATA / "profiles" / "aegaeon_prefill_decode.csv").exists(),
    reason="the published measurements are not in ../shared/data",
)


@cache
def fits() -> Mapping[ProfileKey, Fit]:
    """Every fit, made once: it takes seconds."""
    return fit_step_times(DATA / "profiles")


BY_HAND = ProfileKey("CPU", "tiny", 1)
"""Of a model for trying out real servers, on whatever cores there are."""

GPU_PROFILES = [key for key in list_profiles() if key != BY_HAND]


@pytest.fixture(params=GPU_PROFILES, ids=lambda key: key.file_name)
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(*request.param)


def test_every_profile_of_the_catalogue_is_shipped() -> None:
    assert set(list_profiles()) == set(FITTED) | set(ESTIMATED_FROM) | {BY_HAND}


def test_the_profile_for_cpus_is_of_the_models_that_are_made() -> None:
    profile, shape = load_profile(*BY_HAND), MADE[BY_HAND.architecture]
    assert profile.weight_bytes.value == shape.weight_bytes
    assert profile.kv_bytes_per_token.value == shape.kv_bytes_per_token
    assert profile.context_tokens.value == shape.context_tokens
    assert {quantity.kind for quantity in profile.quantities().values()} == {"estimated"}


BOOST = dict.fromkeys(DEVICES, 1.0) | {"RTX4090": 0.9}
"""An RTX 4090's peak is that of a clock which the card exceeds when it is cool."""


def test_every_device_and_size_is_covered() -> None:
    sizes: dict[str, set[float]] = {}
    for key in GPU_PROFILES:
        sizes.setdefault(key.device, set()).add(ARCHITECTURES[key.architecture].parameters / 1e9)
    assert set(sizes) == set(DEVICES)
    for device, billions in sizes.items():
        assert any(6 < size < 9.5 for size in billions), device
        # A 13B model does not fit the 24 GB of an RTX 4090.
        assert any(12 < size < 15 for size in billions) or device == "RTX4090", device
    for size in (32.8, 70.6):
        covered = {device for device, billions in sizes.items() if any(abs(b - size) < 0.5 for b in billions)}
        assert covered == {"A100", "H100", "H200", "L40S", "RTXPRO6000"}


def test_no_step_is_faster_than_the_device_can_be(profile: Profile) -> None:
    device, architecture = DEVICES[profile.device], ARCHITECTURES[profile.architecture]
    bandwidth, flops = (profile.tp * peak for peak in (device.bandwidth_bytes_per_s, device.fp16_flops_per_s))
    c = profile.step_time
    tolerance = 0.999  # four digits
    assert c.c0_s >= tolerance * architecture.weight_bytes / bandwidth
    assert c.c2_s_per_token >= BOOST[profile.device] * 2 * architecture.parameters_per_token / flops
    assert c.c3_s_per_kv_token >= tolerance * architecture.kv_bytes_per_token / bandwidth
    assert c.c4_s_per_token2 >= tolerance * architecture.attention_flops_per_token2 / flops
    assert c.c2_s_per_token >= c.c1_s_per_token


def test_weights_and_kv_fit_the_gpus(profile: Profile) -> None:
    values = profile.values()
    kv_bytes = values["num_gpu_blocks"] * 16 * values["kv_bytes_per_token"]
    assert kv_bytes > 0
    assert values["weight_bytes"] + kv_bytes < 0.9 * profile.tp * DEVICES[profile.device].memory_bytes


def test_residency_costs_are_in_order(profile: Profile) -> None:
    values = profile.values()
    assert 0 < values["sleep_s"] < 5 > values["wake_s"] > 0
    assert 36 < values["cold_start_s"] < 98
    assert values["stage_s"] == pytest.approx(values["cold_start_s"] + values["sleep_s"], abs=0.01)


def test_kinds_say_how_a_number_came_about(profile: Profile) -> None:
    fitted = any((profile.device, profile.architecture, profile.tp) == key for key in FITTED)
    assert profile.c0_s.kind == ("fitted" if fitted else "estimated")
    assert (profile.c0_s.fit_error is not None) == fitted
    assert profile.num_gpu_blocks.kind == "estimated"
    assert profile.busy_power_w is not None
    assert profile.peak_power_w is not None
    assert profile.busy_power_w.value < profile.peak_power_w.value == profile.tp * DEVICES[profile.device].board_power_w
    assert profile.wake_s.kind == ("fitted" if profile.device == "A100" and profile.tp in (1, 4) else "estimated")


def test_more_gpus_are_faster_but_not_more_than_in_proportion() -> None:
    for one, many in (
        (("A10", "llama-2-7b", 1), 2),
        (("A100", "llama-2-7b", 1), 4),
        (("A100", "llama-2-13b", 1), 4),
    ):
        single = load_profile(*one).step_time
        parallel = load_profile(one[0], one[1], many).step_time
        for name in ("c0_s", "c1_s_per_token", "c2_s_per_token", "c3_s_per_kv_token", "c4_s_per_token2"):
            assert getattr(single, name) / many <= getattr(parallel, name) <= getattr(single, name)


@needs_data
def test_regenerating_gives_exactly_the_shipped_files_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlm_env.profiles.fit.fit_step_times", lambda _: fits())
    document = (REPOSITORY / "docs" / "profiles.md").read_text(encoding="utf-8")
    copy = tmp_path / "profiles.md"
    copy.write_text(document, encoding="utf-8")
    assert main(["--data", str(DATA), "--out", str(tmp_path / "out"), "--docs", str(copy)]) == 0
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}
    shipped = {path.name: path.read_text(encoding="utf-8") for path in SHIPPED.glob("*.yaml")}
    del shipped[BY_HAND.file_name]
    assert written == shipped
    assert copy.read_text(encoding="utf-8") == document


MEAN_LIMITS = {
    AEGAEON: {"prefill": 0.08, "decode": 0.04},
    AICONFIGURATOR: {"prefill": 0.04, "decode": 0.04, "mixed": 0.04},
    LAYERWISE: {"prefill": 0.06, "decode": 0.025, "mixed": 0.065},
}


@needs_data
@pytest.mark.parametrize("table", MEAN_LIMITS)
def test_fits_predict_held_out_steps(table: str) -> None:
    """The mean over a source's tables; docs/profiles.md tells each and why some are worse."""
    chosen = [fit.fit.errors for key, fit in fits().items() if FITTED[key].table == table]
    for regime, limit in MEAN_LIMITS[table].items():
        errors = [error[regime].mean for error in chosen]
        assert np.mean(errors) <= limit, regime
        assert max(errors) <= 2.2 * limit, regime
    assert all(set(errors) <= set(REGIMES) for errors in chosen)


@needs_data
def test_the_constants_are_what_the_measurements_give() -> None:
    times = fit_residency(DATA / "profiles" / "vllm_sleep_mode.csv")
    for constant, fitted in zip(A100_TIMES, times, strict=True):
        assert constant == pytest.approx(fitted, rel=1e-6)
    assert dict(A100_BUSY.shares) == pytest.approx(
        dict(fit_busy_power(DATA / "profiles" / "splitwise_power.csv").shares), rel=1e-5
    )


@needs_data
def test_the_a100_parallel_efficiency_is_that_of_the_fits() -> None:
    by_key = {(key.architecture, key.tp): fit for key, fit in fits().items() if key.device == "A100"}
    small, large = by_key["llama-3.1-8b", 1].fit.coefficients, by_key["llama-3.1-70b", 4].fit.coefficients
    ratio = ARCHITECTURES["llama-3.1-70b"].parameters / ARCHITECTURES["llama-3.1-8b"].parameters
    efficiency = PARALLEL_EFFICIENCY["A100", 4]
    assert small.c0_s * ratio / 4 / large.c0_s == pytest.approx(efficiency.memory, abs=0.01)
    assert small.c2_s_per_token * ratio / 4 / large.c2_s_per_token == pytest.approx(efficiency.compute, abs=0.01)


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "aegaeon_prefill_decode.csv: No such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_go_between_their_markers() -> None:
    document = "a\n<!-- x -->\nold\n<!-- end x -->\nb\n"
    once = insert_tables(document, {"x": "new"})
    assert once == "a\n<!-- x -->\n\nnew\n\n<!-- end x -->\nb\n"
    assert insert_tables(once, {"x": "new"}) == once
    with pytest.raises(ConfigError, match="lacks the markers <!-- y --> and <!-- end y -->"):
        insert_tables(document, {"y": "new"})
