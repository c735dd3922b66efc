"""The numbers the paper publishes, each with its place."""

from __future__ import annotations

from functools import cache
from importlib import resources

import yaml

from qlm_env.spec import NonNegativeFloat, PositiveInt, Spec, parse


class Range(Spec):
    """A range of relative gains: 0.4 is 40 % more."""

    lowest: NonNegativeFloat
    highest: NonNegativeFloat
    unit: str
    where: str


class Published(Spec):
    """The content of ``published.yaml``."""

    source: str
    attainment_gain: Range
    throughput_gain: Range
    slo_targets_s: dict[str, float | str]
    requests_per_trace: dict[str, int | str]
    cluster: dict[str, PositiveInt | str]


@cache
def published() -> Published:
    """The paper's numbers."""
    text = resources.files(__package__).joinpath("published.yaml").read_text(encoding="utf-8")
    return parse(Published, yaml.safe_load(text))
