"""How far the emulator is from a real engine: recorded runs, replayed and compared."""

from __future__ import annotations

from qlm_env.fidelity.errors import Comparison, compare_runs
from qlm_env.fidelity.recorded import RecordedRun, read_run
from qlm_env.fidelity.replay import ReplayedRun, replay

__all__ = ["Comparison", "RecordedRun", "ReplayedRun", "compare_runs", "read_run", "replay"]
