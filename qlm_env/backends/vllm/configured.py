"""Where the servers of a configuration come from; what it asks for is checked before anything starts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qlm_env.backends.emulator.state import Fleet
from qlm_env.backends.vllm.cluster_state import ServerState, read_running
from qlm_env.backends.vllm.errors import ServerStartFailed
from qlm_env.backends.vllm.given_servers import Address, GivenServers, Needed, Pair
from qlm_env.backends.vllm.launch import LaunchSettings
from qlm_env.backends.vllm.local_servers import LocalModel, LocalServers
from qlm_env.backends.vllm.model_folders import model_folders
from qlm_env.backends.vllm.provider import ServerProvider
from qlm_env.backends.vllm.ray_servers import RayServers, Resources
from qlm_env.backends.vllm.server_side import REQUIRE_KEY, python_path
from qlm_env.spec import ClusterSpec, ConfigError, InstancesSpec, ModelSpec
from qlm_env.vllm_spec import GivenVllm, LocalVllm, RayVllm, StartedServers

SHARED_MEMORY = Path("/dev/shm")
CPU_KV_CACHE_GIB = 1
"""Memory for the KV cache of an engine on CPUs, which does not measure what is free."""


def make_provider(cluster: ClusterSpec, models: Sequence[ModelSpec], fleet: Fleet) -> ServerProvider:
    """Where the servers of ``cluster`` come from.

    Args:
        fleet: its engines, for what a given server must be able to do.

    Raises:
        ConfigError: ``cluster.vllm`` is missing, or asks for what is not there.
    """
    spec = cluster.vllm
    if spec is None:
        raise ConfigError(
            f"'cluster.vllm': cluster {cluster.name!r} does not say where its vLLM servers come from; "
            "allowed: kind: local, ray or urls (cluster=live_cpu is an example)"
        )
    api_key = read_api_key(spec.api_key_env)
    if isinstance(spec, GivenVllm):
        given = _given_addresses(spec, models, api_key)
        return GivenServers(lambda: given, _needed(cluster, models, fleet))
    if spec.state is not None:
        folder = Path(spec.state)
        _kept_addresses(folder, models)
        return GivenServers(lambda: _kept_addresses(folder, models), _needed(cluster, models, fleet))
    return _started_servers(cluster, spec, models, api_key)


def read_api_key(variable: str | None) -> str | None:
    """The key that an environment variable holds; ``None`` without one.

    Raises:
        ConfigError: the variable is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"'cluster.vllm.api_key_env': the environment variable {variable} is not set")
    return key


# --------------------------------------------------------------------------- servers that are given
def _given_addresses(spec: GivenVllm, models: Sequence[ModelSpec], api_key: str | None) -> dict[Pair, Address]:
    names = [model.name for model in models]
    return {
        Pair(server.instance, names.index(server.model)): Address(
            server.url, server.served_name or server.model, api_key
        )
        for server in spec.servers
    }


def _kept_addresses(folder: Path, models: Sequence[ModelSpec]) -> Mapping[Pair, Address | None]:
    """The servers of a cluster of ``qlm cluster up``, as far as ``models`` are theirs.

    Raises:
        ServerStartFailed: it is down.
    """
    try:
        state = read_running(folder)
    except ConfigError as error:
        raise ServerStartFailed(str(error)) from None
    names = [model.name for model in models]
    return {
        Pair(server.instance, names.index(server.model)): _kept_address(server)
        for server in state.servers
        if server.model in names
    }


def _kept_address(server: ServerState) -> Address | None:
    if server.phase != "up" or server.url is None:
        return None
    kv_store = None if server.kv_store is None else Path(server.kv_store)
    return Address(server.url, server.model, server.api_key, kv_store)


def _needed(cluster: ClusterSpec, models: Sequence[ModelSpec], fleet: Fleet) -> Callable[[Pair], Needed]:
    # One more than requests can use, which vLLM keeps as its null block.
    num_blocks = np.array(fleet.placement["num_blocks"]) + 1

    def needed(pair: Pair) -> Needed:
        engine = cluster.engine.model_copy(update={"num_gpu_blocks": int(num_blocks[pair])})
        return Needed(engine, models[pair.model].context_tokens)

    return needed


