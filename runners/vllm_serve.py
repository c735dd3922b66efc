"""`qlm vllm serve`: one vLLM server on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
from pathlib import Path

from qlm_env.backends.vllm.launch import DUMMY_WEIGHTS, LaunchSettings, arguments, environment
from qlm_env.backends.vllm.models import LlamaShape, write_random_llama
from qlm_env.backends.vllm.server import ServerCommand, VllmServer
from qlm_env.spec import ConfigError
from runners.errors import CommandFailed
from runners.live_config import ServeOptions

_WATCH_INTERVAL_S = 1.0


def serve(options: ServeOptions) -> None:
    """Start the server, tell when it is ready, and stop it on Ctrl-C.

    Raises:
        ConfigError: it cannot be started as configured.
        CommandFailed: it ended by itself.
    """
    asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> None:
    out = Path(options.out)
    print(f"starting vLLM, which takes about a minute; its log is {out / 'server.log'}", flush=True)
    async with VllmServer(server_command(options), out / "server.log", options.start_timeout_s) as server:
        print(f"{options.name} is served at {server.url}; Ctrl-C stops it", flush=True)
        while server.exit_status is None:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        raise CommandFailed(f"the server ended with status {server.exit_status}: {server.last_log_lines()}")


def server_command(options: ServeOptions) -> ServerCommand:
    """The server process that ``options`` ask for; without a model of their own, a small one is written to ``out``.

    Raises:
        ConfigError: the model folder does not exist.
    """
    load_format = None
    if options.model_folder is None:
        model = Path(options.out) / "model"
        write_random_llama(model, LlamaShape(context_tokens=max(LlamaShape().context_tokens, options.max_model_len)))
        load_format = DUMMY_WEIGHTS
    else:
        model = Path(options.model_folder)
        if not model.is_dir():
            raise ConfigError(f"'model_folder': no folder {model}")
    settings = LaunchSettings(
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        num_gpu_blocks=options.num_gpu_blocks,
        dtype=options.dtype,
        load_format=load_format,
        scheduling_policy=options.scheduling_policy,
        kv_cache_gib=options.kv_cache_gib,
        cpus=options.cpus,
        arguments=options.arguments,
    )
    return ServerCommand(
        python=Path(options.python),
        model=model,
        served_name=options.name,
        port=options.port,
        arguments=arguments(settings),
        environment=environment(settings),
    )
