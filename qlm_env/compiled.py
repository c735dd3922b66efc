"""The one way this project compiles a function: numba, cached on disk, GIL released, IEEE division.

No fast-math: results must be the same bits on every run. numba's own cache notices a change of the file a
function stands in, but not of the files it calls into; here the cache folder carries a digest of every source of
the package, so that stale machine code is never run.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])


@functools.cache
def _cache_folder() -> str:
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.read_bytes())
    home = package / "__pycache__"
    if not os.access(package, os.W_OK):
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlm-env"
    return str(home / f"compiled-{digest.hexdigest()[:12]}")


def _jit(function: F, **options: bool) -> F:
    before = numba.config.CACHE_DIR
    # numba chooses the folder while decorating, and only from this setting.
    numba.config.CACHE_DIR = _cache_folder()
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy", **options)(function)  # type: ignore[no-any-return]
    finally:
        numba.config.CACHE_DIR = before


def compiled(function: F) -> F:
    """Compile ``function`` with numba on its first call; the machine code is cached on disk."""
    return _jit(function, _nrt=False)


def kernel(function: F) -> F:
    """As :func:`compiled`, for a function that only compiled functions call; from Python it would crash.

    Without the wrapper that unpacks Python arguments it compiles several times faster.
    """
    return _jit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False)
