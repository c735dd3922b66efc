"""Real vLLM servers with small random-weight models; starting one takes half a minute."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlm_env.backends.vllm.backend import VllmBackend
from qlm_env.backends.vllm.instance import Patience
from qlm_env.backends.vllm.server import VllmServer, free_port
from runners.composition import Request
from runners.live_config import parse_serve
from runners.vllm_serve import server_command
from tests.vllm.real_cluster import real_backend

PYTHON_VARIABLE = "QLM_VLLM_PYTHON"
"""Names the interpreter of an environment with vLLM, for tests that start a server."""


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """An interpreter that has vLLM; skips without one."""
    python = os.environ.get(PYTHON_VARIABLE)
    if not python:
        pytest.skip(f"{PYTHON_VARIABLE} names no interpreter with vLLM")
    # Not resolved: the interpreter of a virtual environment is a link.
    return Path(python).absolute()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, vllm_python: Path) -> Iterator[VllmBackend]:
    """Real servers for all tests that want them; whoever takes it resets it."""
    folder = tmp_path_factory.mktemp("cluster")
    memory = Path("/dev/shm")
    kv_store = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else folder))
    backend = real_backend(folder, vllm_python, Patience(hang_s=60.0), kv_store)
    yield backend
    backend.close()
    backend.close()
    assert list(kv_store.iterdir()) == []
    kv_store.rmdir()


@pytest.fixture(scope="session")
def live_url(tmp_path_factory: pytest.TempPathFactory, vllm_python: Path) -> Iterator[str]:
    """The address of a running server."""
    python = vllm_python
    out = tmp_path_factory.mktemp("server")
    overrides = (f"python={python}", f"port={free_port()}", f"out={out}", "max_model_len=512", "max_num_seqs=4")
    options = parse_serve(Request("vllm_serve", (*overrides, "max_num_batched_tokens=128")).compose())
    with _Running(VllmServer(server_command(options), out / "server.log")) as url:
        yield url


class _Running:
    """A server that lives in an event loop of its own while tests run theirs."""

    def __init__(self, server: VllmServer) -> None:
        self._server = server
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> str:
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self._server.url

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        try:
            async with self._server:
                self._ready.set()
                await asyncio.to_thread(self._stop.wait)
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()
