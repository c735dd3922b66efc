"""Text files written atomically."""

from __future__ import annotations

from pathlib import Path

from qlm_env.workload.atomic import atomic_path


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8; missing parent directories are created."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
