"""What `qlm profile list`, `show` and `fit` accept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from qlm_env.spec import NonNegativeFloat, PositiveFloat, PositiveInt, Spec, parse
from runners.config import OutPath

Text = Annotated[str, Field(min_length=1)]


class ListOptions(Spec):
    """The settings of `qlm profile list`: filters, and where to look beside the shipped profiles."""

    device: Text | None = None
    architecture: Text | None = None
    tp: PositiveInt | None = None
    profiles: Text | None = None
    """A folder of your own profiles."""

    @property
    def directory(self) -> Path | None:
        return None if self.profiles is None else Path(self.profiles)


class ShowOptions(ListOptions):
    """The settings of `qlm profile show`."""

    device: Text
    architecture: Text
    tp: PositiveInt = 1


class OtherNumbers(Spec):
    """The numbers of a profile that are not fitted; ``None`` is derived or taken over."""

    weight_bytes: PositiveFloat | None = None
    kv_bytes_per_token: PositiveFloat | None = None
    num_gpu_blocks: PositiveInt | None = None
    context_tokens: PositiveInt | None = None
    cold_start_s: NonNegativeFloat | None = None
    stage_s: NonNegativeFloat | None = None
    wake_s: NonNegativeFloat | None = None
    sleep_s: NonNegativeFloat | None = None
    kv_swap_bytes_per_s: PositiveFloat | None = None


class FitOptions(OtherNumbers):
    """The settings of `qlm profile fit`."""

    table: Text
    """A CSV file of steps, or a folder of layer times."""
    device: Text
    architecture: Text
    tp: PositiveInt = 1
    out: OutPath
    model: Text | None = None
    system: Text | None = None
    backend: Text | None = None
    like: Text | None = None
    max_error: PositiveFloat = 0.08
    force: bool = False


def parse_list(values: Mapping[str, Any]) -> ListOptions:
    """The configuration of `qlm profile list`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(ListOptions, values)


def parse_show(values: Mapping[str, Any]) -> ShowOptions:
    """The configuration of `qlm profile show`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(ShowOptions, _given(values))


def parse_fit(values: Mapping[str, Any]) -> FitOptions:
    """The configuration of `qlm profile fit`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(FitOptions, _given(values))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without empty settings, so that a missing one is told as such."""
    return {key: value for key, value in values.items() if value is not None}
