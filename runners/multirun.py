"""`qlm COMMAND -m`: one run per combination of values, through Hydra's sweepers and launchers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from qlm_env.spec import ConfigError
from runners.commands import Command
from runners.composition import CONFIG_MODULE, HYDRA_VERSION_BASE, Request, first_line

FULL_ERROR = "HYDRA_FULL_ERROR"


def run_jobs(name: str, command: Command, request: Request) -> None:
    """Run ``command`` once per combination of the swept values; each job writes to ``out/<job number>``.

    Raises:
        ConfigError: any value of the sweep is wrong; found before the first job starts.
        CommandFailed: a job failed; the others have run.
    """
    assert command.merge is not None
    first, *others = (values for values in request.compose_sweep())
    for values in (first, *others):
        command.parse(values)

    def job(values: DictConfig) -> float | None:
        composed: Any = OmegaConf.to_container(values, resolve=True)
        return command.run(command.parse({**composed, "out": HydraConfig.get().runtime.output_dir}))

    main = hydra.main(
        version_base=HYDRA_VERSION_BASE,
        config_path=f"pkg://{CONFIG_MODULE}",
        config_name=command.config_name,
    )(job)
    overrides = [str(override.input_line) for override in request.prepared(multirun=True)]
    try:
        with _arguments([f"qlm {name}", *overrides, "--multirun"]), _errors_raised():
            main()
    except HydraException as error:
        raise ConfigError(first_line(error)) from error
    finally:
        command.merge(Path(first["out"]))


@contextmanager
def _arguments(argv: Sequence[str]) -> Iterator[None]:
    """Hydra reads its overrides from the command line and nowhere else."""
    before = sys.argv
    sys.argv = list(argv)
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _errors_raised() -> Iterator[None]:
    """Without this variable Hydra prints an error in its own words and leaves the process."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before
