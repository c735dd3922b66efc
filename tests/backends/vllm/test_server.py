"""Starting and stopping a server process; an interpreter of our own plays the one that has vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlm_env.backends.vllm import guard
from qlm_env.backends.vllm.errors import ServerStartFailed
from qlm_env.backends.vllm.server import ServerCommand, VllmServer, free_port

ROOT = Path(__file__).parents[3]

SERVES = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""

ENDS = """
import sys
print("loading\\n\\nRuntimeError: no memory   left", flush=True)
sys.exit(3)
"""

HANGS = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("still loading", flush=True)
time.sleep(600)
"""

MakeServer = Callable[..., VllmServer]


@pytest.fixture
def make_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeServer:
    """A server whose process runs a script, whatever it is told to run."""
    monkeypatch.setattr("qlm_env.backends.vllm.server.STOP_GRACE_S", 0.3)

    def make(script: str, start_timeout_s: float = 20.0) -> VllmServer:
        (tmp_path / "script.py").write_text(script)
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "script.py"} "$@"\n')
        python.chmod(0o755)
        command = ServerCommand(python, tmp_path, "tiny", free_port())
        return VllmServer(command, tmp_path / "logs" / "server.log", start_timeout_s)

    return make


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline_s = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return condition()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def child_of(server: VllmServer) -> int:
    words = server.log.read_text().split()
    return int(words[words.index("child") + 1])


def test_a_server_ends_with_its_block_and_all_it_started(make_server: MakeServer) -> None:
    async def use() -> int:
        async with make_server(SERVES) as server:
            assert server.exit_status is None
            child = child_of(server)
            assert is_running(child)
            return child

    child = asyncio.run(use())
    assert until(lambda: not is_running(child))


def test_a_server_ends_when_its_starter_is_killed(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server(SERVES)
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, sys\n"
            "from pathlib import Path\n"
            "from qlm_env.backends.vllm.server import ServerCommand, VllmServer\n"
            "async def use():\n"
            "    command = ServerCommand(Path(sys.argv[1]), Path('.'), 'tiny', int(sys.argv[2]))\n"
            "    async with VllmServer(command, Path(sys.argv[3])):\n"
            "        print('ready', flush=True)\n"
            "        await asyncio.sleep(600)\n"
            "asyncio.run(use())\n",
            *(str(server.command.python), str(server.command.port), str(server.log)),
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"ready\n"
    child = child_of(server)
    assert is_running(child)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert until(lambda: not is_running(child), seconds=20.0)


def test_killing_does_not_wait_for_what_will_not_end(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlm_env.backends.vllm.server.STOP_GRACE_S", 60.0)
    stubborn = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"

    async def use() -> tuple[int, float]:
        server = await make_server(stubborn + SERVES).__aenter__()
        child = child_of(server)
        before_s = time.monotonic()
        await server.stop(kill=True)
        assert server.exit_status is not None
        await server.stop()
        return child, time.monotonic() - before_s

    child, seconds = asyncio.run(use())
    assert seconds < 10.0
    assert until(lambda: not is_running(child))


def test_a_command_does_not_show_its_environment() -> None:
    command = ServerCommand(Path("python"), Path("model"), "tiny", 1, environment=(("VLLM_API_KEY", "s3cret"),))
    assert "s3cret" not in repr(command)


def test_a_server_that_ends_early_is_told_with_its_last_words(make_server: MakeServer) -> None:
    server = make_server(ENDS)
    with pytest.raises(ServerStartFailed) as caught:
        asyncio.run(server.__aenter__())
    assert "ended with status 3 before it was ready" in str(caught.value)
    assert str(caught.value).endswith("loading | RuntimeError: no memory left")


def test_a_server_that_is_not_ready_in_time_is_ended(make_server: MakeServer) -> None:
    server = make_server(HANGS, start_timeout_s=1.0)
    with pytest.raises(ServerStartFailed, match=r"was not ready within 1 s \(.*server\.log\): still loading$"):
        asyncio.run(server.__aenter__())
    assert server.exit_status is not None


def test_what_cannot_be_started_is_one_line(make_server: MakeServer, tmp_path: Path) -> None:
    missing = VllmServer(ServerCommand(tmp_path / "nope", tmp_path, "tiny", free_port()), tmp_path / "log")
    with pytest.raises(ServerStartFailed, match=r"^'python': no interpreter \S+nope; `make vllm-env`"):
        asyncio.run(missing.__aenter__())

    async def twice() -> None:
        async with make_server(SERVES) as server:
            with pytest.raises(ServerStartFailed, match=rf"^'port': {server.command.port} is in use$"):
                await VllmServer(server.command, tmp_path / "log").__aenter__()

    asyncio.run(twice())


def test_the_guard_passes_on_a_request_to_stop(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            guard.__file__,
            "5",
            sys.executable,
            "-c",
            "print('up', flush=True); import time; time.sleep(600)",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM % 256 or process.returncode != 0
    process.stdout.close()
