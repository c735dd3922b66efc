"""Named configurations: the same YAML files that the ``qlm`` command composes, by group and name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from qlm_env.spec import ConfigError, EnvironmentSpec, ScenarioSpec, SloSpec, parse

GROUPS = ("cluster", "workload", "slo", "environment")


def preset_names(group: str) -> list[str]:
    """The names there are in a group."""
    folder = resources.files("configs") / group
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(group: str, name: str) -> dict[str, Any]:
    """The values of ``configs/<group>/<name>.yaml``.

    Raises:
        ConfigError: there is no such file.
    """
    if name not in preset_names(group):
        raise ConfigError(f"no {group} named '{name}'; allowed: {', '.join(preset_names(group))}")
    values: dict[str, Any] = yaml.safe_load((resources.files("configs") / group / f"{name}.yaml").read_text())
    return values


def make_scenario(
    cluster: str | Mapping[str, Any],
    workload: str | Mapping[str, Any],
    slo: str | Mapping[str, Any] | None = None,
    environment: str | Mapping[str, Any] | None = None,
) -> ScenarioSpec:
    """A validated scenario of presets (strings) and plain values (mappings).

    A mapping with the key ``preset`` starts from that preset and overrides its top-level keys:
    ``{"preset": "w_a", "num_requests": 100}``.

    Raises:
        ConfigError: one line naming the key and what is allowed.
    """
    values = {"cluster": _values("cluster", cluster), "workload": _values("workload", workload)}
    values["slo"] = _values("slo", slo) if slo is not None else SloSpec().model_dump()
    values["environment"] = (
        _values("environment", environment) if environment is not None else EnvironmentSpec().model_dump()
    )
    return parse(ScenarioSpec, values)


def _values(group: str, given: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(given, str):
        return load_preset(group, given)
    values = dict(given)
    if "preset" in values:
        return load_preset(group, values.pop("preset")) | values
    return values
