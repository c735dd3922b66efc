"""Servers that somebody else runs: found by their addresses, checked, used, and left as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qlm_env.backends.vllm.client import CompletionRequest, VllmClient
from qlm_env.backends.vllm.errors import RequestRefused, ServerError, ServerStartFailed, ServerUnreachable
from qlm_env.backends.vllm.facts import EngineFacts, EngineLimits, read_facts
from qlm_env.backends.vllm.provider import RunningServer, ServerProvider
from qlm_env.spec import EngineSpec

CHECK_SILENCE_S = 60.0
"""Longest wait for an answer while a server is checked; a sleeping or busy one answers as well."""


class Pair(NamedTuple):
    """Which server: the one that holds ``model`` for ``instance``."""

    instance: int
    model: int


class Address(NamedTuple):
    """Where a server is."""

    url: str
    model_name: str
    """The name it serves the model under."""
    api_key: str | None = None
    kv_store: Path | None = None
    """The folder of its KV connector, if that is on this machine."""

    def __repr__(self) -> str:
        return f"Address({self.url!r}, {self.model_name!r})"


@dataclass(frozen=True)
class Needed:
    """What a server must be able to do."""

    engine: EngineSpec
    context_tokens: int
    """Longest prompt + output of its model."""


class _GivenServer(RunningServer):
    def __init__(self, address: Address) -> None:
        self.url = address.url
        self.model_name = address.model_name
        self.api_key = address.api_key
        self.kv_store = address.kv_store

    @property
    def exit_reason(self) -> str | None:
        return None

    async def stop(self, kill: bool = False) -> None:
        """Leave it running."""


class GivenServers(ServerProvider):
    """Servers by their addresses. They are never stopped; a model in storage is one that sleeps.

    Args:
        addresses: where they are now, ``None`` for one that is away for the moment; asked again at every start, because
            whoever runs them may move them.
        needed: what the server of a pair must be able to do.
    """

    can_stop = False

    def __init__(
        self,
        addresses: Callable[[], Mapping[Pair, Address | None]],
        needed: Callable[[Pair], Needed],
    ) -> None:
        self._addresses = addresses
        self._needed = needed

    async def start(self, instance: int, model: int) -> RunningServer:
        pair = Pair(instance, model)
        addresses = self._addresses()
        address = addresses.get(pair)
        if address is None:
            raise ServerStartFailed(f"the server of model {model} for instance {instance} is not up")
        shares = sum(other.instance == instance for other in addresses) > 1
        async with VllmClient(address.url, address.api_key, CHECK_SILENCE_S) as client:
            try:
                await check_server(client, address.model_name, self._needed(pair), sleeps=shares)
            except ServerUnreachable as error:
                raise ServerStartFailed(str(error)) from None
        return _GivenServer(address)

    def serves(self, instance: int, model: int) -> bool:
        return Pair(instance, model) in self._addresses()

    async def close(self) -> None:
        """Leave all running."""


async def check_server(client: VllmClient, model_name: str, needed: Needed, *, sleeps: bool) -> EngineFacts:
    """What a server says of itself, if it can do what is needed.

    Args:
        sleeps: whether other models share its instance, so that it has to sleep while they run.

    Raises:
        ServerUnreachable: nothing answers.
        ServerError: it serves another model, is a version without a needed endpoint, or has other settings.
    """
    asleep = await _is_asleep(client)
    if asleep is None and sleeps:
        raise ServerError(
            f"{client.url} has no /is_sleeping, so that its model cannot make room for another: start it with "
            "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"
        )
    # Without its development mode it does not tell all, and what the configuration says is taken for true.
    limits = EngineLimits(
        max_num_seqs=needed.engine.max_num_seqs, max_num_batched_tokens=needed.engine.max_num_batched_tokens
    )
    facts = await read_facts(client, model_name, limits if asleep is None else None)
    _check_settings(client, facts, needed)
    if not asleep:
        # One token, because only an answer shows whether token ids come with it.
        await client.complete(model_name, CompletionRequest([1], 1))
    return facts


async def _is_asleep(client: VllmClient) -> bool | None:
    """Whether the model sleeps; ``None`` if the server has no such endpoint."""
    try:
        answer = await client.get_json("/is_sleeping")
    except RequestRefused as error:
        if error.status == 404:
            return None
        raise
    return bool(answer.get("is_sleeping")) if isinstance(answer, dict) else None


def _check_settings(client: VllmClient, facts: EngineFacts, needed: Needed) -> None:
    wanted, engine = needed.engine, facts.engine
    if facts.max_model_len < needed.context_tokens:
        raise ServerError(
            f"{client.url} serves {facts.model} with a context of {facts.max_model_len} tokens, but its "
            f"context_tokens is {needed.context_tokens}"
        )
    for name in ("block_size", "max_num_batched_tokens"):
        if getattr(engine, name) != getattr(wanted, name):
            raise ServerError(
                f"{client.url} runs with {name}={getattr(engine, name)}, but the cluster with "
                f"{getattr(wanted, name)}; give cluster.engine.{name}={getattr(engine, name)}"
            )
    for name in ("max_num_seqs", "num_gpu_blocks"):
        # What the server has beyond this is left unused; with less, requests would wait where nobody sees them.
        if getattr(engine, name) < (getattr(wanted, name) or 0):
            raise ServerError(
                f"{client.url} runs with {name}={getattr(engine, name)}, but the cluster counts on "
                f"{getattr(wanted, name)}; give cluster.engine.{name}={getattr(engine, name)}"
            )
