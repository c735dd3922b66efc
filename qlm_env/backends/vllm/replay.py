"""A workload sent to a running server as it would arrive, whatever the server's pace (open loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qlm_env.backends.vllm.client import Completion, CompletionRequest, VllmClient
from qlm_env.backends.vllm.errors import ServerError
from qlm_env.backends.vllm.facts import (
    GENERATED_TOKENS,
    KV_USAGE,
    PREEMPTIONS,
    PROMPT_TOKENS,
    RUNNING,
    WAITING,
    EngineFacts,
    metric_sum,
    parse_metrics,
)
from qlm_env.backends.vllm.step_times import draw_prompt
from qlm_env.requests import RequestTable

LEAD_S = 0.5
"""Between the first look at the server and the first arrival."""


class EngineTick(NamedTuple):
    """What ``/metrics`` told at one moment of a replay."""

    t_s: float
    """Since the replay began."""
    running: float
    waiting: float
    kv_usage: float
    """Share of the KV cache in use."""
    prompt_tokens: float
    """Computed since the server started, as are the two below."""
    generated_tokens: float
    preemptions: float


class Replay(NamedTuple):
    """How a workload went."""

    start_s: float
    """``time.monotonic()`` of workload time 0."""
    started_at_s: float
    """The same moment in seconds since the epoch."""
    completions: list[Completion]
    """One per request, in the table's order."""
    ticks: list[EngineTick]
    latest_send_s: float
    """The longest delay of a request behind its arrival time, on this machine's side."""


async def replay(
    client: VllmClient,
    facts: EngineFacts,
    requests: RequestTable,
    rng: np.random.Generator,
    tick_s: float,
    advance: Callable[[str], None],
) -> Replay:
    """Send every request at its arrival time and collect all answers.

    Prompts are random token ids, so no two requests share a prefix. Requests carry their SLO class as priority
    if the server schedules by it.

    Args:
        requests: the workload, shape (N,).
        rng: draws the prompts.
        tick_s: interval of the looks at ``/metrics``.
        advance: called after each answer.

    Raises:
        ServerError: a request is longer than the model's context, or the server fails; all others are aborted.
    """
    check_lengths(client, facts, requests)
    by_priority = facts.engine.scheduling_policy == "priority"
    prepared = [
        CompletionRequest(
            draw_prompt(rng, int(row.prompt_tokens)),
            int(row.output_tokens),
            int(row.slo_class) if by_priority else 0,
        )
        for row in requests
    ]
    start_s, started_at_s = time.monotonic() + LEAD_S, time.time() + LEAD_S
    arrival_s = requests.arrival_s

    async def serve(index: int) -> Completion:
        completion = await client.complete(facts.model, prepared[index])
        advance(f"request {index}: {completion.token_received_s[-1] - completion.sent_s:.2f} s")
        return completion

    ticks: list[EngineTick] = []
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_watch(client, start_s, tick_s, ticks))
            tasks = []
            for index in range(len(requests)):
                await asyncio.sleep(max(0.0, start_s + arrival_s[index] - time.monotonic()))
                tasks.append(group.create_task(serve(index)))
            completions = [await task for task in tasks]
            watcher.cancel()
        ticks.append(await _look(client, start_s))
    except ExceptionGroup as errors:
        raise next((error for error in errors.exceptions if isinstance(error, ServerError)), errors) from None
    lag_s = max(
        completion.sent_s - start_s - float(arrival) for completion, arrival in zip(completions, arrival_s, strict=True)
    )
    return Replay(start_s, started_at_s, completions, ticks, lag_s)


def check_lengths(client: VllmClient, facts: EngineFacts, requests: RequestTable) -> None:
    """Refuse a request that the server would refuse.

    Raises:
        ServerError: a request's prompt + output exceed the model's context.
    """
    total = requests.prompt_tokens + requests.output_tokens
    longest = int(np.argmax(total))
    if total[longest] > facts.max_model_len:
        row = requests[longest]
        raise ServerError(
            f"request {longest} has {row.prompt_tokens} prompt and {row.output_tokens} output tokens, more than the "
            f"context of {facts.max_model_len} that {client.url} has for {facts.model}; "
            f"workload.models.0.context_tokens={facts.max_model_len} cuts longer requests"
        )


async def _watch(client: VllmClient, start_s: float, tick_s: float, ticks: list[EngineTick]) -> None:
    while True:
        ticks.append(await _look(client, start_s))
        await asyncio.sleep(tick_s)


async def _look(client: VllmClient, start_s: float) -> EngineTick:
    samples = parse_metrics(await client.get_text("/metrics"))
    names = (RUNNING, WAITING, KV_USAGE, PROMPT_TOKENS, GENERATED_TOKENS, PREEMPTIONS)
    return EngineTick(time.monotonic() - start_s, *(metric_sum(samples, name) for name in names))
