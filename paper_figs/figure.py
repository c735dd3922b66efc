"""What a figure is: rows in, a picture and a caption out."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import pandas as pd
from matplotlib.figure import Figure as Picture

from runners import experiment, results
from runners.errors import CommandFailed
from runners.experiment_config import ExperimentSpec, FiguresOptions, load_experiment
from runners.provenance import environment

Measure = Callable[..., Sequence[Mapping[str, Any]]]


class MissingInputError(CommandFailed):
    """A figure needs results that no command of this project can make by itself; the message says which."""


class FigureModule(Protocol):
    """What a module of :mod:`paper_figs` offers."""

    EXPERIMENTS: Sequence[str]
    """Experiments whose rows it reads."""

    def data(self, source: Source) -> pd.DataFrame:
        """The plotted numbers, one row each."""
        ...

    def plot(self, data: pd.DataFrame) -> Picture:
        """The picture."""
        ...

    def caption(self, data: pd.DataFrame, source: Source) -> str:
        """What is shown: workload, cluster, seeds, intervals."""
        ...


@dataclass(frozen=True)
class Entry:
    """A figure by its place in the list."""

    number: str
    name: str
    """Of its module, its files and on the command line."""
    title: str

    @property
    def module(self) -> FigureModule:
        return cast(FigureModule, importlib.import_module(f"paper_figs.{self.name}"))


class Source:
    """Where figures take their numbers from: rows of experiments, kept measurements, and folders of other commands."""

    def __init__(self, options: FiguresOptions) -> None:
        self.options = options
        self.folder = Path(options.rows)
        self._rows: dict[str, pd.DataFrame] = {}

    def experiment(self, name: str) -> ExperimentSpec:
        """An experiment, in the form that is asked for.

        Raises:
            ConfigError: there is none, or it is malformed.
        """
        spec = load_experiment(name)
        return spec.quickly() if self.options.quick else spec

    def rows(self, name: str) -> pd.DataFrame:
        """The rows of an experiment, read once.

        Raises:
            CommandFailed: rows are missing, are not those of their episode, or planners saw different requests.
        """
        if name not in self._rows:
            self._rows[name] = experiment.read_rows(self.experiment(name), self.folder)
        return self._rows[name]

    def comparison(self, folder: str, how: str) -> pd.DataFrame:
        """The rows of a `qlm compare` in a folder.

        Args:
            how: what makes such a folder, for the message if there is none.

        Raises:
            MissingInputError: there is no such folder.
            CommandFailed: rows are of another version of the code, or planners saw different requests.
        """
        path = Path(folder) / "results.parquet"
        if not path.exists():
            raise MissingInputError(f"there are no results in '{folder}'; make them with {how}")
        rows = pd.read_parquet(path)
        others = sorted(set(rows["code_version"]) - {results.code_version()})
        if others:
            raise CommandFailed(
                f"'{path}' holds rows of another version of the code ({', '.join(others)}; this is "
                f"{results.code_version()}); run the comparison again"
            )
        for _, group in rows.groupby("config_hash"):
            results.check_identical_workloads(group)
        return rows

    def measured(self, measure: Measure, code: Sequence[ModuleType] = (), **settings: Any) -> pd.DataFrame:
        """What ``measure(**settings)`` returns, one row per entry; kept, and measured once per settings and code.

        Args:
            code: modules that it calls beside those of ``qlm_env`` and ``planners``.

        Raises:
            CommandFailed: it has not been measured yet, and nothing is to be run.
        """
        name = f"{measure.__module__.rpartition('.')[2]}.{measure.__name__}"
        sources = [inspect.getsource(measure), *map(inspect.getsource, code)]
        identity = json.dumps([name, settings, results.code_version(), sources], sort_keys=True)
        path = self.folder / "measured" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.parquet"
        if not path.exists():
            if not self.options.simulate:
                raise CommandFailed(
                    f"{name} has not been measured with these settings; run qlm figures without simulate=false"
                )
            machine = environment()
            told = {
                "processor": machine["processor"],
                "cores": machine["cores"],
                "code_version": machine["code_version"],
            }
            results.write_rows(path, pd.DataFrame([dict(row) | told for row in measure(**settings)]))
        return pd.read_parquet(path)
