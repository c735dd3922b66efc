"""One vLLM server process on this machine: started, waited for, and stopped with everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from qlm_env.backends.vllm import guard
from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.errors import ServerStartFailed

HOST = "127.0.0.1"
STOP_GRACE_S = 15.0
"""Time for a server to end by itself before it is killed."""

_HEALTH_INTERVAL_S = 0.5
_LOG_LINES_SHOWN = 3
_LOG_TAIL_BYTES = 8192


@dataclass(frozen=True)
class ServerCommand:
    """What to start."""

    python: Path
    """The interpreter of the environment that has vLLM."""
    model: Path
    """A model folder."""
    served_name: str
    port: int
    arguments: tuple[str, ...] = ()
    """Further arguments of vLLM's API server."""
    environment: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Variables for the process, beside this one's own; an API key may be among them."""
    host: str = HOST
    """The address it listens on; beyond the loopback address its development endpoints need protection."""

    def words(self) -> list[str]:
        """The command line. It names the server's module because ``vllm serve`` asks for package metadata that
        the CPU build lacks."""
        return [
            str(self.python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            *("--model", str(self.model), "--served-model-name", self.served_name),
            *("--host", self.host, "--port", str(self.port)),
            *self.arguments,
        ]


class VllmServer:
    """A server process; an asynchronous context manager that starts it and never leaves it behind.

    The process group ends with the block, and also when this process is killed (:mod:`.guard`).

    Args:
        log: the file that takes what the server prints.
    """

    def __init__(self, command: ServerCommand, log: Path, start_timeout_s: float = 300.0) -> None:
        self.command = command
        self.log = log
        self.url = f"http://{command.host}:{command.port}"
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> VllmServer:
        self._start()
        try:
            await self._until_healthy()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def exit_status(self) -> int | None:
        """The status the server ended with; ``None`` while it runs."""
        return None if self._process is None else self._process.poll()

    async def stop(self, kill: bool = False) -> None:
        """End the process group and wait until it has ended.

        Args:
            kill: at once, without asking it to end.
        """
        if self._process is None:
            return
        stdin = self._process.stdin
        assert stdin is not None
        if not stdin.closed:
            # A guard that has ended has ended its group before.
            with contextlib.suppress(BrokenPipeError):
                if kill:
                    stdin.write(b"k")
                stdin.close()
        # Its guard kills what does not end in time, so this cannot hang; it must not be cut short by a second Ctrl-C.
        await asyncio.shield(asyncio.to_thread(self._process.wait))

    def last_log_lines(self) -> str:
        """The end of the log on one line."""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        shown = [" ".join(line.split()) for line in lines if line.strip()][-_LOG_LINES_SHOWN:]
        return " | ".join(shown) or "its log is empty"

    def _start(self) -> None:
        if not self.command.python.is_file():
            raise ServerStartFailed(
                f"'python': no interpreter {self.command.python}; `make vllm-env` makes an environment with vLLM"
            )
        if not _is_free(self.command.host, self.command.port):
            raise ServerStartFailed(f"'port': {self.command.port} is in use")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, guard.__file__, str(STOP_GRACE_S), *self.command.words()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.command.environment),
                start_new_session=True,
            )

    async def _until_healthy(self) -> None:
        deadline_s = time.monotonic() + self._start_timeout_s
        async with VllmClient(self.url, silence_s=_HEALTH_INTERVAL_S * 10) as client:
            while not await client.is_healthy():
                if self.exit_status is not None:
                    raise ServerStartFailed(
                        f"the vLLM server ended with status {self.exit_status} before it was ready "
                        f"({self.log}): {self.last_log_lines()}"
                    )
                if time.monotonic() > deadline_s:
                    raise ServerStartFailed(
                        f"the vLLM server was not ready within {self._start_timeout_s:g} s "
                        f"({self.log}): {self.last_log_lines()}"
                    )
                await asyncio.sleep(_HEALTH_INTERVAL_S)


def free_port(host: str = HOST) -> int:
    """A port of an address of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
