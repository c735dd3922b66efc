"""Regenerate the shipped profiles from published measurements.

``python -m qlm_env.profiles.fit --data DIR --out qlm_env/profiles/data [--docs docs/profiles.md]``

``DIR`` holds ``profiles/`` with ``aegaeon_prefill_decode.csv``, ``aiconfigurator_step_latency.csv``,
``vllm_layerwise/``, ``vllm_sleep_mode.csv`` and ``splitwise_power.csv``, and ``lengths/sharegpt_10k_llama2.csv``.
The same data give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qlm_env.profiles.catalogue import build_profiles, fit_step_times
from qlm_env.profiles.load import profile_yaml
from qlm_env.profiles.power import fit_busy_power
from qlm_env.profiles.report import fit_table, insert_tables, rate_table, rule_table
from qlm_env.profiles.residency import fit_residency
from qlm_env.spec import ConfigError
from qlm_env.workload.atomic import atomic_path

WRITTEN_BY = "Written by `python -m qlm_env.profiles.fit`; change the rules there, not the numbers here."


def generate(data: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Profile files by name, and the documentation's tables by name.

    Raises:
        ConfigError: a file of measurements is missing or lacks rows.
    """
    fits = fit_step_times(data / "profiles")
    profiles = build_profiles(
        fits,
        fit_residency(data / "profiles" / "vllm_sleep_mode.csv"),
        fit_busy_power(data / "profiles" / "splitwise_power.csv"),
    )
    prompt_tokens, output_tokens = _lengths(data / "lengths" / "sharegpt_10k_llama2.csv")
    files = {key.file_name: profile_yaml(profile, WRITTEN_BY) for key, profile in sorted(profiles.items())}
    tables = {
        "fit errors": fit_table(fits),
        "rule checks": rule_table(fits),
        "saturated rates": rate_table(profiles, prompt_tokens, output_tokens),
    }
    return files, tables


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qlm_env.profiles.fit",
        description="Regenerate the shipped profiles from measurements.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the published measurements")
    parser.add_argument("--out", type=Path, required=True, help="folder for the profiles' YAML files")
    parser.add_argument("--docs", type=Path, help="Markdown file whose tables are to be brought up to date")
    options = parser.parse_args(arguments)
    try:
        files, tables = generate(options.data)
        if options.docs is not None:
            _write_text(options.docs, insert_tables(options.docs.read_text(encoding="utf-8"), tables))
        options.out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            _write_text(options.out / name, text)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    return 0


def _lengths(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    try:
        frame = pd.read_csv(path, usecols=["num_prefill_tokens", "num_decode_tokens"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return frame.num_prefill_tokens.to_numpy(), frame.num_decode_tokens.to_numpy()


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
