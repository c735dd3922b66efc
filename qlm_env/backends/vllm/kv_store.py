"""KV in files: the folder of vLLM's ``ExampleConnector``, read and written by a server, looked after from here.

The connector stores the KV of a prompt when it is first scheduled, under a hash of the prompt's token ids in whole
blocks, and looks for a new prompt's in the same way; cache salts mean nothing to it. Two of its habits matter: of a
prompt that is computed in chunks it stores what is not computed yet, and where a prompt's length is one more than
whole blocks it finds one entry and reads another. So what it stores by itself is removed, and KV to keep is stored
by a prompt of its own whose blocks are all in the prefix cache. Nor may it ever find less than the prefix cache has, as
it then takes off the difference and the engine dies. A prompt of one token still does that to it, once any prompt of
less than a block was stored.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Keeping(NamedTuple):
    """KV as it is stored when an input is sent as a prompt, so that it is found when the input is sent again."""

    num_tokens: int
    """So many tokens of the input are stored."""
    entries: tuple[Path, Path]
    """What is read when the input comes back, and what has to be there for that; the same at most lengths."""

    def complete(self) -> bool:
        """Make sure that what is stored will be found; returns whether it is stored."""
        stored, found = self.entries
        if stored.is_dir():
            found.mkdir(exist_ok=True)
            return True
        return False

    def remove(self) -> None:
        """Remove what is stored, if it is."""
        for entry in self.entries:
            remove(entry)


class KvStore:
    """One server's folder.

    Args:
        block_size: tokens per KV block.
    """

    def __init__(self, folder: Path, block_size: int) -> None:
        self._folder = folder
        self._block_size = block_size

    def whole_blocks(self, num_tokens: int) -> int:
        """So many tokens are stored of a prompt of ``num_tokens``."""
        return max(0, (num_tokens - 1) // self._block_size * self._block_size)

    def keeping(self, token_ids: Sequence[int]) -> Keeping | None:
        """How the KV of an input is kept whose last token is not computed; None if that is less than a block."""
        n = len(token_ids)
        found, read = self.whole_blocks(n - 1), self.whole_blocks(n)
        if found == 0:
            return None
        entries = (self._entry(token_ids[:read]), self._entry(token_ids[:found]))
        return Keeping(read, entries)

    def entry(self, token_ids: Sequence[int]) -> Path | None:
        """Where the KV of a prompt is stored, if it is; None for less than a block.

        Prompts so short have one entry in common, without content. It must not be removed while another is stored.
        """
        whole = self.whole_blocks(len(token_ids))
        return self._entry(token_ids[:whole]) if whole else None

    def _entry(self, token_ids: Sequence[int]) -> Path:
        # As vLLM's `safe_hash`.
        data = np.array(token_ids, np.int64).tobytes()
        return self._folder / hashlib.md5(data, usedforsecurity=False).hexdigest()


def remove(entry: Path | None) -> None:
    """Remove an entry, if there is one."""
    if entry is not None:
        shutil.rmtree(entry, ignore_errors=True)
