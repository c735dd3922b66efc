"""The shipped profiles, and the command that writes them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from qlm_env.profiles import Profile, list_profiles, load_profile
from qlm_env.profiles.catalogue import ESTIMATED_FROM, FITTED, fit_step_times
from qlm_env.profiles.fit import generate, main
from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES
from qlm_env.profiles.load import SHIPPED
from qlm_env.profiles.report import insert_tables
from qlm_env.profiles.scaling import PARALLEL_EFFICIENCY
from qlm_env.spec import ConfigError

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / ".." / "shared" / "data"

needs_data = pytest.mark.skipif(
    not (DATA / "profiles" / "aegaeon_prefill_decode.csv").exists(),
    reason="the published measurements are not in ../shared/data",
)

generated = cache(generate)
fits = cache(fit_step_times)


@pytest.fixture(params=list_profiles(), ids=lambda key: key.file_name)
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(*request.param)


def test_every_profile_of_the_catalogue_is_shipped() -> None:
    assert set(list_profiles()) == set(FITTED) | set(ESTIMATED_FROM)


def test_no_step_is_faster_than_the_device_can_be(profile: Profile) -> None:
    device, architecture = DEVICES[profile.device], ARCHITECTURES[profile.architecture]
    bandwidth, flops = (profile.tp * peak for peak in (device.bandwidth_bytes_per_s, device.fp16_flops_per_s))
    c = profile.step_time
    tolerance = 0.999  # four digits
    assert c.c0_s >= architecture.weight_bytes / bandwidth
    assert c.c2_s_per_token >= 2 * architecture.parameters / flops
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
def test_regenerating_gives_exactly_the_shipped_files(tmp_path: Path) -> None:
    assert main(["--data", str(DATA), "--out", str(tmp_path)]) == 0
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_text(encoding="utf-8") for path in SHIPPED.glob("*.yaml")}
    assert written == shipped


@needs_data
def test_the_documentation_shows_the_generated_tables() -> None:
    document = (REPOSITORY / "docs" / "profiles.md").read_text(encoding="utf-8")
    assert insert_tables(document, generated(DATA)[1]) == document


@needs_data
def test_fits_predict_held_out_steps() -> None:
    for key, fit in fits(DATA / "profiles").items():
        limits = {"prefill": 0.04, "decode": 0.04, "mixed": 0.04}
        if FITTED[key].table == "Aegaeon":
            limits["prefill"] = 0.08
        for regime, error in fit.errors.items():
            assert error.mean <= limits[regime], (key, regime)


@needs_data
def test_the_a100_parallel_efficiency_is_that_of_the_fits() -> None:
    by_key = {(key.architecture, key.tp): fit for key, fit in fits(DATA / "profiles").items() if key.device == "A100"}
    small, large = by_key["llama-3.1-8b", 1].coefficients, by_key["llama-3.1-70b", 4].coefficients
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
