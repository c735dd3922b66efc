"""Results mirrored to Weights & Biases; the files in ``out`` remain the record."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qlm_env.spec import ConfigError
from runners.config import CompareConfig, NoTracking, TrackingSpec, WandbTracking
from runners.errors import CommandFailed
from runners.results import EpisodeKey


def check(tracking: TrackingSpec) -> None:
    """Find in advance what would keep results from being tracked.

    Raises:
        ConfigError: wandb is not installed, or is to be used online without an account.
    """
    if isinstance(tracking, NoTracking):
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("'tracking': wandb is not installed; pip install 'qlm-env[tracking]', or tracking=none")
    if tracking.mode == "online":
        import wandb

        if wandb.api.api_key is None:
            raise ConfigError("'tracking': not logged in to wandb; run wandb login, or tracking=wandb_offline")


def log(
    config: CompareConfig,
    summary: Sequence[Mapping[str, Any]],
    rows: pd.DataFrame,
    figures: Sequence[Path],
    report: Path | None,
) -> None:
    """One wandb run per planner: its configuration, summary, episodes, the figures, the timelines and the report page.

    Raises:
        CommandFailed: wandb refused; the files are complete nevertheless.
    """
    tracking = config.options.tracking
    if isinstance(tracking, NoTracking):
        return
    import wandb

    try:
        for entry in summary:
            _log_planner(tracking, config, entry, rows[rows["planner"] == entry["planner"]], figures, report)
    except wandb.Error as error:
        raise CommandFailed(
            f"wandb: {' '.join(str(error).split())} (the results in {config.out} are complete)"
        ) from error


def _log_planner(
    tracking: WandbTracking,
    config: CompareConfig,
    entry: Mapping[str, Any],
    rows: pd.DataFrame,
    figures: Sequence[Path],
    report: Path | None,
) -> None:
    import wandb

    label, backend = entry["planner"], entry["backend"]
    name = label.removesuffix(f" on {backend}")
    planner = config.planners[name]
    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        mode=tracking.mode,
        dir=config.out,
        group=config.out.name,
        name=label,
        config={
            **config.scenario.model_dump(mode="json"),
            "planner": planner.model_dump(mode="json"),
            "seeds": entry["seeds"],
            "backend": backend,
        },
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        run.summary.update(dict(entry))
        shown = rows.drop(columns=["scenario", "planner_options"])
        images = {figure.stem: wandb.Image(str(figure)) for figure in figures}
        pages = {} if report is None else {"report": wandb.Html(report.read_text(encoding="utf-8"), inject=False)}
        run.log({"episodes": wandb.Table(dataframe=shown), **images, **pages})
        timelines = [
            EpisodeKey(config.scenario, name, planner, int(seed), backend).timeline_path(config.out)
            for seed in entry["seeds"]
        ]
        written = [path for path in timelines if path.exists()]
        if written:
            artifact = wandb.Artifact(f"{label}-timelines", type="timeline")
            for path in written:
                artifact.add_file(str(path))
            run.log_artifact(artifact)
    finally:
        run.finish()
