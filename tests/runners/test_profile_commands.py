"""`qlm profile list`, `show` and `fit`, as a user types them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlm_env.profiles import list_profiles
from qlm_env.profiles.least_squares import predict_s
from qlm_env.profiles.load import read_profile
from qlm_env.profiles.step_tables import read_step_table
from runners.cli import main
from tests.profiles.test_layerwise import write_layers
from tests.profiles.test_least_squares import KNOWN
from tests.profiles.toy import toy_profile, write_profile

HEADER = "kind,prefill_tokens,prefix,decode_seqs,context_len,latency_ms"
STEPS = [
    *(("prefill", q, k, 0, 0) for q in (16, 64, 96, 128, 512, 2048) for k in (0, 512)),
    *(("decode", 0, 0, b, kv) for b in (1, 8, 64, 128) for kv in (16, 512, 4096)),
    *(("mixed", q, 0, b, kv) for q in (64, 512) for b in (4, 64) for kv in (128, 2048)),
]


def steps_file(folder: Path, noise: float = 0.0) -> Path:
    """A table of steps that take as long as :data:`KNOWN` says, give or take ``noise``."""
    path = folder / "steps.csv"
    rows = [",".join(map(str, step)) for step in STEPS]
    path.write_text("\n".join([HEADER, *(f"{row},100" for row in rows)]))
    factors = np.random.default_rng(0).uniform(1 - noise, 1 + noise, len(STEPS))
    latency_ms = 1e3 * predict_s(read_step_table(path, {}), KNOWN) * factors
    path.write_text("\n".join([HEADER, *(f"{row},{ms!r}" for row, ms in zip(rows, latency_ms.tolist(), strict=True))]))
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends in."""
    assert main(["profile", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("qlm: error: ")


def test_list_shows_every_profile_and_filters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["profile", "list"]) == 0
    output = capsys.readouterr().out
    assert f"{len(list_profiles())} latency profiles" in output
    assert "RTXPRO6000" in output
    assert main(["profile", "list", "device=A10", "tp=1"]) == 0
    output = capsys.readouterr().out
    assert "llama-2-7b" in output
    assert "A100" not in output
    write_profile(tmp_path, toy_profile())
    assert main(["profile", "list", "device=TOY", f"profiles={tmp_path}"]) == 0
    assert "toy-1b" in capsys.readouterr().out


def test_list_says_what_there_is_instead(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fails(capsys, "list", "device=B300").startswith("no profile with device=B300; there is: A10, A100, ")
    assert "no profile with tp=3; there is: 1, 2" in fails(capsys, "list", "tp=3")
    assert "does not exist" in fails(capsys, "list", f"profiles={tmp_path / 'nowhere'}")


def test_show_prints_every_number_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "show", "device=A100", "architecture=llama-3.1-8b"]) == 0
    output = capsys.readouterr().out
    for text in ("c3_s_per_kv_token", "s/token^2", "28,268", "fitted", "estimated", "AIConfigurator", "busy_power_w"):
        assert text in output


def test_show_needs_a_profile_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "show", "architecture=llama-3.1-8b") == "missing key 'device'"
    message = fails(capsys, "show", "device=A10", "architecture=llama-3.1-70b")
    assert message.startswith("no profile for llama-3.1-70b on A10 tp=1; A10 has: ")


def test_fit_writes_a_profile_that_show_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = steps_file(tmp_path)
    assert main(["profile", "fit", f"table={table}", "device=A100", "architecture=llama-2-7b", f"out={out}"]) == 0
    output = capsys.readouterr().out
    assert all(regime in output for regime in ("prefill", "decode", "mixed"))
    profile = read_profile(out / "a100_llama-2-7b_tp1.yaml")
    assert tuple(profile.step_time) == pytest.approx(tuple(KNOWN), rel=1e-3)
    assert profile.c0_s.source == f"fit to {len(STEPS)} steps in steps.csv"
    assert profile.num_gpu_blocks.value == 7375
    assert main(["profile", "show", "device=A100", "architecture=llama-2-7b", f"profiles={out}"]) == 0
    assert "steps in steps.csv" in capsys.readouterr().out


def test_fit_of_an_unknown_device_takes_numbers_and_another_profile(tmp_path: Path) -> None:
    like = write_profile(tmp_path, toy_profile())
    arguments = ["profile", "fit", f"table={steps_file(tmp_path)}", "device=NEW", "architecture=new-1b", "tp=2"]
    assert main([*arguments, f"like={like}", "num_gpu_blocks=77", "wake_s=0.5", f"out={tmp_path}"]) == 0
    profile = read_profile(tmp_path / "new_new-1b_tp2.yaml")
    assert (profile.num_gpu_blocks.value, profile.wake_s.value, profile.sleep_s.value) == (77, 0.5, 1.0)


def test_fit_refuses_a_bad_fit_unless_forced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [f"table={steps_file(tmp_path, noise=0.5)}", "device=A100", "architecture=llama-2-7b", f"out={out}"]
    message = fails(capsys, "fit", *arguments)
    assert message.startswith("the fit is worse than max_error=0.08: mean held-out error of prefill ")
    assert message.endswith("; force=true writes the profile all the same")
    assert not out.exists()
    assert main(["profile", "fit", *arguments, "force=true"]) == 0
    assert (out / "a100_llama-2-7b_tp1.yaml").exists()
    assert main(["profile", "fit", *arguments, "max_error=0.9"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("latency_ms", "latency"), "missing columns latency_ms"),
        (lambda text: text.replace("latency_ms", "latency_ms,latency_s").replace("\n", ",1\n"), "mixed units"),
        (lambda text: text + "\ndecode,0,0,8,16,-3", "line 34: latency_ms must be a number >= 0, not -3.0"),
        (lambda text: "\n".join(text.splitlines()[:16]), "too few decode steps to fit: 3; at least 8 are needed"),
    ],
)
def test_fit_refuses_a_wrong_table_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: object, message: str
) -> None:
    table, out = steps_file(tmp_path), tmp_path / "out"
    assert callable(change)
    table.write_text(change(table.read_text()))
    assert message in fails(capsys, "fit", f"table={table}", "device=A100", "architecture=llama-2-7b", f"out={out}")
    assert not out.exists()


def test_fit_needs_its_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, out = f"table={steps_file(tmp_path)}", f"out={tmp_path / 'out'}"
    assert fails(capsys, "fit", out) == "missing key 'table'"
    assert "No such file" in fails(capsys, "fit", "table=absent.csv", "device=A100", "architecture=llama-2-7b", out)
    assert fails(capsys, "fit", table, "device=A100", "architecture=new", out).startswith(
        "no weight_bytes, kv_bytes_per_token, num_gpu_blocks, context_tokens"
    )
    assert "num_gpu_blocks" in fails(capsys, "fit", table, "device=A100", "architecture=new", out, "num_gpu_blocks=0")
    assert "max_error" in fails(capsys, "fit", table, "device=A100", "architecture=new", out, "max_error=-1")
    like = f"like={tmp_path / 'absent.yaml'}"
    assert "No such file" in fails(capsys, "fit", table, "device=A100", "architecture=llama-2-7b", out, like)
    assert not (tmp_path / "out").exists()


def test_fit_of_layer_times_needs_known_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = f"table={write_layers(tmp_path / 'layers')}"
    assert fails(capsys, "fit", folder, "device=NEW", "architecture=llama-2-7b").startswith(
        "'device': layer times need one of A10, "
    )
    message = fails(capsys, "fit", folder, "device=A100", "architecture=llama-2-7b")
    assert message == "the layers were measured on a model with 4 heads; llama-2-7b has 32"
