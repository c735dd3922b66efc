"""Weights & Biases as a mirror, offline."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from qlm_env.spec import ConfigError
from runners import report
from runners.compare import compare
from runners.config import CompareConfig
from tests.runners import fakes
from tests.runners.conftest import run_here


def test_offline_runs_are_written_below_out(
    configure: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr("runners.episodes.run_tasks", run_here)
    config = configure("tracking=wandb_offline", "planner=[fcfs,edf]", "seeds=1")
    compare(config, fakes.episode, fakes.check)
    runs = sorted((config.out / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    for run in runs:
        assert list(run.glob("*.wandb"))
        assert {path.name.partition("_")[0] for path in run.rglob("*.png")} == {"attainment", "latency"}
        pages = [path.read_text(encoding="utf-8") for path in run.rglob("*.html")]
        assert [page.count("<title>smoke on smoke</title>") for page in pages] == [1] * report.available()


def test_a_missing_package_is_found_before_the_run(
    configure: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = configure("tracking=wandb_offline")
    with pytest.raises(ConfigError, match=r"wandb is not installed; pip install 'qlm-env\[tracking\]'"):
        compare(config, fakes.episode, fakes.check)
    assert not config.out.exists()
