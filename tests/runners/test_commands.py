"""The smaller commands: workload describe, workload export, bench."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pandas as pd
import pytest

from runners.cli import main
from runners.commands import BENCHMARKS
from runners.config import BenchEmulatorOptions
from tests.runners.conftest import SMALL


def test_describe_prints_what_the_requests_look_like(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workload", "describe", *SMALL, "seed=3"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "smoke, seed 3, for smoke",
        "workload_hash",
        "num_requests",
        "200",
        "prompt_tokens p99",
        "model vicuna-13b",
    ):
        assert expected in printed


def test_export_writes_the_same_requests_for_the_same_seed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.parquet", "b.parquet", "c.parquet")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        assert main(["workload", "export", *SMALL, f"seed={seed}", f"out={path}"]) == 0
    a, b, c = map(pd.read_parquet, paths)
    assert len(a) == 200
    assert a.equals(b)
    assert not a.equals(c)


def test_bench_prints_and_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [{"name": "requests", "value": 2.5e6, "unit": "1/s"}]
    module = types.ModuleType("fake_bench")
    asked = []

    def measure(options: BenchEmulatorOptions) -> list[dict[str, object]]:
        asked.append(options)
        return figures

    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, BENCHMARKS["emulator"][0], module)
    assert main(["bench", "emulator", "loads=[0.5]", "num_requests=7", f"out={tmp_path}"]) == 0
    assert asked == [BenchEmulatorOptions(loads=(0.5,), num_requests=7, out=str(tmp_path))]
    assert json.loads((tmp_path / "bench.json").read_text()) == {"requests": {"value": 2.5e6, "unit": "1/s"}}
    assert "2.5e+06" in capsys.readouterr().out
