"""How results came about: the exact command, and the environment it ran in."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import qlm_env
from runners import files
from runners.results import code_version

FILE = "command.json"
PACKAGES = ("numpy", "numba", "pandas", "scipy", "gymnasium", "pyscipopt", "hydra-core", "torch", "vllm")
CPU_INFO = Path("/proc/cpuinfo")


def note_command(out: Path) -> None:
    """Write the command that runs now and its environment to ``out/command.json``."""
    program, *arguments = sys.argv
    name = "qlm" if Path(program).name in ("qlm", "__main__.py") else Path(program).name
    values = {"command": shlex.join([name, *arguments]), "time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **environment()}
    files.write_text(out / FILE, json.dumps(values, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, the machine, and the version of this project's code."""
    return {
        "qlm_env": qlm_env.__version__,
        "code_version": code_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def read_command(out: Path) -> Mapping[str, Any] | None:
    """What :func:`note_command` wrote to a folder, or None."""
    try:
        values = json.loads((out / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _processor() -> str:
    """The processor's own name where Linux tells it."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
