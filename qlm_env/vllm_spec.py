"""Where the vLLM servers of a real cluster come from, as configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlm_env.spec_base import PositiveFloat, PositiveInt, Spec, Text, unique


class VllmBase(Spec):
    """What every way to get vLLM servers has."""

    api_key_env: Text | None = None
    """The environment variable that holds the servers' API key; the key itself stands nowhere."""
    silence_s: PositiveFloat = 120.0
    """A server that has requests and brings nothing for so long counts as hung."""


class StartedServers(VllmBase):
    """vLLM servers that are started, one per instance and model, as they are needed."""

    python: Text = ".venv-vllm/bin/python"
    """The interpreter of the environment that has vLLM."""
    model_folders: Mapping[str, Text] = {}
    """Folder of each model by its name. A model of architecture ``tiny`` that is not named here is made."""
    out: Text = "results/vllm"
    """Folder of logs, kept KV cache and models that are made."""
    state: Text | None = None
    """Folder of a cluster that ``qlm cluster up`` keeps: its servers are used, and none is started or stopped."""
    dtype: Text = "auto"
    """Number format of weights and KV cache; ``auto`` is the model's own."""
    cpus_per_instance: PositiveInt | None = None
    """Cores an instance on CPUs computes on, dealt in order; ``None`` lets all use all."""
    kv_store: Literal["auto", "prefix_cache", "files", "host_memory"] = "auto"
    """Where the KV cache of evicted requests is kept: in the engine's own blocks until they are needed, in files, or in
    host memory by vLLM's offloading, which needs GPUs. ``auto`` is ``files`` on CPUs and ``host_memory`` on GPUs."""
    arguments: tuple[str, ...] = ()
    """Further arguments of every server."""
    environment: Mapping[str, str] = {}
    """Variables of every server, beside this process's own."""
    start_timeout_s: PositiveFloat = 600.0
    max_starting: PositiveInt = 2
    """Servers that start at the same time, at most."""

    @field_validator("arguments")
    @classmethod
    def _no_key_in_arguments(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Arguments stand in process listings and, as all of a configuration, in results."""
        if any(word.split("=")[0].replace("_", "-") == "--api-key" for word in value):
            raise ValueError("a key does not belong here; name the variable that holds it with api_key_env")
        return value

    @field_validator("environment")
    @classmethod
    def _no_secret_in_environment(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name in value:
            if any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
                raise ValueError(
                    f"{name} looks like a secret, and a configuration is kept with results; set it where qlm is "
                    "started: servers have its variables too"
                )
        return value


class LocalVllm(StartedServers):
    """vLLM servers that are started on this machine."""

    kind: Literal["local"] = "local"
    base_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Servers get the ports from here on; ``None`` takes free ones."""
    gpus: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """GPUs dealt to the instances, ``tp`` each, in order; ``None`` counts from 0."""


class RayVllm(StartedServers):
    """vLLM servers that Ray places: an actor per instance holds its GPUs, or its cores on CPUs."""

    kind: Literal["ray"]
    address: Text | None = None
    """Of the Ray cluster, such as ``10.0.0.1:6379``; ``None`` takes the one this machine is in, or starts one here."""
    max_restarts: Annotated[int, Field(ge=-1)] = -1
    """How often Ray starts a lost actor again; -1 is always."""


class GivenServer(Spec):
    """A server that somebody else runs."""

    instance: Annotated[int, Field(ge=0)]
    model: Text
    """The workload's name of the model."""
    url: Text
    served_name: Text | None = None
    """The server's name of the model; ``None`` is the same."""

    @field_validator("url")
    @classmethod
    def _without_password(cls, value: str) -> str:
        if "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError("must not hold a user name or password; api_key_env names a key's variable")
        return value


class GivenVllm(VllmBase):
    """vLLM servers that somebody else runs, given by their addresses."""

    kind: Literal["urls"]
    servers: Annotated[tuple[GivenServer, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_server_each(self) -> GivenVllm:
        unique([f"{server.model} on instance {server.instance}" for server in self.servers], "server of")
        unique([server.url.rstrip("/") for server in self.servers], "url")
        return self


VllmSpec = Annotated[LocalVllm | RayVllm | GivenVllm, Field(discriminator="kind")]
