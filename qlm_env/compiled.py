"""The one way this project compiles a function: numba, cached on disk, GIL released, IEEE division.

No fast-math: results must be the same bits on every run. numba's own cache notices a change of the file a
function stands in, but not of the files it calls into; here the cache folder carries a digest of the function's module
and of every module of its package and this one that it imports, directly or not, so that stale machine code is never
run.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import types
from numba.core.registry import CPUDispatcher

F = TypeVar("F", bound=Callable[..., object])
R = TypeVar("R")


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

    when_absent: Any = None
    """What a call with None as first argument runs instead; see :func:`kernel_if_present`."""

    def get_call_template(self, args: Iterable[Any], kws: Mapping[str, Any]) -> Any:  # type: ignore[override]
        """As numba calls it to find the variant that a call in compiled code runs."""
        wide = {name: _widest(argument) for name, argument in kws.items()}
        widest = [_widest(argument) for argument in args]
        if self.when_absent is not None and isinstance(widest[0], types.NoneType):
            return self.when_absent.get_call_template(widest, wide)
        return super().get_call_template(widest, wide)

    def get_overload(self, sig: Any) -> Any:
        """The machine code for a signature: what was not compiled from this function was from its stand-in."""
        if self.when_absent is not None and sig not in self.overloads:
            return self.when_absent.get_overload(sig)
        return super().get_overload(sig)


@functools.cache
def _cache_folder(module: str, source: Path) -> str:
    """Where the machine code of the functions in ``module``, whose text is in ``source``, is kept."""
    packages = {__name__.partition(".")[0]: Path(__file__).parent}
    levels = module.count(".")
    package = source.parents[levels - 1] if levels else Path(__file__).parent
    packages[module.partition(".")[0]] = package
    digest = hashlib.sha256()
    for file in _sources(packages, source):
        digest.update(file.read_bytes())
    home = package / "__pycache__"
    if not os.access(package, os.W_OK):
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlm-env"
    return str(home / f"compiled-{digest.hexdigest()[:12]}")


def _sources(packages: Mapping[str, Path], source: Path) -> list[Path]:
    """``source`` and every file of ``packages`` that it imports, directly or not: what its functions can depend on."""
    found: set[Path] = set()
    ahead = [source, Path(__file__)]
    while ahead:
        file = ahead.pop()
        if file not in found:
            found.add(file)
            ahead += _imported_files(packages, file)
    return sorted(found)


@functools.cache
def _imports(file: Path) -> tuple[str, ...]:
    """The dotted names that a file imports; of ``from a import b`` both ``a`` and ``a.b``, as ``b`` may be a module."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


def _imported_files(packages: Mapping[str, Path], file: Path) -> Iterator[Path]:
    for name in _imports(file):
        top, *below = name.split(".")
        if top in packages:
            path = packages[top].joinpath(*below)
            yield from filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py"))


def _jit(function: F, when_absent: Any = None, **options: bool) -> F:
    settings: Any = numba.config
    if settings.DISABLE_JIT:
        return function
    dispatcher: Any = _Dispatcher(
        function, targetoptions={"nopython": True, "nogil": True, "error_model": "numpy", "_nrt": False, **options}
    )
    dispatcher.when_absent = when_absent
    before = settings.CACHE_DIR
    # numba chooses the folder in this call, and only from this setting.
    settings.CACHE_DIR = _cache_folder(function.__module__, Path(inspect.getfile(function)))
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


def inlined(function: F) -> F:
    """As :func:`kernel`, and made part of its callers: for small functions on the engine's hot path.

    A call passes every array of a tuple by address, shape and strides, which for these costs more than they do.
    """
    return _jit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)


def inlined_and_compiled(function: F) -> F:
    """As :func:`inlined`, for a function that Python calls too."""
    return _jit(function, forceinline=True)


def _nothing(*arguments: object) -> int:
    return 0


def kernel_if_present(function: Callable[..., R]) -> Callable[..., R]:
    """As :func:`kernel`, for a function of something optional, its first argument: with None it does nothing, and is 0.

    What is None has no type in compiled code that the function could be compiled for.
    """
    return _jit(function, when_absent=kernel(_nothing), no_cpython_wrapper=True, no_cfunc_wrapper=True)
