"""`qlm profile list`, `show` and `fit`: look at latency profiles and make them from measured steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.table import Table

from qlm_env.profiles.custom import complete_profile, physical_bounds
from qlm_env.profiles.fitting import SPLIT_SEED, StepTimeFit, check_errors, fit_table
from qlm_env.profiles.hardware import ARCHITECTURES, DEVICES, num_gpu_blocks
from qlm_env.profiles.layerwise import compose_steps, measured_token_curve, read_layer_times
from qlm_env.profiles.load import ProfileKey, list_profiles, load_profile, profile_yaml, read_profile
from qlm_env.profiles.schema import BLOCK_TOKENS, UNITS, Profile, Quantity
from qlm_env.profiles.step_tables import StepTable, read_step_table
from qlm_env.profiles.token_curve import Knots
from qlm_env.spec import ConfigError
from runners import files
from runners.profile_config import FitOptions, ListOptions, OtherNumbers, ShowOptions
from runners.tables import console

WRITTEN_BY = "Written by `qlm profile fit`."


def list_all(options: ListOptions) -> None:
    """Print which profiles there are, how their step times came about and how good the fits are.

    Raises:
        ConfigError: no profile passes the filters, or a file is malformed.
    """
    keys = list_profiles(options.directory)
    for name in ProfileKey._fields:
        wanted = getattr(options, name)
        if wanted is None:
            continue
        values = sorted({getattr(key, name) for key in keys})
        keys = tuple(key for key in keys if getattr(key, name) == wanted)
        if not keys:
            raise ConfigError(f"no profile with {name}={wanted}; there is: {', '.join(map(str, values))}")
    table = Table("device", "architecture", title=f"{len(keys)} latency profiles")
    for column in ("tp", "step time", "fit error", "KV blocks", "cold start", "wake"):
        table.add_column(column, justify="right" if column != "step time" else "left")
    for key in keys:
        profile = load_profile(*key, options.directory)
        table.add_row(
            key.device,
            key.architecture,
            str(key.tp),
            profile.c5_s_per_sequence.kind,
            _error(profile.c5_s_per_sequence),
            f"{profile.num_gpu_blocks.value:,.0f}",
            f"{profile.cold_start_s.value:.1f} s",
            f"{profile.wake_s.value:.2f} s",
        )
    console().print(table)


def show(options: ShowOptions) -> None:
    """Print every number of one profile with its unit, kind, fit error and source.

    Raises:
        ConfigError: there is no such profile (the message says what there is), or its file is malformed.
    """
    profile = load_profile(options.device, options.architecture, options.tp, options.directory)
    table = Table("number", title=f"{profile.architecture} on {profile.device}, tp={profile.tp}")
    table.add_column("value", justify="right")
    for column in ("unit", "kind"):
        table.add_column(column)
    table.add_column("fit error", justify="right")
    table.add_column("source", overflow="fold")
    for name, quantity in profile.quantities().items():
        table.add_row(name, _value(quantity), quantity.unit, quantity.kind, _error(quantity), quantity.source)
    curve = profile.token_curve
    if curve is not None:
        values = (
            f"{curve.seconds[0]:.4g} at {curve.tokens[0]:,} to {curve.seconds[-1]:.4g} at {curve.tokens[-1]:,} tokens"
        )
        table.add_row("token_curve", values, "s", curve.kind, "", curve.source)
    console().print(table)


def fit(options: FitOptions) -> None:
    """Fit a profile to measured steps, print its held-out errors and write its file into ``out``.

    Raises:
        ConfigError: the table or a setting is wrong, a number that is not measured is missing, or the fit is worse
            than ``max_error`` without ``force``; nothing is written then.
    """
    key = ProfileKey(options.device, options.architecture, options.tp)
    like = None if options.like is None else read_profile(Path(options.like))
    path = Path(options.table)
    steps, curve = _layer_steps(path, key) if path.is_dir() else (_table_steps(path, options), None)
    fitted = fit_table(steps, np.random.default_rng(SPLIT_SEED), physical_bounds(key), curve)
    profile = complete_profile(
        key,
        fitted,
        f"fit to {len(steps.latency_s)} steps in {path.name}",
        given_quantities(options, "given to qlm profile fit"),
        like,
    )
    if not options.force:
        try:
            check_errors(fitted, options.max_error)
        except ConfigError as error:
            raise ConfigError(f"{error}; force=true writes the profile all the same") from None
    out = Path(options.out) / key.file_name
    files.write_text(out, profile_yaml(profile, WRITTEN_BY))
    console().print(errors_table(fitted, profile))
    print(f"the profile is in {out}", file=sys.stderr)


def _table_steps(path: Path, options: FitOptions) -> StepTable:
    return read_step_table(
        path,
        {
            "system": options.system,
            "device": options.system or options.device,
            "backend": options.backend,
            "model": options.model,
            "tp": options.tp,
        },
    )


def _layer_steps(folder: Path, key: ProfileKey) -> tuple[StepTable, Knots]:
    device, architecture = DEVICES.get(key.device), ARCHITECTURES.get(key.architecture)
    for name, value, known in (("device", device, DEVICES), ("architecture", architecture, ARCHITECTURES)):
        if value is None:
            raise ConfigError(f"'{name}': layer times need one of {', '.join(known)} (got '{getattr(key, name)}')")
    assert device is not None
    assert architecture is not None
    kv_tokens = BLOCK_TOKENS * num_gpu_blocks(device, architecture, key.tp)
    times = read_layer_times(folder, key.tp)
    return compose_steps(times, architecture, device, kv_tokens), measured_token_curve(times, architecture, device)


def given_quantities(options: OtherNumbers, source: str) -> dict[str, Quantity]:
    """The numbers of a profile that ``options`` give, as estimates from ``source``."""
    values = {name: getattr(options, name) for name in OtherNumbers.model_fields}
    return {
        name: Quantity(value=value, unit=UNITS[name], kind="estimated", source=source)
        for name, value in values.items()
        if value is not None
    }


def errors_table(fitted: StepTimeFit, profile: Profile) -> Table:
    """The held-out errors of a fit, by regime."""
    table = Table("regime", title=f"{profile.architecture} on {profile.device}, tp={profile.tp}")
    for column in ("steps", "mean error", "worst error"):
        table.add_column(column, justify="right")
    for regime, error in fitted.errors.items():
        table.add_row(regime, f"{error.rows:,}", f"{error.mean:.1%}", f"{error.worst:.1%}")
    table.caption = "each step predicted by a fit on four fifths of the table that it is not in"
    return table


def _value(quantity: Quantity) -> str:
    value = quantity.value
    return f"{value:,.0f}" if value.is_integer() and value < 1e15 else f"{value:.4g}"


def _error(quantity: Quantity) -> str:
    return "" if quantity.fit_error is None else f"{quantity.fit_error:.1%}"
