"""A profile from a fit of one's own: the numbers beside step times from what is known, given or like another's."""

from __future__ import annotations

from collections.abc import Mapping

from qlm_env.profiles import quantities
from qlm_env.profiles.fitting import StepTimeFit
from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES
from qlm_env.profiles.least_squares import NO_BOUNDS
from qlm_env.profiles.load import ProfileKey
from qlm_env.profiles.power import A100_BUSY
from qlm_env.profiles.quantities import Quantities
from qlm_env.profiles.residency import A100_TIMES
from qlm_env.profiles.scaling import roofline
from qlm_env.profiles.schema import UNITS, Profile, Quantity, StepTimeCoefficients
from qlm_env.spec import ConfigError

OTHER_NUMBERS = tuple(name for name in UNITS if name not in StepTimeCoefficients._fields)
"""What a profile needs beside step times."""


def physical_bounds(key: ProfileKey) -> StepTimeCoefficients:
    """The least c3 and c4 of a known architecture on a known device; none for others."""
    device, architecture = DEVICES.get(key.device), ARCHITECTURES.get(key.architecture)
    if device is None or architecture is None:
        return NO_BOUNDS
    return roofline(device, architecture, key.tp)


def complete_profile(
    key: ProfileKey,
    fit: StepTimeFit,
    source: str,
    given: Mapping[str, Quantity] | None = None,
    like: Profile | None = None,
) -> Profile:
    """The profile of a fit.

    Each number beside step times is, first, the ``given`` one; second, derived by the rules of the shipped
    profiles from the device and the architecture, as far as these are known by name (weights and KV bytes may
    also be given); third, that of the profile ``like``.

    Args:
        source: what the steps were measured on, for the coefficients' ``source``.

    Raises:
        ConfigError: a number comes from none of the three, or the weights leave no room for KV cache.
    """
    device, architecture = DEVICES.get(key.device), ARCHITECTURES.get(key.architecture)
    known: Quantities = {} if architecture is None else quantities.architecture_bytes(architecture)
    found = known | dict(given or {})
    if device is not None:
        found = _of_device(key, found) | found
    if like is not None:
        found = _taken_over(like) | found
    missing = [name for name in OTHER_NUMBERS if name not in found]
    if missing:
        raise ConfigError(
            f"no {', '.join(missing)} for {key.architecture} on {key.device}: give them, or like=, a profile to take "
            f"them from, or name a known architecture and device ({', '.join(DEVICES)})"
        )
    if found["num_gpu_blocks"].value == 0:
        raise ConfigError(f"{key.architecture} does not fit {key.tp} x {key.device}: no memory is left for KV cache")
    step_time = quantities.step_time(fit, source, device, architecture, key.tp)
    curve = quantities.token_curve(fit, source)
    return Profile(
        device=key.device, architecture=key.architecture, tp=key.tp, token_curve=curve, **(step_time | found)
    )


def _of_device(key: ProfileKey, found: Mapping[str, Quantity]) -> Quantities:
    """What follows from a known device, as far as the bytes are ``found``."""
    device = DEVICES[key.device]
    derived = quantities.power(device, key.tp, A100_BUSY)
    if "weight_bytes" in found:
        weight_bytes = found["weight_bytes"].value
        derived |= quantities.residency(device, weight_bytes, key.tp, A100_TIMES)
        if "kv_bytes_per_token" in found:
            derived["num_gpu_blocks"] = quantities.blocks(
                device, weight_bytes, found["kv_bytes_per_token"].value, key.tp
            )
    return derived


def _taken_over(like: Profile) -> Quantities:
    name = f"{like.architecture} on {like.device} tp={like.tp}"
    return {
        field: quantity.model_copy(
            update={"kind": "estimated", "fit_error": None, "source": f"taken over from {name}: {quantity.source}"}
        )
        for field, quantity in like.quantities().items()
        if field not in StepTimeCoefficients._fields
    }
