"""Latency profiles: what one model costs on one device, every number with its source.

``load_profile`` reads one, ``saturated_rate_per_s`` and ``cluster_capacity_per_s`` turn profiles into
request rates, ``check_placement`` tells which models fit where, and ``python -m qlm_env.profiles.fit``
regenerates the shipped files.
"""

from qlm_env.profiles.capacity import (
    ModelLoad,
    check_placement,
    cluster_capacity_per_s,
    fitting_profile,
    mean_resident_tokens,
    saturated_rate_per_s,
    usable_kv_blocks,
)
from qlm_env.profiles.load import ProfileKey, find_profile, list_profiles, load_profile
from qlm_env.profiles.schema import Profile, Quantity, StepTimeCoefficients

__all__ = [
    "ModelLoad",
    "Profile",
    "ProfileKey",
    "Quantity",
    "StepTimeCoefficients",
    "check_placement",
    "cluster_capacity_per_s",
    "find_profile",
    "fitting_profile",
    "list_profiles",
    "load_profile",
    "mean_resident_tokens",
    "saturated_rate_per_s",
    "usable_kv_blocks",
]
