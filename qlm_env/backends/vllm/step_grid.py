"""Which engine steps to measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qlm_env.backends.vllm.facts import EngineFacts
from qlm_env.spec import EngineSpec

SETTLING_STEPS = 2
"""Steps between an event and a measurement, for the event's own step to be over."""

SPARE_TOKENS = 16
"""Room a sequence keeps for steps that were not planned."""


class StepPoint(NamedTuple):
    """What one step computes: a prompt chunk of ``prefill_tokens`` after ``prefix`` cached ones, together with
    ``decode_seqs`` decodes of about ``context_len`` cached tokens each."""

    kind: Literal["prefill", "decode", "mixed"]
    prefill_tokens: int
    prefix: int
    decode_seqs: int
    context_len: int


@dataclass(frozen=True)
class StepGrid:
    """The steps to measure: every chunk after every prefix; every batch at every context, alone and with chunks."""

    prefill_tokens: tuple[int, ...]
    """Ascending."""
    prefixes: tuple[int, ...]
    """0 is a whole prompt."""
    decode_seqs: tuple[int, ...]
    """Ascending."""
    context_lens: tuple[int, ...]
    """Ascending."""
    decode_steps: int = 24
    """Steps over which a batch's decode is averaged."""

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Prompt chunks as (tokens, prefix)."""
        return [(tokens, prefix) for prefix in self.prefixes for tokens in self.prefill_tokens]

    def chunks_beside(self, decode_seqs: int, engine: EngineSpec) -> list[int]:
        """Tokens of the chunks to compute together with ``decode_seqs`` decodes: every fourth of the grid's,
        and the one that fills the step."""
        if decode_seqs >= engine.max_num_seqs:
            return []
        room = engine.max_num_batched_tokens - decode_seqs
        return [*(tokens for tokens in self.prefill_tokens[::4] if tokens < room), room]

    def batches(self, facts: EngineFacts) -> list[tuple[int, int]]:
        """Batches as (sequences, context) that the engine holds for as long as they are measured."""
        return [
            (decode_seqs, context_len)
            for decode_seqs in self.decode_seqs
            for context_len in self.context_lens
            if self._fits(decode_seqs, context_len, facts)
        ]

    def _fits(self, decode_seqs: int, context_len: int, facts: EngineFacts) -> bool:
        engine = facts.engine
        prefill_steps = math.ceil(decode_seqs * context_len / max(1, engine.max_num_batched_tokens - decode_seqs))
        beside_steps = (2 * SETTLING_STEPS + 2) * len(self.chunks_beside(decode_seqs, engine))
        tokens = context_len + prefill_steps + SETTLING_STEPS + self.decode_steps + beside_steps + SPARE_TOKENS
        # A sequence more: the one that brings the chunks.
        blocks = (decode_seqs + 1) * math.ceil(tokens / engine.block_size)
        return decode_seqs <= engine.max_num_seqs and tokens <= facts.max_model_len and blocks < facts.num_gpu_blocks

    def num_parts(self, facts: EngineFacts) -> int:
        """Measurements of one round."""
        return 1 + len(self.chunks) + len(self.batches(facts))


def default_grid(facts: EngineFacts) -> StepGrid:
    """A grid that spans what the engine can do: powers of two up to its limits."""
    engine, context = facts.engine, facts.max_model_len
    longest = min(engine.max_num_batched_tokens, context - 1)
    prefill_tokens = tuple(sorted({*_powers(16, 2, longest), *_powers(24, 2, longest), longest}))
    prefix = (context - longest) // 2 // engine.block_size * engine.block_size
    cached = (prefix,) if engine.enable_prefix_caching and prefix else ()
    seqs = {*_powers(1, 2, engine.max_num_seqs), max(1, engine.max_num_seqs - 1), engine.max_num_seqs}
    return StepGrid(prefill_tokens, (0, *cached), tuple(sorted(seqs)), tuple(_powers(64, 4, context // 2)) or (1,))


def _powers(first: int, factor: int, last: int) -> list[int]:
    values = []
    while first <= last:
        values.append(first)
        first *= factor
    return values
