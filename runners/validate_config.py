"""What `qlm profile validate` accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from qlm_env.spec import PositiveFloat, PositiveInt, SloSpec, Spec, parse
from runners.config import OutPath

Text = Annotated[str, Field(min_length=1)]


class ValidateOptions(Spec):
    """The settings of `qlm profile validate` beside the SLO classes."""

    run: Text
    """The recorded run's folder."""
    out: OutPath
    targets_s: tuple[PositiveFloat, ...] = ()
    profile: Text | None = None
    """A profile's file; without it the profile of ``device``, ``architecture`` and ``tp``."""
    device: Text | None = None
    architecture: Text | None = None
    tp: PositiveInt | None = None
    """``None`` is the run's own."""
    layer_times: Text | None = None
    """A folder of the profile's layer times, for a second replay with step times interpolated between them."""

    @model_validator(mode="after")
    def _one_profile(self) -> ValidateOptions:
        named = [name for name in ("device", "architecture", "tp") if getattr(self, name) is not None]
        if self.profile is not None and named:
            raise ValueError(f"give profile=FILE or device=... architecture=..., not both (got {named[0]} as well)")
        if self.profile is None and (self.device is None or self.architecture is None):
            raise ValueError("give profile=FILE, or device=... and architecture=... of a profile there is")
        return self


class _Slo(Spec):
    slo: SloSpec = SloSpec()


@dataclass(frozen=True)
class ValidateConfig:
    """A recorded run, the profile to replay it with, and where the comparison goes."""

    options: ValidateOptions
    slo: SloSpec
    """Of requests that name an SLO class; a run that tells its own classes is measured by those."""

    @property
    def out(self) -> Path:
        return Path(self.options.out)


def parse_validate(values: Mapping[str, Any]) -> ValidateConfig:
    """The configuration of `qlm profile validate`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    given = {key: value for key, value in values.items() if value is not None}
    slo = parse(_Slo, {"slo": given.pop("slo", {})}).slo
    return ValidateConfig(parse(ValidateOptions, given), slo)
