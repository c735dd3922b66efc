"""What every specification is made of: the base class, common types, and mistakes told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A configuration a user can correct; the message is one line."""


class Spec(BaseModel):
    """Base of all specifications: frozen, no unknown keys, plain JSON values."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Spec)


def parse(spec: type[S], values: Mapping[str, Any], prefix: str = "") -> S:
    """Validate ``values`` as ``spec``.

    Raises:
        ConfigError: one line; names the first offending key (dotted, below ``prefix``) and what is allowed.
    """
    try:
        return spec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(spec, error, prefix)) from None


def _one_line(spec: type[Spec], error: ValidationError, prefix: str) -> str:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    known, owner = _resolve(spec, location)
    key = ".".join([*([prefix] if prefix else []), *known]) or spec.__name__
    message = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    if first["type"] == "extra_forbidden" and owner is not None:
        allowed = sorted(owner.model_fields)
        return f"unknown key '{key}'; allowed: {', '.join(allowed)}" + did_you_mean(known[-1], allowed)
    if first["type"] == "missing":
        return f"missing key '{key}'"
    if first["type"] == "union_tag_not_found":
        discriminator = first["ctx"]["discriminator"].strip("'")
        return f"missing key '{key}.{discriminator}'"
    got = (
        "" if isinstance(first["input"], Mapping) or first["type"] == "value_error" else (f" (got {first['input']!r})")
    )
    return f"'{key}': {message[0].lower()}{message[1:]}{got}"


def _resolve(spec: type[Spec], location: list[str]) -> tuple[list[str], type[Spec] | None]:
    """The user's dotted key for a pydantic location, without union tags, and the spec that owns its last part."""
    key: list[str] = []
    owner: type[Spec] | None = spec
    candidates: list[type[Spec]] = [spec]
    for part in location:
        if len(candidates) > 1:
            tagged = [c for c in candidates if _tag(c) == part]
            if tagged:
                candidates = tagged
                continue
        if part.isdigit():
            key.append(part)
            continue
        key.append(part)
        owner = next((c for c in candidates if part in c.model_fields), candidates[0] if candidates else None)
        field = owner.model_fields.get(part) if owner is not None else None
        if field is None:
            break
        candidates = _specs_in(field.annotation) or candidates[:1]
    return key, owner


def _tag(spec: type[Spec]) -> str | None:
    field = spec.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field is not None else None


def _specs_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    if get_origin(annotation) in (Annotated, tuple, Union, UnionType):
        return [found for argument in get_args(annotation) for found in _specs_in(argument)]
    return []


def unique(names: list[str], what: str) -> None:
    """Refuse a name that stands there twice; for validators."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} is defined more than once")


def did_you_mean(word: str, allowed: list[str]) -> str:
    """A suggestion to put behind an error, or nothing."""
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
