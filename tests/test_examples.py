"""The examples run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_training_with_plain_stable_baselines() -> None:
    pytest.importorskip("sb3_contrib", reason="needs the train extra")
    script = ROOT / "examples" / "train_with_sb3.py"
    assert len(script.read_text().splitlines()) < 30
    done = subprocess.run(
        [sys.executable, str(script), "2048"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SLO attainment" in done.stdout
