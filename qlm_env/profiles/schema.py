"""What a profile holds: every number with its unit, its source and how it came about."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from qlm_env.spec import NonNegativeFloat, PositiveInt, Spec

Text = Annotated[str, Field(min_length=1)]

BLOCK_TOKENS = 16
"""Tokens per KV block in ``num_gpu_blocks``, vLLM's default block size."""


class StepTimeCoefficients(NamedTuple):
    """The step-time coefficients as plain floats; :class:`Profile` gives the formula."""

    c0_s: float
    c1_s_per_token: float
    n0_tokens: float
    c2_s_per_token: float
    c3_s_per_kv_token: float
    c4_s_per_token2: float
    c5_s_per_sequence: float


class Quantity(Spec):
    """One number.

    ``kind`` is ``measured`` (read off a measurement), ``fitted`` (a regression on measurements) or
    ``estimated`` (derived by the rule that ``source`` states).
    """

    value: NonNegativeFloat
    unit: Text
    kind: Literal["measured", "fitted", "estimated"]
    source: Text
    fit_error: NonNegativeFloat | None = None
    """Mean absolute relative error of the fit: on held-out rows for step times, in sample otherwise."""


UNITS = {
    "c0_s": "s",
    "c1_s_per_token": "s/token",
    "n0_tokens": "token",
    "c2_s_per_token": "s/token",
    "c3_s_per_kv_token": "s/token",
    "c4_s_per_token2": "s/token^2",
    "c5_s_per_sequence": "s/sequence",
    "weight_bytes": "B",
    "kv_bytes_per_token": "B/token",
    "num_gpu_blocks": "block",
    "context_tokens": "token",
    "cold_start_s": "s",
    "stage_s": "s",
    "wake_s": "s",
    "sleep_s": "s",
    "kv_swap_bytes_per_s": "B/s",
}
"""The unit of each number of a :class:`Profile`, as its file must state it."""

_POSITIVE = (
    "c0_s",
    "weight_bytes",
    "kv_bytes_per_token",
    "num_gpu_blocks",
    "context_tokens",
    "kv_swap_bytes_per_s",
)
_WHOLE = ("num_gpu_blocks", "context_tokens")


class Profile(Spec):
    """What one architecture costs on an instance of ``tp`` GPUs of one device type.

    One engine step takes

    ``T = c0 + c1*min(n, n0) + c2*max(0, n - n0) + c3*sum(kv) + c4*sum(q*(k + q/2)) + c5*B``

    with ``n`` new tokens in the step (prefill tokens + ``B``), ``B`` decoding sequences with ``kv`` tokens
    cached before the step each, and ``q`` new and ``k`` cached tokens of each prefill chunk.
    """

    device: Text
    architecture: Text
    tp: PositiveInt

    c0_s: Quantity
    c1_s_per_token: Quantity
    n0_tokens: Quantity
    c2_s_per_token: Quantity
    c3_s_per_kv_token: Quantity
    c4_s_per_token2: Quantity
    c5_s_per_sequence: Quantity

    weight_bytes: Quantity
    """All GPUs of the instance together, as are the other byte counts and rates."""
    kv_bytes_per_token: Quantity
    num_gpu_blocks: Quantity
    """KV blocks of 16 tokens that vLLM allocates at its default ``gpu_memory_utilization`` of 0.9."""
    context_tokens: Quantity
    """The architecture's own context; a fine-tuned model may state another."""

    cold_start_s: Quantity
    """Storage to GPU: a new engine process until it serves."""
    stage_s: Quantity
    """Storage to host memory, in the background."""
    wake_s: Quantity
    """Host memory to GPU."""
    sleep_s: Quantity
    """GPU to host memory."""
    kv_swap_bytes_per_s: Quantity
    """KV cache between GPU and host memory, one direction."""

    @field_validator(*UNITS)
    @classmethod
    def _unit_and_range(cls, quantity: Quantity, info: ValidationInfo) -> Quantity:
        name = str(info.field_name)
        if quantity.unit != UNITS[name]:
            raise ValueError(f"unit must be {UNITS[name]!r}, not {quantity.unit!r}")
        if name in _POSITIVE and quantity.value == 0:
            raise ValueError("value must be positive")
        if name in _WHOLE and not quantity.value.is_integer():
            raise ValueError(f"value must be a whole number, not {quantity.value}")
        return quantity

    @property
    def step_time(self) -> StepTimeCoefficients:
        """The seven coefficients as plain floats."""
        values = self.values()
        return StepTimeCoefficients(*(values[name] for name in StepTimeCoefficients._fields))

    def values(self) -> dict[str, float]:
        """Every number as a plain float by its field name, in the unit that :data:`UNITS` gives."""
        return {name: getattr(self, name).value for name in UNITS}
