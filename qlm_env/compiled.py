"""The one way this project compiles a function: numba, cached on disk, GIL released, IEEE division.

No fast-math: results must be the same bits on every run. numba's own cache notices a change of the file a
function stands in, but not of the files it calls into; here the cache folder carries a digest of every source of
the package, so that stale machine code is never run.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import types
from numba.core.registry import CPUDispatcher

F = TypeVar("F", bound=Callable[..., object])


def _widest(argument: Any) -> Any:
    """The type a compiled function takes for an argument of this one: 64 bits for every number."""
    argument = types.unliteral(argument)  # type: ignore[no-untyped-call]
    if isinstance(argument, types.Integer):
        return types.int64
    return types.float64 if isinstance(argument, types.Float) else argument


class _Dispatcher(CPUDispatcher):
    """Compiles a function once, whatever the widths of the numbers its compiled callers pass.

    numba by itself makes a variant for every combination of 32-bit, 64-bit and literal numbers, and again of all
    that is called from there: more than half of this package's functions, and of the time to compile it.
    """

    def get_call_template(self, args: Iterable[Any], kws: Mapping[str, Any]) -> Any:  # type: ignore[override]
        """As numba calls it to find the variant that a call in compiled code runs."""
        wide = {name: _widest(argument) for name, argument in kws.items()}
        return super().get_call_template([_widest(argument) for argument in args], wide)


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
    settings: Any = numba.config
    if settings.DISABLE_JIT:
        return function
    dispatcher: Any = _Dispatcher(
        function, targetoptions={"nopython": True, "nogil": True, "error_model": "numpy", "_nrt": False, **options}
    )
    before = settings.CACHE_DIR
    # numba chooses the folder in this call, and only from this setting.
    settings.CACHE_DIR = _cache_folder()
    try:
        dispatcher.enable_caching()
    finally:
        settings.CACHE_DIR = before
    return cast("F", dispatcher)


def compiled(function: F) -> F:
    """Compile ``function`` with numba on its first call; the machine code is cached on disk. It cannot allocate."""
    return _jit(function)


def kernel(function: F) -> F:
    """As :func:`compiled`, for a function that only compiled functions call; from Python it would crash.

    Without the wrapper that unpacks Python arguments it compiles several times faster.
    """
    return _jit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)
