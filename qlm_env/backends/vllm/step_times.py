"""How long the steps of a running engine take, measured over HTTP from the times at which tokens arrive.

- **Decode** steps: a batch of streams decodes; between two tokens of a stream lies one step.
- **Mixed** steps: a prompt is sent while a batch decodes. The step that computes it ends with its first token,
  and the gap between tokens that the decoding streams see there is that step alone, without the server's front
  end.
- **Prefill** steps: a prompt is sent to the idle server. Its time to first token is one step and what the front
  end, the connection and the waking of an idle engine cost. That overhead is the same for every prompt; it is read
  off a prompt of one token, whose step is a decode step of one short sequence, and subtracted.

Every prompt is new to the server, so that nothing is found in its prefix cache unless it is meant to be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np

from qlm_env.backends.vllm.client import Completion, CompletionRequest, VllmClient
from qlm_env.backends.vllm.errors import ServerError
from qlm_env.backends.vllm.facts import EngineFacts
from qlm_env.backends.vllm.step_grid import SETTLING_STEPS, StepGrid, StepPoint

PROMPT_TOKEN_IDS = (16, 256)
"""Prompts are drawn from these ids, which every vocabulary has; what is said makes no difference."""

SHORTEST_PROMPTS = 5
"""One-token prompts per round, for the overhead, which is small beside its own spread."""


def unseen_prompts() -> np.random.Generator:
    """A generator whose prompts no server has seen: not seeded, because a server finds the prompts of an earlier
    run in its prefix cache and answers several times faster. What a prompt says makes no other difference."""
    return np.random.default_rng()


def draw_prompt(rng: np.random.Generator, tokens: int) -> list[int]:
    """A prompt of so many random token ids."""
    ids: list[int] = rng.integers(*PROMPT_TOKEN_IDS, size=tokens).tolist()
    return ids


class StepSample(NamedTuple):
    """One measurement of a point."""

    context_len: float
    """Cached tokens per decode before the step, as they were."""
    latency_s: float


class DecodeBatch:
    """Streams that decode side by side until the block ends; an asynchronous context manager.

    Raises:
        ServerError: at the next wait, once a stream has failed or ended.
    """

    def __init__(self, client: VllmClient, model: str, requests: Sequence[CompletionRequest]) -> None:
        self._client = client
        self._model = model
        self._requests = requests
        self._targets = [0] * len(requests)
        self._num_short = 0
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[Completion]] = []
        self._completions: dict[int, Completion] = {}

    async def __aenter__(self) -> DecodeBatch:
        for index, request in enumerate(self._requests):
            on_chunk = self._observer(index)
            task = asyncio.create_task(self._client.complete(self._model, request, on_chunk))
            task.add_done_callback(lambda _: self._changed.set())
            self._tasks.append(task)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def completions(self) -> list[Completion]:
        """The answers so far; only once every stream has brought a token."""
        return [self._completions[index] for index in range(len(self._requests))]

    async def more_tokens(self, count: int) -> None:
        """Wait until every stream has brought ``count`` more tokens."""
        for index in range(len(self._requests)):
            self._targets[index] = self._num_tokens(index) + count
        self._num_short = len(self._requests)
        while self._num_short:
            await self._changed.wait()
            self._changed.clear()
            for task in self._tasks:
                if self._num_short and task.done():
                    task.result()
                    raise ServerError(f"{self._client.url} ended a completion before max_tokens")

    def _observer(self, index: int) -> Callable[[Completion], None]:
        def note(completion: Completion) -> None:
            self._completions[index] = completion
            target = self._targets[index]
            if target and len(completion.token_ids) >= target:
                self._targets[index] = 0
                self._num_short -= 1
                if not self._num_short:
                    self._changed.set()

        return note

    def _num_tokens(self, index: int) -> int:
        return len(self._completions[index].token_ids) if index in self._completions else 0


class StepMeter:
    """Measures steps of one server, which must have nothing else to do.

    Args:
        rng: draws the prompts.
    """

    def __init__(self, client: VllmClient, facts: EngineFacts, rng: np.random.Generator) -> None:
        self._client = client
        self.facts = facts
        self._rng = rng
        self._decode_prompts: dict[tuple[int, int], list[list[int]]] = {}
        self._prefixes: dict[int, list[int]] = {}

    async def first_token_s(self, prefill_tokens: int, prefix: int = 0) -> float:
        """Time from sending a prompt to the idle server until its first token, in seconds."""
        completion = await self._client.complete(self.facts.model, await self._prompt(prefill_tokens, prefix))
        return completion.token_received_s[0] - completion.sent_s

    async def batch(
        self, decode_seqs: int, context_len: int, steps: int, chunks: Sequence[int]
    ) -> tuple[StepSample, list[StepSample]]:
        """A batch of ``decode_seqs`` sequences of ``context_len`` tokens: its decode step, the mean of ``steps``,
        and the step that also computes a whole prompt, for each number of tokens in ``chunks``."""
        prompts = self._prompts_of_batch(decode_seqs, context_len)
        room = self.facts.max_model_len - context_len
        requests = [CompletionRequest(prompt, room) for prompt in prompts]
        mixed = []
        async with DecodeBatch(self._client, self.facts.model, requests) as batch:
            await batch.more_tokens(1 + SETTLING_STEPS)
            decode = await self._decode_sample(batch, context_len, steps)
            for tokens in chunks:
                mixed.append(await self._mixed_sample(batch, context_len, tokens))
        return decode, mixed

    async def _decode_sample(self, batch: DecodeBatch, context_len: int, steps: int) -> StepSample:
        first = [len(completion.token_ids) - 1 for completion in batch.completions]
        await batch.more_tokens(steps)
        durations_s = [
            (completion.token_received_s[index + steps] - completion.token_received_s[index]) / steps
            for completion, index in zip(batch.completions, first, strict=True)
        ]
        # Token m (from 0) of a sequence comes from a step before which the prompt and m - 1 tokens were cached.
        cached = context_len + float(np.mean(first)) + (steps - 1) / 2
        return StepSample(cached, float(np.median(durations_s)))

    async def _mixed_sample(self, batch: DecodeBatch, context_len: int, tokens: int) -> StepSample:
        request = await self._prompt(tokens, 0)
        await batch.more_tokens(SETTLING_STEPS)
        completion = await self._client.complete(self.facts.model, request)
        await batch.more_tokens(SETTLING_STEPS)
        durations_s, cached = [], []
        for decode in batch.completions:
            received_s = np.array(decode.token_received_s)
            # What a step brings arrives together; what the steps around it bring is a step away.
            last = max(1, int(np.argmin(np.abs(received_s - completion.token_received_s[0]))))
            durations_s.append(received_s[last] - received_s[last - 1])
            cached.append(context_len + last - 1)
        return StepSample(float(np.mean(cached)), float(np.median(durations_s)))

    async def _prompt(self, tokens: int, prefix: int) -> CompletionRequest:
        """A prompt of ``tokens`` new ids after ``prefix`` ids that the server has cached; asks for one token."""
        shared: list[int] = []
        if prefix:
            shared = self._prefixes.setdefault(prefix, draw_prompt(self._rng, prefix))
            # Sent every time, because other prompts may have displaced it; with one token more, because the last
            # token of a prompt is always computed.
            seed = CompletionRequest([*shared, *draw_prompt(self._rng, 1)], 1)
            await self._client.complete(self.facts.model, seed)
        return CompletionRequest([*shared, *draw_prompt(self._rng, tokens)], 1)

    def _prompts_of_batch(self, decode_seqs: int, context_len: int) -> list[list[int]]:
        """The same prompts for every repeat: a server that caches prefixes then computes them once."""
        key = decode_seqs, context_len
        if key not in self._decode_prompts:
            self._decode_prompts[key] = [draw_prompt(self._rng, context_len) for _ in range(decode_seqs)]
        return self._decode_prompts[key]


class Measurement(NamedTuple):
    """A server's steps and what its front end adds."""

    steps: dict[StepPoint, list[StepSample]]
    """One sample per repeat."""
    overhead_s: float
    """What of a time to first token is not the engine's step."""


