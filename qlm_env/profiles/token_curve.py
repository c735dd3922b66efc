"""Step time against the number of new tokens, where it was measured closely enough to see its steps.

A GEMM's time rises by a step whenever its tokens fill one more tile, which two slopes cannot follow. A profile may
hold the measured curve in their place.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from qlm_env.spec import NonNegativeFloat, PositiveFloat, PositiveInt, Spec

Float = NDArray[np.float64]

MAX_KNOTS = 48
"""What the engines have room for. As many describe the measured curves within 2 %, on average 0.3 %."""


class Knots(NamedTuple):
    """A piecewise linear curve: seconds against ascending tokens, both of shape (N,)."""

    tokens: Float
    seconds: Float
    chunk_s: float = 0.0
    """More where the step holds a prefill chunk."""

    def at(self, tokens: Float, slope_beyond: float = 0.0) -> Float:
        """Seconds, shape as ``tokens``; constant before the first knot, rising by ``slope_beyond`` after the last."""
        beyond = np.maximum(0.0, tokens - self.tokens[-1])
        seconds: Float = np.interp(tokens, self.tokens, self.seconds) + slope_beyond * beyond
        return seconds

    def thinned(self, count: int) -> Knots:
        """At most ``count`` of the knots: the ends, then always the one that the line misses by most, relatively."""
        keep = [0, len(self.tokens) - 1]
        while len(keep) < min(count, len(self.tokens)):
            line_s = np.interp(self.tokens, self.tokens[keep], self.seconds[keep])
            error = np.abs(line_s / self.seconds - 1.0)
            error[keep] = -1.0
            keep = sorted([*keep, int(error.argmax())])
        return self._replace(tokens=self.tokens[keep], seconds=self.seconds[keep])


class TokenCurve(Spec):
    """The knots of a profile, with their source."""

    tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=MAX_KNOTS)]
    """New tokens in the step, ascending."""
    seconds: Annotated[tuple[PositiveFloat, ...], Field(min_length=2, max_length=MAX_KNOTS)]
    chunk_s: NonNegativeFloat = 0.0
    """Seconds more in a step that holds a prefill chunk: its attention is another kernel with a start of its own."""
    kind: Literal["measured", "fitted", "estimated"]
    source: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _is_a_curve(self) -> TokenCurve:
        if len(self.tokens) != len(self.seconds):
            raise ValueError(f"{len(self.tokens)} tokens and {len(self.seconds)} seconds; expected as many")
        for before, after in zip(self.tokens, self.tokens[1:], strict=False):
            if after <= before:
                raise ValueError(f"tokens must ascend, but {after} follows {before}")
        return self

    @property
    def knots(self) -> Knots:
        return Knots(np.array(self.tokens, np.float64), np.array(self.seconds), self.chunk_s)
