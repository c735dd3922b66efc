"""KV blocks of the step-by-step engine: who holds them, what they contain, which is reused next.

Plain lists, in the order in which vLLM's ``vllm.v1.core.block_pool.BlockPool`` keeps its free queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

BlockContent = int | tuple[int, int]
"""What a full block holds, all tokens before it included; equal contents are the same KV."""


class BlockPool:
    """The blocks of one engine, numbered from 1 as vLLM numbers them (its block 0 is a placeholder)."""

    def __init__(self, num_blocks: int) -> None:
        self.free: deque[int] = deque(range(1, num_blocks + 1))
        """Blocks that nobody holds, the next to be reused first. They may still be found by their content."""
        self.holders = [0] * (num_blocks + 1)
        self.content: list[BlockContent | None] = [None] * (num_blocks + 1)
        self.found_at: dict[BlockContent, list[int]] = {}
        """The blocks with a content, in the order in which they got it."""

    def find(self, contents: Iterable[BlockContent]) -> list[int]:
        """Blocks of the longest run of ``contents``, from the first on, that is there."""
        found: list[int] = []
        for content in contents:
            if content not in self.found_at:
                break
            found.append(self.found_at[content][0])
        return found

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` nobody holds."""
        return sum(self.holders[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """One more request holds ``blocks``, which it found by their content."""
        for block in blocks:
            if self.holders[block] == 0:
                self.free.remove(block)
            self.holders[block] += 1

    def take(self, count: int) -> list[int]:
        """The next ``count`` free blocks, for a request to fill; what they held is lost."""
        taken = [self.free.popleft() for _ in range(count)]
        for block in taken:
            self.holders[block] = 1
            content = self.content[block]
            if content is not None:
                self.content[block] = None
                self.found_at[content].remove(block)
                if not self.found_at[content]:
                    del self.found_at[content]
        return taken

    def enter(self, block: int, content: BlockContent) -> None:
        """From now on ``block`` can be found by its content, though after older blocks that hold the same."""
        self.content[block] = content
        self.found_at.setdefault(content, []).append(block)

    def give_back(self, blocks: Sequence[int]) -> None:
        """A request leaves its ``blocks``, given in the order of its tokens.

        Of those that nobody else holds, blocks without content go to the front of the free queue, the last
        first, and blocks with content to its back, where the last ends up before the first: the tail of a
        sequence is worth less than its head.
        """
        without: list[int] = []
        for block in reversed(blocks):
            self.holders[block] -= 1
            if self.holders[block] > 0:
                continue
            if self.content[block] is None:
                without.append(block)
            else:
                self.free.append(block)
        self.free.extendleft(reversed(without))