async def measure_steps(meter: StepMeter, grid: StepGrid, repeats: int, advance: Callable[[str], None]) -> Measurement:
    """Measure every point of ``grid`` ``repeats`` times.

    Repeats are rounds over the whole grid, so that a disturbance does not hit all samples of a point.

    Args:
        advance: called with what was measured, ``grid.num_parts(facts)`` times a round.

    Raises:
        ServerError: the server fails or refuses a request.
    """
    engine, batches = meter.facts.engine, grid.batches(meter.facts)
    shortest_s: list[float] = []
    first_tokens_s: dict[tuple[int, int], list[float]] = {}
    steps: dict[StepPoint, list[StepSample]] = {}
    # The first request of a server, and the first after a pause, find caches cold.
    await meter.first_token_s(1)
    for _ in range(repeats):
        shortest_s += [await meter.first_token_s(1) for _ in range(SHORTEST_PROMPTS)]
        advance(f"first token of a prompt of 1: {1e3 * shortest_s[-1]:.1f} ms")
        for tokens, prefix in grid.chunks:
            measured_s = await meter.first_token_s(tokens, prefix)
            first_tokens_s.setdefault((tokens, prefix), []).append(measured_s)
            advance(f"first token of a prompt of {tokens} after {prefix}: {1e3 * measured_s:.1f} ms")
        for decode_seqs, context_len in batches:
            beside = grid.chunks_beside(decode_seqs, engine)
            decode, mixed = await meter.batch(decode_seqs, context_len, grid.decode_steps, beside)
            steps.setdefault(StepPoint("decode", 0, 0, decode_seqs, context_len), []).append(decode)
            for tokens, sample in zip(beside, mixed, strict=True):
                steps.setdefault(StepPoint("mixed", tokens, 0, decode_seqs, context_len), []).append(sample)
            advance(f"decode of {decode_seqs} x {context_len} tokens: {1e3 * decode.latency_s:.1f} ms")
    one_token = steps[StepPoint("decode", 0, 0, *batches[0])]
    overhead_s = float(np.median(shortest_s) - np.median([sample.latency_s for sample in one_token]))
    for chunk, measured in first_tokens_s.items():
        steps[StepPoint("prefill", *chunk, 0, 0)] = [StepSample(0.0, value_s - overhead_s) for value_s in measured]
    return Measurement(steps, overhead_s)
