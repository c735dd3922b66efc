"""The step time of :mod:`qlm_env.backends.emulator.latency`, split into decode steps and what admissions add."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlm_env.spec import EngineSpec

Float = NDArray[np.float64]

COEFFICIENTS = ("c0", "c1", "c2", "c3", "c4", "c5", "c6")
"""Of a placement's step time, in seconds."""


class StepTimes:
    """Step times of one model on one instance.

    Args:
        placement: a PLACEMENT_DTYPE record.
        factor: multiplies every coefficient; other than 1 to study a profile that is wrong.
    """

    def __init__(self, engine: EngineSpec, placement: Any, factor: float) -> None:
        self.engine = engine
        self.placement = placement
        self._c = {name: factor * float(placement[name]) for name in COEFFICIENTS}
        self._n0 = float(placement["n0"])

    def _tokens_s(self, tokens: Float | float) -> Any:
        below = np.minimum(tokens, self._n0)
        return self._c["c1"] * below + self._c["c2"] * (tokens - below)

    def decode_s(self, sequences: Float | float, kv_tokens: Float | float) -> Any:
        """One step in which ``sequences`` decode with ``kv_tokens`` in the cache, of any shape."""
        tokens_s = self._tokens_s(sequences)
        return self._c["c0"] + tokens_s + self._c["c3"] * kv_tokens + self._c["c5"] * np.asarray(sequences)

    def prefill_s(self, prompt_tokens: float, sequences: float, kv_tokens: float) -> float:
        """What a prompt adds to the steps of such a batch; more than one step if it exceeds the token budget."""
        room = max(1.0, self.engine.max_num_batched_tokens - sequences)
        chunks = max(1.0, prompt_tokens / room)
        chunk = prompt_tokens / chunks
        linear_s = float(self._tokens_s(sequences + chunk) - self._tokens_s(sequences))
        return chunks * (linear_s + self._c["c6"] * kv_tokens) + self._c["c4"] * prompt_tokens**2 / 2.0

    @property
    def prompt_token_s(self) -> float:
        """What one more prompt token adds to a prefill step."""
        return self._c["c2"]

    @property
    def kv_token_s(self) -> float:
        """What one more cached token adds to every decode step."""
        return self._c["c3"]