# --------------------------------------------------------------------------- servers that are started
def _started_servers(
    cluster: ClusterSpec, spec: LocalVllm | RayVllm, models: Sequence[ModelSpec], api_key: str | None
) -> ServerProvider:
    python = Path(spec.python)
    if isinstance(spec, LocalVllm) and not python.is_file():
        raise ConfigError(
            f"'cluster.vllm.python': no interpreter {python}; `make vllm-env` makes an environment with vLLM"
        )
    folders = model_folders(spec, models)
    local = [LocalModel(model.name, folder) for model, folder in zip(models, folders, strict=True)]
    logs = Path(spec.out) / "logs"
    settings = launch_settings(cluster, spec, models)
    if isinstance(spec, RayVllm):
        groups = _groups(cluster)
        return RayServers(
            local,
            python,
            logs,
            settings,
            lambda instance: Resources(spec.cpus_per_instance or 1, groups[instance].num_gpus),
            address=spec.address,
            api_key=api_key,
            start_timeout_s=spec.start_timeout_s,
            max_restarts=spec.max_restarts,
            max_starting=spec.max_starting,
        )
    return LocalServers(
        local,
        python,
        logs,
        settings,
        kv_store_folder=_kv_store_folder(cluster, spec),
        start_timeout_s=spec.start_timeout_s,
        base_port=spec.base_port,
        max_starting=spec.max_starting,
    )


def launch_settings(
    cluster: ClusterSpec, spec: LocalVllm | RayVllm, models: Sequence[ModelSpec]
) -> Callable[[int, int], LaunchSettings]:
    """The settings of the server of an instance and model.

    Raises:
        ConfigError: fewer GPUs are given than the instances need.
    """
    engine, groups = cluster.engine, _groups(cluster)
    gpus = _deal([group.num_gpus for group in groups], spec.gpus if isinstance(spec, LocalVllm) else None)
    cores = _deal([0 if group.num_gpus else spec.cpus_per_instance or 0 for group in groups], None)
    switches = {"enable-chunked-prefill": engine.enable_chunked_prefill, "async-scheduling": engine.async_scheduling}

    def settings(instance: int, model: int) -> LaunchSettings:
        group = groups[instance]
        on_gpus = group.num_gpus > 0
        kept = kept_kv(group, spec)
        environment, more = dict(spec.environment), spec.arguments
        if isinstance(spec, LocalVllm):
            # Other users of this machine can reach the loopback address, too.
            environment["PYTHONPATH"] = python_path(environment.get("PYTHONPATH", ""))
            more = (*REQUIRE_KEY, *more)
        elif not on_gpus:
            # Which cores of the node are its own nobody says; how many, Ray does.
            environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | environment
        return LaunchSettings(
            max_model_len=models[model].context_tokens,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            block_size=engine.block_size,
            num_gpu_blocks=engine.num_gpu_blocks,
            dtype=spec.dtype,
            scheduling_policy=engine.scheduling_policy,
            # Evicted requests find their KV there, if nowhere else.
            enable_prefix_caching=True,
            enforce_eager=not on_gpus,
            kv_cache_gib=None if on_gpus else CPU_KV_CACHE_GIB,
            cpus=cores[instance] if isinstance(spec, LocalVllm) and cores[instance] else None,
            gpus=gpus[instance] or None,
            kv_offloading_gib=group.host_kv_gb * 1e9 / 2**30 if kept == "host_memory" else None,
            sleep_mode=on_gpus,
            arguments=(*(f"--{name}" if on else f"--no-{name}" for name, on in switches.items()), *more),
            environment=tuple(environment.items()),
        )

    return settings


def kept_kv(group: InstancesSpec, spec: StartedServers) -> str:
    """Where instances of ``group`` keep the KV cache of evicted requests: prefix_cache, files or host_memory."""
    if spec.kv_store == "host_memory" and not group.num_gpus:
        raise ConfigError("'cluster.vllm.kv_store': host_memory needs GPUs; allowed on CPUs: files, prefix_cache")
    if spec.kv_store != "auto":
        return spec.kv_store
    if group.num_gpus:
        return "host_memory"
    # On another node nobody could remove from the files what is to be dropped.
    return "files" if isinstance(spec, LocalVllm) else "prefix_cache"


def _kv_store_folder(cluster: ClusterSpec, spec: LocalVllm) -> Path | None:
    """In memory where there is such a folder; the same at every start, so that what a crash left is replaced."""
    kept = {kept_kv(group, spec) for group in cluster.instances}
    if "files" not in kept:
        return None
    if len(kept) > 1:
        raise ConfigError("'cluster.vllm.kv_store': auto is different on CPUs and GPUs; name one")
    out = Path(spec.out).resolve()
    if not SHARED_MEMORY.is_dir():
        return out / "kv"
    return SHARED_MEMORY / f"qlm-{hashlib.sha256(str(out).encode()).hexdigest()[:16]}"


def _groups(cluster: ClusterSpec) -> list[InstancesSpec]:
    return [group for group in cluster.instances for _ in range(group.count)]


def _deal(counts: Sequence[int], given: Sequence[int] | None) -> list[tuple[int, ...]]:
    """So many to each instance, in order, of those given or from 0 on."""
    if given is not None and len(given) < sum(counts):
        raise ConfigError(f"'cluster.vllm.gpus': the instances need {sum(counts)} GPUs (got {len(given)})")
    dealt, first = [], 0
    for count in counts:
        numbers = range(first, first + count)
        dealt.append(tuple(numbers if given is None else given[first : first + count]))
        first += count
    return dealt
