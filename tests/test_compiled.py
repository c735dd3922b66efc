"""How functions are compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qlm_env import compiled as module
from qlm_env.compiled import compiled, kernel


def test_a_kernel_is_compiled_once_for_numbers_of_any_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cache_folder", lambda module, source: str(tmp_path))

    @kernel
    def scaled(x: float, times: int) -> float:
        return x * times

    @compiled
    def total(small: NDArray[np.int32], single: NDArray[np.float32], wide: int) -> float:
        return scaled(1.5, 2) + scaled(single[0], small[0]) + scaled(2.5, wide) + scaled(small[0], times=wide)

    assert total(np.array([3], np.int32), np.array([0.5], np.float32), 4) == 3.0 + 1.5 + 10.0 + 12.0
    variants: Any = scaled
    # One with a floating-point number first, one with a whole one.
    assert len(variants.signatures) == 2
    assert any(tmp_path.rglob("*.nbi"))


def test_machine_code_is_known_by_what_its_module_imports(tmp_path: Path) -> None:
    """An edit of a module that a function can see, however far, makes a new cache folder; one of another does not."""
    package = tmp_path / "toy"
    (package / "inner").mkdir(parents=True)
    (package / "kernels.py").write_text("from toy.inner import constants\n")
    (package / "inner" / "constants.py").write_text("import toy.deep\n")
    (package / "deep.py").write_text("STEPS = 1\n")
    (package / "other.py").write_text("from toy.kernels import f\n")

    def folder() -> str:
        # What is read is kept for the life of a process, in which sources do not change.
        module._cache_folder.cache_clear()
        module._imports.cache_clear()
        return module._cache_folder("toy.kernels", package / "kernels.py")

    first = folder()
    (package / "other.py").write_text("")
    assert folder() == first
    (package / "deep.py").write_text("STEPS = 2\n")
    assert folder() != first
