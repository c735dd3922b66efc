"""Which prompts begin alike: what a prefix cache can know of a workload without its texts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class PromptPrefixes(NamedTuple):
    """The beginnings of N prompts as ids, as traces with block hashes publish them."""

    first: NDArray[np.int64]
    """(N + 1,) request r has ``ids[first[r] : first[r + 1]]``"""
    ids: NDArray[np.int64]
    """Non-negative. Two requests with the same id at the same place have the same tokens up to there. An id stands for
    ``id_tokens`` tokens, or as many as are left of the prompt."""
    id_tokens: int


NO_PREFIXES = PromptPrefixes(np.zeros(1, np.int64), np.zeros(0, np.int64), 1)
"""No two prompts begin alike."""
