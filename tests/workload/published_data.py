"""Where the published data lie during development; the tests that need them skip without."""

from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


def published_file(name: str) -> Path:
    """The published file ``name``, below the data folder; skips the calling test where it is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"published data file {name} is not here")
    return path
