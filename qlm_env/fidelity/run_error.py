"""The one mistake of this package: a recorded run that cannot be used."""

from __future__ import annotations

from pathlib import Path

from qlm_env.spec import ConfigError


class RunError(ConfigError):
    """A recorded run that cannot be used; the message is one line with the file, the line (from 1) and the field."""

    def __init__(self, path: Path, problem: str, line: int | None = None, field: str | None = None) -> None:
        where = f"{path}" + (f", line {line}" if line else "") + (f", field '{field}'" if field else "")
        super().__init__(f"{where}: {problem}")
