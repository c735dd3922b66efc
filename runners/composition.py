"""Configuration from Hydra: the shipped groups, ``key=value`` overrides, and one-line mistakes.

Hydra composes a command's YAML file, the chosen option of each group and the overrides into one mapping.
Keys below a group may be new to it (``workload.arrivals.cv=3``): what is allowed there is decided by the
specifications in :mod:`qlm_env.spec`, not by what a file happens to mention.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlm_env.spec import ConfigError

CONFIG_MODULE = "configs"
HYDRA_VERSION_BASE = "1.3"


@dataclass(frozen=True)
class Schema:
    """The keys at the top of a command's configuration."""

    groups: tuple[str, ...]
    """Groups, of which an option is chosen: ``cluster``, ``workload``, ..."""
    settings: Mapping[str, Any]
    """Plain keys and their defaults: ``seeds``, ``out``, ..."""

    @property
    def keys(self) -> list[str]:
        return [*self.groups, *self.settings]


def read_schema(config_name: str) -> Schema:
    """The groups and settings of the command configuration ``configs/<config_name>.yaml``."""
    text = resources.files(CONFIG_MODULE).joinpath(f"{config_name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    defaults = values.pop("defaults", [])
    values.pop("hydra", None)
    return Schema(tuple(key for entry in defaults if isinstance(entry, dict) for key in entry), values)


def group_options(group: str, config_dir: Path | None = None) -> list[str]:
    """The options of a group, shipped and in ``config_dir``, sorted by name."""
    folders = [resources.files(CONFIG_MODULE).joinpath(group)]
    if config_dir is not None and (config_dir / group).is_dir():
        folders.append(config_dir / group)
    names = {entry.name for folder in folders for entry in folder.iterdir()}
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_option(group: str, name: str) -> dict[str, Any]:
    """The values of the shipped option ``configs/<group>/<name>.yaml``, which must exist."""
    text = resources.files(CONFIG_MODULE).joinpath(group, f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


@dataclass(frozen=True)
class Request:
    """What a user asked of a command: its configuration file, overrides and own configuration folder."""

    config_name: str
    overrides: tuple[str, ...]
    config_dir: Path | None = None

    def prepared(self, *, multirun: bool) -> list[Override]:
        """The overrides as Hydra has to see them.

        Raises:
            ConfigError: an override is malformed, names an unknown key or an unknown option of a group, or
                gives several values without ``multirun``.
        """
        if self.config_dir is not None and not self.config_dir.is_dir():
            raise ConfigError(f"--config-dir: no folder '{self.config_dir}'")
        schema = read_schema(self.config_name)
        prepared = [_prepare(text, schema, self.config_dir, multirun) for text in self.overrides]
        if self.config_dir is not None:
            prepared.append(_parse_override(f"hydra.searchpath=['file://{self.config_dir.resolve()}']"))
        return prepared

    def compose(self) -> dict[str, Any]:
        """The configuration of a single run, as plain values.

        Raises:
            ConfigError: as :meth:`prepared`, and for what Hydra refuses.
        """
        return _compose(self.config_name, self.prepared(multirun=False))

    def compose_sweep(self) -> list[dict[str, Any]]:
        """Configurations that show every value of a multirun's sweeps at least once.

        Each value is tried with the first value of the other sweeps, so that a mistake in any of them is
        found before the first job starts. Continuous intervals, which only some sweepers understand, are
        left to the sweeper.

        Raises:
            ConfigError: as :meth:`compose`.
        """
        overrides = [o for o in self.prepared(multirun=True) if not o.is_interval_sweep()]
        values = [_values(override) for override in overrides]
        first = [options[0] for options in values]
        jobs = [first]
        for position, options in enumerate(values):
            jobs += [[*first[:position], option, *first[position + 1 :]] for option in options[1:]]
        return [_compose(self.config_name, job) for job in jobs]


def _values(override: Override) -> list[Override]:
    if not override.is_sweep_override():
        return [override]
    key = override.get_key_element()
    try:
        return [_parse_override(f"{key}={value}") for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise ConfigError(f"'{override.input_line}': {first_line(error)}") from error


def _compose(config_name: str, overrides: Sequence[Override]) -> dict[str, Any]:
    texts = [str(override.input_line) for override in overrides]
    try:
        with _set_aside_job(), initialize_config_module(CONFIG_MODULE, version_base=HYDRA_VERSION_BASE):
            values = OmegaConf.to_container(hydra_compose(config_name, texts), resolve=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    # Hydra also raises bare ValueError and TypeError for values that do not fit their place.
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(first_line(error)) from error
    assert isinstance(values, dict)
    composed = {str(key): value for key, value in values.items()}
    known = read_schema(config_name).keys
    for key in composed:
        if key not in known:
            raise ConfigError(_unknown_key(key, key, known))
    return composed


@contextmanager
def _set_aside_job() -> Iterator[None]:
    """Hydra composes nothing while a job of its own runs, such as one of a multirun; here it may."""
    job = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = job


def _prepare(text: str, schema: Schema, config_dir: Path | None, multirun: bool) -> Override:
    override = _parse_override(text)
    key = override.key_or_group
    head, _, below = key.partition(".")
    if head.partition("/")[0] == "hydra":
        return override
    if head not in schema.keys or (below and head not in schema.groups):
        raise ConfigError(_unknown_key(key, head, schema.keys))
    if override.is_sweep_override() and not multirun:
        raise ConfigError(
            f"'{text}' gives several values; add -m to run one after the other"
            + (f", or write {head}=[...] for several in one run" if key == "planner" else "")
        )
    if override.is_delete() or override.package is not None:
        return override
    if key in schema.groups:
        _check_options(override, key, group_options(key, config_dir))
    if override.is_add() or override.is_force_add() or not below:
        return override
    return _parse_override(f"++{text}")


def _parse_override(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"malformed override '{text}': expected key=value (quote values that hold spaces, commas or brackets)"
        ) from error


def _check_options(override: Override, group: str, allowed: list[str]) -> None:
    value = override.value()
    chosen = value.list if isinstance(value, ChoiceSweep) else value
    for name in _flat(chosen):
        if name not in allowed:
            raise ConfigError(
                f"'{name}' is not an option of {group}; allowed: {', '.join(allowed)}{hint(name, allowed)}"
            )


def _flat(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for entry in value for name in _flat(entry)]
    return [value.text if isinstance(value, QuotedString) else str(value)]


def _unknown_key(key: str, word: str, allowed: list[str]) -> str:
    return f"unknown key '{key}'; allowed: {', '.join(allowed)}{hint(word, allowed)}"


def hint(word: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def first_line(error: BaseException) -> str:
    lines = [str(error).partition("\n")[0]]
    if error.__cause__ is not None:
        lines.append(str(error.__cause__).partition("\n")[0])
    return ": ".join(lines)
