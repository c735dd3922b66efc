from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlm_env.profiles import ProfileKey, find_profile, list_profiles, load_profile
from qlm_env.profiles.load import read_profile
from qlm_env.spec import ConfigError
from tests.profiles.toy import ROUND_NUMBERS, toy_profile, write_profile


def rewrite(path: Path, change: Any) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


def test_a_written_profile_reads_back_as_it_was(tmp_path: Path) -> None:
    profile = toy_profile()
    write_profile(tmp_path, profile)
    assert load_profile("TOY", "toy-1b", 1, tmp_path) == profile
    assert profile.values() == ROUND_NUMBERS
    assert tuple(profile.step_time) == (0.01, 1e-5, 64.0, 1e-4, 1e-6, 1e-8, 1e-4, 2e-7)


def test_power_may_be_left_out(tmp_path: Path) -> None:
    profile = toy_profile(peak_power_w=400.0)
    path = write_profile(tmp_path, profile)
    assert "busy_power_w" not in path.read_text(encoding="utf-8")
    assert load_profile("TOY", "toy-1b", 1, tmp_path) == profile
    assert profile.values() == ROUND_NUMBERS | {"peak_power_w": 400.0}
    assert profile.busy_power_w is None


def test_own_profiles_add_to_the_shipped_ones_and_take_precedence(tmp_path: Path) -> None:
    write_profile(tmp_path, toy_profile())
    write_profile(tmp_path, toy_profile("A10", "llama-2-7b", 1, wake_s=7.0))
    assert load_profile("A10", "llama-2-7b", 1, tmp_path).wake_s.value == 7.0
    assert load_profile("A10", "llama-2-7b", 1).wake_s.value != 7.0
    assert set(list_profiles(tmp_path)) == {*list_profiles(), ProfileKey("TOY", "toy-1b", 1)}


def test_no_profile_says_what_there_is() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^no profile for llama-2-70b on A10 tp=1; A10 has: .*llama-2-7b tp=1, llama-2-7b tp=2",
    ):
        load_profile("A10", "llama-2-70b", 1)
    with pytest.raises(
        ConfigError, match=r"no profile for llama-2-7b on B300 tp=1; devices with profiles: A10, A100, .*RTXPRO6000$"
    ):
        load_profile("B300", "llama-2-7b", 1)


@pytest.mark.parametrize("device", ["a10", "../data/A10", "A10\0"])
def test_a_device_must_be_named_exactly(device: str) -> None:
    assert find_profile(device, "llama-2-7b", 1) is None


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile directory .*nowhere does not exist"):
        load_profile("A10", "llama-2-7b", 1, tmp_path / "nowhere")


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = write_profile(tmp_path, toy_profile())
    assert load_profile("TOY", "toy-1b", 1, tmp_path).wake_s.value == 1.0
    before_ns = path.stat().st_mtime_ns
    write_profile(tmp_path, toy_profile(wake_s=2.0))
    os.utime(path, ns=(before_ns + 1, before_ns + 1))
    assert load_profile("TOY", "toy-1b", 1, tmp_path).wake_s.value == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(colour="red"), "unknown key 'colour'"),
        (lambda v: v["c0_s"].update(colour="red"), "unknown key 'c0_s.colour'"),
        (
            lambda v: v["c2_s_per_token"].update(value=-1e-5),
            "'c2_s_per_token.value': .*greater than or equal to 0",
        ),
        (lambda v: v["c0_s"].update(value=float("nan")), "'c0_s.value'"),
        (lambda v: v["wake_s"].pop("unit"), "missing key 'wake_s.unit'"),
        (lambda v: v["wake_s"].pop("source"), "missing key 'wake_s.source'"),
        (lambda v: v["wake_s"].update(source=""), "'wake_s.source'"),
        (lambda v: v["wake_s"].update(unit="ms"), "'wake_s': unit must be 's', not 'ms'"),
        (lambda v: v["wake_s"].update(kind="guessed"), "'wake_s.kind'.*'measured', 'fitted' or 'estimated'"),
        (lambda v: v["c0_s"].update(value=0.0), "'c0_s': value must be positive"),
        (lambda v: v["num_gpu_blocks"].update(value=1.5), "'num_gpu_blocks': value must be a whole number"),
        (
            lambda v: v["c3_s_per_kv_token"].update(value=-1e-9),
            "'c3_s_per_kv_token.value': .*greater than or equal to 0",
        ),
        (lambda v: v["busy_power_w"].update(unit="kW"), "'busy_power_w': unit must be 'W', not 'kW'"),
        (lambda v: v.pop("c5_s_per_sequence"), "missing key 'c5_s_per_sequence'"),
        (lambda v: v.update(tp=0), "'tp'"),
        (lambda v: v.update(tp=2), "call for the file name toy_toy-1b_tp2.yaml"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    path = write_profile(tmp_path, toy_profile(busy_power_w=300.0))
    rewrite(path, change)
    with pytest.raises(ConfigError, match=message) as error:
        load_profile("TOY", "toy-1b", 1, tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{unclosed", "- a list", "", "\x00"])
def test_what_is_no_mapping_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "toy_toy-1b_tp1.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(str(path))) as error:
        read_profile(path)
    assert "\n" not in str(error.value)


def test_an_unreadable_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_profile(tmp_path / "toy_toy-1b_tp1.yaml")
