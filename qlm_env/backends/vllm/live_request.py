"""What the servers' side knows of one request: its tokens, and where KV of them is thought to be."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from qlm_env.backends.vllm.kv_store import Keeping
from qlm_env.requests import NOWHERE


@dataclass(eq=False)
class LiveRequest:
    """A request of the episode; it lives through evictions and failures."""

    index: int
    model: int
    prompt: list[int]
    output_tokens: int
    priority: int
    order: tuple[float, ...]
    """Requests with a smaller one are first under the ``priority`` policy."""
    generated: list[int] = field(default_factory=list)
    kept_at: int = NOWHERE
    """The instance that keeps KV of it, or NOWHERE."""
    kept_tokens: int = 0
    kept: Keeping | None = None
    """Where a KV store has it, if it is not in a prefix cache."""
    restoring: Keeping | None = None
    """What its server is about to read from a KV store."""
    restored_tokens: int = 0
    """Tokens whose KV it was to find when it was last sent."""
    has_new_tokens: bool = False
    """Whether an answer has begun since it was last sent."""
    salt_number: int = 0
    """Counts how often its KV was dropped: what was cached before must not be found."""
    stream: asyncio.Task[None] | None = None
    leaving: bool = False
    """It is on its way out of the batch: its KV is being stored."""

    @property
    def input_ids(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def left_tokens(self) -> int:
        return self.output_tokens - len(self.generated)

    @property
    def computed_tokens(self) -> int:
        """Tokens of a request in a batch whose KV is known to be there; the last one was not fed back yet."""
        if self.has_new_tokens:
            return len(self.prompt) + len(self.generated) - 1
        return self.restored_tokens

    def drop_kv(self) -> None:
        """Forget KV: it is not to be found any more."""
        for keeping in (self.kept, self.restoring):
            if keeping is not None:
                keeping.remove()
        self.restoring = None
        self.take_kept()
        self.salt_number += 1

    def take_kept(self) -> int:
        """The tokens whose KV was kept; nothing is kept any more, but it may be found."""
        tokens = self.kept_tokens
        self.kept_at, self.kept_tokens, self.kept = NOWHERE, 0, None
        return tokens
