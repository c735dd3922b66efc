"""Servers of this machine: what is started, under which limits; a small program plays vLLM."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from qlm_env.backends.vllm.errors import ServerStartFailed
from qlm_env.backends.vllm.launch import LaunchSettings, arguments, environment
from qlm_env.backends.vllm.local_servers import LocalModel, LocalServers
from qlm_env.backends.vllm.models import write_random_llama
from qlm_env.spec import ConfigError
from tests.backends.vllm.test_server import ENDS, SERVES, until

TOLD = """
import json, os, sys, time
with open(os.path.join(os.path.dirname(__file__), "starts.jsonl"), "a") as file:
    told = {"argv": sys.argv[1:], "key": os.environ["VLLM_API_KEY"], "began": time.monotonic()}
    file.write(json.dumps(told) + chr(10))
time.sleep(0.3)
"""
"""Says how it was started, and takes a while."""

SETTINGS = LaunchSettings(max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64)


def make_servers(folder: Path, script: str, settings: LaunchSettings = SETTINGS, **options: object) -> LocalServers:
    (folder / "script.py").write_text(script)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "script.py"} "$@"\n')
    python.chmod(0o755)
    models = [LocalModel(name, folder / name) for name in ("chat", "code")]
    for model in models:
        write_random_llama(model.folder)
    return LocalServers(models, python, folder / "logs", lambda i, m: settings, **options)  # type: ignore[arg-type]


def starts(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def word_after(argv: object, flag: str) -> str:
    assert isinstance(argv, list)
    return str(argv[argv.index(flag) + 1])


def test_each_pair_gets_a_server_with_a_name_a_port_and_a_key_of_its_own(tmp_path: Path) -> None:
    servers = make_servers(tmp_path, TOLD + SERVES)

    async def use() -> None:
        running = [await servers.start(i, m) for i, m in ((0, 0), (0, 1), (1, 0))]
        assert [server.model_name for server in running] == ["chat", "code", "chat"]
        assert len({server.url for server in running}) == len({server.api_key for server in running}) == 3
        for server, told in zip(running, starts(tmp_path), strict=True):
            assert server.url.endswith(f"127.0.0.1:{word_after(told['argv'], '--port')}")
            assert told["key"] == server.api_key
            assert server.api_key not in str(told["argv"])
            assert server.exit_reason is None
        await running[0].stop()
        assert running[0].exit_reason is not None
        await servers.close()
        await servers.close()
        assert all(server.exit_reason is not None for server in running)

    asyncio.run(use())
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "instance-0-chat-1.log",
        "instance-0-code-1.log",
        "instance-1-chat-1.log",
    ]


def test_only_so_many_start_at_the_same_time(tmp_path: Path) -> None:
    servers = make_servers(tmp_path, TOLD + SERVES, max_starting=1)

    async def use() -> None:
        await asyncio.gather(servers.start(0, 0), servers.start(1, 0))
        await servers.close()

    asyncio.run(use())
    first, second = (told["began"] for told in starts(tmp_path))
    assert isinstance(first, float)
    assert isinstance(second, float)
    assert second - first > 0.3


def test_a_start_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    servers = make_servers(tmp_path, TOLD + "time.sleep(600)", kv_store_folder=tmp_path / "kv")

    async def use() -> None:
        task = asyncio.create_task(servers.start(0, 0))
        assert await asyncio.to_thread(until, (tmp_path / "starts.jsonl").exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(use())
    assert list((tmp_path / "kv").iterdir()) == []
    script = str(tmp_path / "script.py").encode()
    commands = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(script in read_command(path) for path in commands)


def read_command(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_ports_from_a_base_and_a_failure_in_one_line(tmp_path: Path) -> None:
    servers = make_servers(tmp_path, TOLD + ENDS, base_port=23450)
    with pytest.raises(ServerStartFailed, match="ended with status 3 before it was ready"):
        asyncio.run(servers.start(1, 1))
    assert word_after(starts(tmp_path)[0]["argv"], "--port") == "23453"


def test_the_kv_store_is_in_memory_as_long_as_the_server(tmp_path: Path) -> None:
    servers = make_servers(tmp_path, TOLD + SERVES, kv_store_folder=tmp_path / "kv")

    async def use() -> None:
        server = await servers.start(0, 1)
        assert server.kv_store == tmp_path / "kv" / "instance-0-code"
        assert server.kv_store.is_dir()
        config = json.loads(word_after(starts(tmp_path)[0]["argv"], "--kv-transfer-config"))
        assert config["kv_connector_extra_config"] == {"shared_storage_path": str(server.kv_store)}
        await server.stop()
        assert not server.kv_store.exists()

    asyncio.run(use())


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^no model 'chat' in \S+nowhere: it has no config\.json$"):
        LocalServers([LocalModel("chat", tmp_path / "nowhere")], Path("python"), tmp_path, lambda i, m: SETTINGS)


def test_what_is_not_set_is_left_to_vllm() -> None:
    words = arguments(SETTINGS)
    for flag in ("--block-size", "--tensor-parallel-size", "--enable-prefix-caching", "--enable-sleep-mode"):
        assert flag not in words
    assert word_after(list(words), "--max-num-seqs") == "4"
    assert dict(environment(SETTINGS))["VLLM_SERVER_DEV_MODE"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in dict(environment(SETTINGS))


def test_a_gpu_engine_has_its_devices_and_sleeps() -> None:
    settings = LaunchSettings(
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        gpus=(2, 3),
        kv_offloading_gib=8.0,
        sleep_mode=True,
        enable_prefix_caching=False,
        arguments=("--seed", "1"),
    )
    words = list(arguments(settings))
    assert word_after(words, "--tensor-parallel-size") == "2"
    assert word_after(words, "--kv-offloading-size") == "8.0"
    assert "--enable-sleep-mode" in words
    assert "--no-enable-prefix-caching" in words
    assert words[-2:] == ["--seed", "1"]
    assert dict(environment(settings))["CUDA_VISIBLE_DEVICES"] == "2,3"
