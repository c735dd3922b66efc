"""`qlm profile validate`: what it prints and writes, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qlm_env.spec import EngineSpec
from runners.cli import main
from tests.fidelity_runs.runs import META, ROW, random_requests, run_by_steps, write_run
from tests.profiles.toy import toy_profile, write_profile

CLASSES = ("interactive", "batch-1")
ENGINE = EngineSpec(max_num_seqs=16, max_num_batched_tokens=256, num_gpu_blocks=1000, async_scheduling=True)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A run that the reference engine served with the toy profile."""
    requests = random_requests(np.random.default_rng(5), 40, CLASSES)
    return run_by_steps(tmp_path / "run", toy_profile(), ENGINE, requests, CLASSES)


def test_a_run_is_compared_and_drawn(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recorded / "timeseries.csv").write_text("t,running,waiting\n1,16,3\n2,16,0\n", encoding="utf-8")
    profile = write_profile(tmp_path, toy_profile())
    assert main(["profile", "validate", f"run={recorded}", f"profile={profile}", f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    for expected in ("toy/Toy-1B, vLLM 0.32.0: 40 requests", "time to first token", "until first scheduled", "batch-1"):
        assert expected in printed
    written = json.loads((tmp_path / "out" / "validation.json").read_text(encoding="utf-8"))
    assert set(written["latencies_s"]) == {"ttft", "tpot", "e2e", "queueing"}
    assert written["latencies_s"]["e2e"]["relative_error"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert written["overall_attainment"] == {"recorded": 1.0, "emulated": 1.0}
    assert written["run"]["engine"]["async_scheduling"] is True
    assert (tmp_path / "out" / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_the_runs_own_slo_classes_go_before_the_configured_ones(recorded: Path, tmp_path: Path) -> None:
    meta = json.loads((recorded / "meta.json").read_text(encoding="utf-8"))
    classes = [{"name": name, "target_s": 1e-3} for name in CLASSES]
    (recorded / "meta.json").write_text(json.dumps(meta | {"slo": {"metric": "ttft", "classes": classes}}))
    profile = write_profile(tmp_path, toy_profile())
    assert main(["profile", "validate", f"run={recorded}", f"profile={profile}", f"out={tmp_path / 'out'}"]) == 0
    written = json.loads((tmp_path / "out" / "validation.json").read_text(encoding="utf-8"))
    assert written["slo_metric"] == "ttft"
    assert written["overall_attainment"] == {"recorded": 0.0, "emulated": 0.0}


def test_a_shipped_profile_takes_the_runs_tp_and_what_is_assumed_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "tensor_parallel_size": 4}
    run = write_run(tmp_path / "run", [ROW], {"vllm_version": "0.19.0", "engine_kwargs": engine})
    arguments = ["profile", "validate", f"run={run}", "device=A100", "architecture=llama-2-7b"]
    assert main([*arguments, "targets_s=[2,4]", f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "llama-2-7b on A100 tp=4" in printed
    assert "is not recorded: the profile's own block count" in printed
    assert "async_scheduling=True is not recorded: the default of vLLM 0.19.0" in printed
    written = json.loads((tmp_path / "out" / "validation.json").read_text(encoding="utf-8"))
    assert [row["target_s"] for row in written["attainment"]] == [2.0, 4.0]
    assert main([*arguments, "tp=1", f"out={tmp_path / 'out'}"]) == 0
    assert "the run had tp=4, the profile (llama-2-7b on A100 tp=1) has tp=1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "missing key 'run'"),
        (["run=here"], "give profile=FILE, or device=... and architecture=..."),
        (["run=here", "device=A100"], "give profile=FILE, or device=... and architecture=..."),
        (["run=here", "profile=x.yaml", "tp=2"], "not both (got tp as well)"),
        (["run=here", "profile=x.yaml", "targets_s=[0]"], "'targets_s.0': input should be greater than 0"),
        (["run=here", "profile=x.yaml", "slo.metric=tpot"], "'slo.metric': "),
        (["run=nowhere", "profile=x.yaml"], "'run': no folder 'nowhere'"),
        (["run=here", "profile=x.yaml"], "profile x.yaml: No such file"),
        (["run=here", "device=A100", "architecture=gpt-5"], "no profile for gpt-5 on A100 tp=1"),
        (["run=long", "device=A100", "architecture=llama-2-7b"], "line 1: 1,600 prompt and 5 output tokens are more"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "here")
    write_run(tmp_path / "long", [ROW | {"input_toks": 1600}], META)
    assert main(["profile", "validate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("qlm: error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "long"]
