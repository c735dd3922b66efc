"""The episodes of a comparison: those an earlier run has finished, and the others in parallel workers or in turn.

Emulated episodes run in worker processes; those on a real cluster after them, one by one, in this one. Every finished
episode is a row on disk before the next one starts, so a run that stops for any reason goes on where it was when the
same command is given again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from planners.spec import PlannerSpec
from qlm_env.env import EMULATOR
from qlm_env.spec import ScenarioSpec
from runners import files, results
from runners.episode import EpisodeResult
from runners.errors import CommandInterrupted
from runners.live import LiveCluster, run_in_turn
from runners.progress import CountedProgress
from runners.results import EpisodeKey
from runners.workers import TaskFailure, run_tasks

Row = dict[str, Any]


class EpisodeFunction(Protocol):
    """The signature of :func:`runners.episode.run_episode`."""

    def __call__(self, scenario: ScenarioSpec, planner: PlannerSpec, seed: int, *, timeline: bool) -> EpisodeResult: ...


@dataclass(frozen=True)
class EpisodeTask:
    """One episode for a worker: what to run, how, and where its files go."""

    key: EpisodeKey
    out: Path
    timeline: bool
    episode: EpisodeFunction

    def finished_row(self) -> Row | None:
        """The row an earlier run has left, unless a file this run asks for is missing beside it."""
        beside = (self.key.timeline_path(self.out), self.key.requests_path(self.out)) if self.timeline else ()
        if not all(path.exists() for path in beside):
            return None
        return results.read_row(self.key.row_path(self.out))


def run_task(task: EpisodeTask) -> Row:
    """Run one episode, write its files and return its row. Runs in a worker.

    The row is written last: where there is a row, the timeline is complete too.
    """
    key = task.key
    result = task.episode(key.scenario, key.planner, key.seed, timeline=task.timeline)
    if result.timeline is not None:
        trace = json.dumps(result.timeline.to_chrome_trace(), separators=(",", ":"))
        files.write_text(key.timeline_path(task.out), trace)
    if result.requests is not None:
        results.write_rows(key.requests_path(task.out), result.requests)
    row = results.make_row(key, result)
    results.write_row(key.row_path(task.out), row)
    return row


def run_episodes(tasks: Sequence[EpisodeTask], out: Path, jobs: int) -> tuple[list[Row], list[str]]:
    """The rows of all ``tasks`` that finished now or before, in their order, and why the others did not.

    The traceback of an episode that failed is written to ``out/failures``.

    Raises:
        CommandInterrupted: Ctrl-C; what had finished is kept.
    """
    rows = {task.key.digest: row for task in tasks if (row := task.finished_row()) is not None}
    missing = [task for task in tasks if task.key.digest not in rows]
    if rows:
        print(f"resuming: {len(rows)} of {len(tasks)} episodes are in {out / 'rows'}", file=sys.stderr)
    failures: list[str] = []
    emulated = [task for task in missing if task.key.backend == EMULATOR]
    live = [task for task in missing if task.key.backend != EMULATOR]
    try:
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(CountedProgress("episodes", len(tasks), len(rows)))
            if live:
                # Its servers start with its first episode, but what cannot be is told before any other.
                cluster = stack.enter_context(LiveCluster(live[0].key.scenario, progress.show))
                live = [dataclasses.replace(task, episode=cluster.run_episode) for task in live]
            first = stack.enter_context(contextlib.closing(run_tasks(run_task, emulated, jobs)))
            for task, outcome in itertools.chain(first, run_in_turn(run_task, live)):
                failure_path = task.key.failure_path(out)
                if isinstance(outcome, TaskFailure):
                    files.write_text(failure_path, outcome.details or outcome.reason)
                    failures.append(f"{task.key.name}: {outcome.reason}")
                    progress.advance(f"{task.key.name} failed: {outcome.reason}")
                else:
                    failure_path.unlink(missing_ok=True)
                    rows[task.key.digest] = outcome
                    progress.advance(f"{task.key.name}: SLO attainment {100 * outcome['slo_attainment']:.1f} %")
    except KeyboardInterrupt:
        raise CommandInterrupted(
            f"interrupted; {len(rows)} of {len(tasks)} episodes are kept in {out}: give the same command again to go on"
        ) from None
    return [rows[task.key.digest] for task in tasks if task.key.digest in rows], failures
