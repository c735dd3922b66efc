"""The subcommands of `qlm`: what each is called, accepts and does.

To add one, write its configuration in ``configs/``, a function that validates the composed values, a
function that runs, and an entry in :data:`COMMANDS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners import config

BENCHMARKS = {
    "emulator": ("runners.bench_emulator", config.parse_bench_emulator),
    "env": ("runners.bench_env", config.parse_bench_env),
}
"""Name -> module with a function ``measure(options) -> list[Figure]``, and what parses these options."""


# What a command needs is imported when it runs: help and mistakes should not wait for numeric libraries.


def _compare(options: config.CompareConfig) -> None:
    from runners.compare import compare

    compare(options)


def _evaluate(options: config.CompareConfig) -> None:
    from runners.compare import evaluate

    evaluate(options)


def _merge(out: Path) -> None:
    from runners.compare import merge_jobs

    merge_jobs(out)


def _describe(options: config.WorkloadConfig) -> None:
    from runners.workload_commands import describe_workload

    describe_workload(options)


def _export(options: config.WorkloadConfig) -> None:
    from runners.workload_commands import export_workload

    export_workload(options)


def _bench(name: str, options: config.BenchOptions) -> None:
    from runners.bench import bench

    bench(name, BENCHMARKS[name][0], options)


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    summary: str
    """One line, for the overview."""
    config_name: str
    """Its file in ``configs/``, without the suffix."""
    parse: Callable[[Mapping[str, Any]], Any]
    """Composed values -> what ``run`` takes; raises ConfigError."""
    run: Callable[[Any], None]
    merge: Callable[[Path], None] | None = None
    """Puts the jobs of a multirun together in ``out``; without it the command has no multirun."""
    examples: tuple[str, ...] = ()


COMMANDS = {
    "compare": Command(
        summary="several planners over several seeds on identical workloads",
        config_name="compare",
        parse=config.parse_compare,
        run=_compare,
        merge=_merge,
        examples=(
            "qlm compare cluster=smoke workload=smoke planner=[fcfs,edf,qlm] seeds=3 out=results/first",
            "qlm compare workload=w_b cluster=small_multi workload.arrivals.load=0.8",
            "qlm compare -m workload.arrivals.load=0.6,0.8,1.0 out=results/load",
        ),
    ),
    "evaluate": Command(
        summary="one planner on one workload, with every metric",
        config_name="evaluate",
        parse=config.parse_evaluate,
        run=_evaluate,
        merge=_merge,
        examples=(
            "qlm evaluate cluster=smoke workload=smoke planner=edf",
            "qlm evaluate planner=qlm workload=azure_conv workload.path=AzureLLMInferenceTrace_conv.csv",
        ),
    ),
    "workload describe": Command(
        summary="what the requests of a workload look like",
        config_name="workload_describe",
        parse=config.parse_workload_describe,
        run=_describe,
        examples=("qlm workload describe workload=w_c seed=1",),
    ),
    "workload export": Command(
        summary="the requests of a workload as a Parquet file",
        config_name="workload_export",
        parse=config.parse_workload_export,
        run=_export,
        examples=("qlm workload export workload=w_b cluster=small_multi out=w_b.parquet",),
    ),
    **{
        f"bench {name}": Command(
            summary=f"how fast the {name} runs on this machine",
            config_name=f"bench_{name}",
            parse=parse_options,
            run=functools.partial(_bench, name),
            examples=(f"qlm bench {name} out=results/bench-{name}",),
        )
        for name, (_, parse_options) in BENCHMARKS.items()
    },
}
