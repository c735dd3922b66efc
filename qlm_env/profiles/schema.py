"""What a profile holds: every number with its unit, its source and how it came about."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from qlm_env.profiles.token_curve import TokenCurve
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
    c6_s_per_mixed_kv_token: float = 0.0


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
    "c6_s_per_mixed_kv_token": "s/token",
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
"""The unit of each number that a :class:`Profile` must have, as its file must state it."""

OPTIONAL_UNITS = {
    "peak_power_w": "W",
    "busy_power_w": "W",
}
"""Those of the numbers that a profile may leave out."""

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

    ``T = c0 + c1*min(n, n0) + c2*max(0, n - n0) + c3*sum(kv) + c4*sum(q*(k + q/2)) + c5*B + c6*sum(kv)*[mixed]``

    with ``n`` new tokens in the step (prefill tokens + ``B``), ``B`` decoding sequences with ``kv`` tokens
    cached before the step each, and ``q`` new and ``k`` cached tokens of each prefill chunk.

    A ``token_curve`` takes the place of the first three terms, up to its last knot; beyond it, each token takes c2.
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
    c6_s_per_mixed_kv_token: Quantity
    """On top of c3 where the step holds a prefill chunk too: attention kernels are slower on such a batch."""

    token_curve: TokenCurve | None = None
    """Where there is one, c0, c1, n0 and c2 are its summary, for estimates that need a formula."""

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

    peak_power_w: Quantity | None = None
    """The GPUs' limit."""
    busy_power_w: Quantity | None = None
    """Their mean while the engine serves."""

    @field_validator(*UNITS, *OPTIONAL_UNITS)
    @classmethod
    def _unit_and_range(cls, quantity: Quantity | None, info: ValidationInfo) -> Quantity | None:
        if quantity is None:
            return None
        name = str(info.field_name)
        unit = (UNITS | OPTIONAL_UNITS)[name]
        if quantity.unit != unit:
            raise ValueError(f"unit must be {unit!r}, not {quantity.unit!r}")
        if name in _POSITIVE and quantity.value == 0:
            raise ValueError("value must be positive")
        if name in _WHOLE and not quantity.value.is_integer():
            raise ValueError(f"value must be a whole number, not {quantity.value}")
        return quantity

    @property
    def step_time(self) -> StepTimeCoefficients:
        """The eight coefficients as plain floats."""
        values = self.values()
        return StepTimeCoefficients(*(values[name] for name in StepTimeCoefficients._fields))

    def quantities(self) -> dict[str, Quantity]:
        """Every number that the profile has, by its field name."""
        found = {name: getattr(self, name) for name in UNITS | OPTIONAL_UNITS}
        return {name: quantity for name, quantity in found.items() if quantity is not None}

    def values(self) -> dict[str, float]:
        """Every number that the profile has as a plain float by its field name, in the unit of its field."""
        return {name: quantity.value for name, quantity in self.quantities().items()}
