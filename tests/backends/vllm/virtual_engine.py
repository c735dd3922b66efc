"""A continuous-batching engine on a virtual clock, in the place of a client: its step times are known exactly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from qlm_env.backends.vllm.client import Completion, CompletionRequest, TokenChunk
from qlm_env.backends.vllm.facts import EngineFacts
from qlm_env.spec import EngineSpec


def make_facts(max_model_len: int = 2048, **engine: int | bool) -> EngineFacts:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "num_gpu_blocks": 10_000} | {
        "enable_prefix_caching": True
    }
    return EngineFacts("tiny", "tiny", max_model_len, "0.32.0", EngineSpec.model_validate(settings | engine), {}, {})


@dataclass
class _Sequence:
    request: CompletionRequest
    completion: Completion
    on_chunk: Callable[[Completion], None] | None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    cached: int = 0

    @property
    def tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.completion.token_ids)


class VirtualEngine:
    """Serves ``complete`` as :class:`VllmClient` does. Decodes go before prompts, prompts are cut to the budget.

    Args:
        step_s: the duration of a step of ``prefill`` [(new tokens, cached before)] and ``decodes`` [cached before].
        overhead_s: added to a first token that finds the engine idle.
    """

    url = "virtual"

    def __init__(
        self,
        facts: EngineFacts,
        step_s: Callable[[list[tuple[int, int]], list[int]], float],
        overhead_s: float = 0.0,
        caches_prefixes: bool = True,
    ) -> None:
        self._facts = facts
        self._step_s = step_s
        self._overhead_s = overhead_s
        self._caches_prefixes = caches_prefixes
        self._seen: list[list[int]] = []
        self._sequences: list[_Sequence] = []
        self._engine: asyncio.Task[None] | None = None
        self.now_s = 100.0

    async def complete(
        self, model: str, request: CompletionRequest, on_chunk: Callable[[Completion], None] | None = None
    ) -> Completion:
        assert model == self._facts.model
        assert len(request.prompt_token_ids) + request.max_tokens <= self._facts.max_model_len
        sequence = _Sequence(request, Completion(sent_s=self.now_s), on_chunk)
        sequence.cached = self._cached_prefix(list(request.prompt_token_ids))
        if not self._sequences:
            self.now_s += self._overhead_s
        self._sequences.append(sequence)
        if self._engine is None or self._engine.done():
            self._engine = asyncio.create_task(self._run())
        try:
            await sequence.done.wait()
        finally:
            if sequence in self._sequences:
                self._sequences.remove(sequence)
        return sequence.completion

    async def _run(self) -> None:
        while self._sequences:
            # A few turns of the loop, for whoever reacts to the last step's tokens.
            for _ in range(5):
                await asyncio.sleep(0)
            self._step()

    def _step(self) -> None:
        running = self._sequences[: self._facts.engine.max_num_seqs]
        decodes = [sequence for sequence in running if sequence.completion.token_ids]
        budget = self._facts.engine.max_num_batched_tokens - len(decodes)
        chunks: dict[int, int] = {}
        for index, sequence in enumerate(running):
            missing = sequence.tokens - sequence.cached
            if not sequence.completion.token_ids and budget:
                chunks[index] = min(missing, budget)
                budget -= chunks[index]
        if not (decodes or chunks):
            return
        prefill = [(tokens, running[index].cached) for index, tokens in chunks.items()]
        self.now_s += self._step_s(prefill, [sequence.cached for sequence in decodes])
        for index, sequence in enumerate(running):
            sequence.cached += chunks.get(index, int(sequence in decodes))
            if sequence.cached == sequence.tokens and (index in chunks or sequence in decodes):
                self._deliver(sequence)

    def _deliver(self, sequence: _Sequence) -> None:
        if not sequence.completion.token_ids:
            self._seen.append(list(sequence.request.prompt_token_ids))
        sequence.completion.add(TokenChunk(self.now_s, (7,)))
        if sequence.on_chunk is not None:
            sequence.on_chunk(sequence.completion)
        if len(sequence.completion.token_ids) == sequence.request.max_tokens:
            self._sequences.remove(sequence)
            sequence.done.set()

    def _cached_prefix(self, prompt: list[int]) -> int:
        block = self._facts.engine.block_size
        best = 0
        for seen in self._seen if self._caches_prefixes else ():
            shared = 0
            while shared < min(len(seen), len(prompt) - 1) and seen[shared] == prompt[shared]:
                shared += 1
            best = max(best, shared // block * block)
        return best
