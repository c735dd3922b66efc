"""`qlm compare` and `qlm evaluate`: planners over seeds on identical workloads, and what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from qlm_env.spec import ScenarioSpec
from runners import files, plots, report, results, side_by_side, tracking
from runners.config import CompareConfig, NoTracking
from runners.episode import check_scenario, run_episode
from runners.episodes import EpisodeFunction, EpisodeTask, run_episodes
from runners.errors import CommandFailed
from runners.provenance import note_command
from runners.results import EpisodeKey
from runners.summary import differences, summarise
from runners.tables import comparison_table, console, episode_table

ScenarioCheck = Callable[[ScenarioSpec, int], None]
TableMaker = Callable[[pd.DataFrame, list[dict[str, Any]], str], Table]

FAILURES_SHOWN = 3
"""Reasons given again at the end of a run; the files hold all."""


def compare(
    config: CompareConfig, episode: EpisodeFunction = run_episode, check: ScenarioCheck = check_scenario
) -> None:
    """Run what is missing of ``config``, then write and print results over all its episodes.

    Args:
        episode: runs one episode; importable by its name, as it is called in other processes.
        check: raises ConfigError for what would stop every episode, before any is started.

    Raises:
        ConfigError: the scenario cannot run, ``out`` belongs to another one, or tracking is not set up.
        CommandFailed: some episodes failed; the results cover the others.
        CommandInterrupted: Ctrl-C.
    """
    _run_and_report(
        config,
        episode,
        check,
        lambda rows, summary, title: comparison_table(summary, differences(rows), title),
    )


def evaluate(
    config: CompareConfig, episode: EpisodeFunction = run_episode, check: ScenarioCheck = check_scenario
) -> None:
    """As :func:`compare`, for one planner, with every metric in the table.

    Raises:
        ConfigError, CommandFailed, CommandInterrupted: as :func:`compare`.
    """
    _run_and_report(
        config,
        episode,
        check,
        lambda rows, summary, title: episode_table(rows, f"{summary[0]['planner']}: {title}"),
    )


def _run_and_report(
    config: CompareConfig, episode: EpisodeFunction, check: ScenarioCheck, make_table: TableMaker
) -> None:
    scenario, options, out = config.scenario, config.options, config.out
    tracking.check(options.tracking)
    check(scenario, options.seeds[0])
    results.claim(out, scenario)
    note_command(out)
    # Seed by seed, so that a run that is stopped early still compares all planners on the first seeds.
    tasks = [
        EpisodeTask(EpisodeKey(scenario, label, planner, seed, backend), out, options.timeline, episode)
        for backend in options.backend
        for seed in options.seeds
        for label, planner in config.planners.items()
    ]
    finished, failures = run_episodes(tasks, out, config.jobs)
    if finished:
        labels = list(config.planners)
        backends = list(options.backend)
        rows = pd.DataFrame(
            sorted(
                finished,
                key=lambda row: (labels.index(row["planner"]), backends.index(row["backend"]), row["seed"]),
            )
        )
        _report(config, rows, make_table)
    if failures:
        shown = "; ".join(failures[:FAILURES_SHOWN]) + (" ..." if len(failures) > FAILURES_SHOWN else "")
        raise CommandFailed(
            f"{len(failures)} of {len(tasks)} episodes failed: {shown} (tracebacks in {out / 'failures'})"
        )


def _report(config: CompareConfig, rows: pd.DataFrame, make_table: TableMaker) -> None:
    out = config.out
    shown = results.tell_backends_apart(rows)
    results.check_identical_workloads(shown)
    results.write_rows(out / "results.parquet", rows)
    _write_summary(out, summarise(rows))
    if shown is not rows:
        both = side_by_side.write_report(config, rows)
        print(f"emulator and real cluster side by side: {both}", file=sys.stderr)
    rows, summary = shown, summarise(shown)
    figures = [out / "attainment.png", out / "latency.png"]
    plots.draw_attainment(figures[0], summary)
    plots.draw_latency(figures[1], rows)
    title = f"{config.scenario.workload.name} on {config.scenario.cluster.name}"
    console().print(make_table(rows, summary, title))
    print(f"results, summary and figures are in {out}", file=sys.stderr)
    if not isinstance(config.options.tracking, NoTracking):
        page = out / report.PAGE if report.available() else None
        if page is not None:
            report.write_report(out, page)
        tracking.log(config, summary, rows, figures, page)


def merge_jobs(out: Path) -> None:
    """Put the results of a multirun's jobs, in folders below ``out``, together in ``out`` itself.

    Rows get a column ``job``, the folder's name; the summary has the jobs' entries one after the other.
    """
    folders = sorted((path.parent for path in out.glob("*/summary.json")), key=lambda folder: folder.name.zfill(9))
    if not folders:
        return
    rows = [pd.read_parquet(folder / "results.parquet").assign(job=folder.name) for folder in folders]
    results.write_rows(out / "results.parquet", pd.concat(rows, ignore_index=True))
    texts = [(folder / "summary.json").read_text(encoding="utf-8") for folder in folders]
    _write_summary(out, [entry for text in texts for entry in json.loads(text)])
    print(f"results of {len(folders)} jobs are together in {out}", file=sys.stderr)


def _write_summary(out: Path, summary: list[dict[str, Any]]) -> None:
    files.write_text(out / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
