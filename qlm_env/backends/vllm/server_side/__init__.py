"""What vLLM's server processes load of this project. Modules here need nothing but the standard library."""

from __future__ import annotations

import os
from pathlib import Path

REQUIRE_KEY = ("--middleware", "qlm_require_key.RequireKey")
"""Arguments of a server for which :func:`python_path` is in the environment."""


def python_path(also: str = "") -> str:
    """``PYTHONPATH`` of a server process that finds these modules by their bare names, and what ``also`` names."""
    folder = str(Path(__file__).parent)
    return os.pathsep.join(filter(None, [folder, also or os.environ.get("PYTHONPATH", "")]))
