"""Networks this small compute fastest on one thread."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> None:
    torch = pytest.importorskip("torch", reason="needs the train extra")
    torch.set_num_threads(1)
