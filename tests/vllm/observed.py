"""What vLLM itself says of the servers of a cluster, and waiting for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from qlm_env.backends.base import BackendEvent, EventKind
from qlm_env.backends.vllm.backend import VllmBackend
from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.facts import GENERATED_TOKENS, RUNNING, metric_sum, parse_metrics
from qlm_env.requests import NOWHERE

PATIENCE_S = 400.0
PROMPT_TOKENS_BY_SOURCE = "vllm:prompt_tokens_by_source_total"


class Observed(NamedTuple):
    """One look at ``/metrics``; counts are since the server started."""

    running: float
    generated: float
    prompt_tokens: Mapping[str, float]
    """By source: ``local_compute``, ``local_cache_hit``, ``external_kv_transfer``."""

    def since(self, before: Observed) -> Observed:
        tokens = {source: count - before.prompt_tokens.get(source, 0.0) for source, count in self.prompt_tokens.items()}
        return Observed(self.running, self.generated - before.generated, tokens)


def observe(backend: VllmBackend, instance: int, model: int = 0) -> Observed:
    samples = parse_metrics(ask(backend, instance, model, "/metrics"))
    sources = {sample.labels["source"]: sample.value for sample in samples.get(PROMPT_TOKENS_BY_SOURCE, ())}
    return Observed(metric_sum(samples, RUNNING), metric_sum(samples, GENERATED_TOKENS), sources)


def ask(backend: VllmBackend, instance: int, model: int, path: str) -> str:
    """What a server answers."""
    server = backend.servers()[instance, model]

    async def get() -> str:
        async with VllmClient(server.url, server.api_key) as client:
            return await client.get_text(path)

    return asyncio.run(get())


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline_s = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return condition()


def wait_for(backend: VllmBackend, kind: EventKind, subject: int = NOWHERE) -> list[BackendEvent]:
    """Everything told up to the first event of this kind and subject."""
    told: list[BackendEvent] = []
    deadline_s = backend.now_s + PATIENCE_S
    while not any((event.kind, event.subject) == (kind, subject) for event in told):
        assert backend.now_s < deadline_s, f"no {kind.name} {subject} in {told}"
        told += backend.advance(deadline_s)
        finished = kind == EventKind.RETURNED and (EventKind.FINISHED, subject) in {event[::3] for event in told}
        assert not finished, "it finished before it could be interrupted"
    return told


def wait_for_tokens(backend: VllmBackend, request: int, tokens: int = 1) -> None:
    deadline_s = backend.now_s + PATIENCE_S
    while backend.requests["generated_tokens"][request] < tokens:
        assert backend.now_s < deadline_s
        backend.advance(backend.now_s + 0.01)
    assert backend.requests["instance"][request] != NOWHERE, "it finished before it could be interrupted"


def evict(backend: VllmBackend, instance: int, request: int, keep_kv: bool) -> int:
    """Evict a request and wait until it has left; returns its tokens so far."""
    backend.evict(instance, [request], keep_kv)
    wait_for(backend, EventKind.RETURNED, request)
    return int(backend.requests["generated_tokens"][request])
