"""The subcommands of `qlm`: what each is called, accepts and does.

To add one, write its configuration in ``configs/``, a function that validates the composed values, a
function that runs, and an entry in :data:`COMMANDS`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlm_env.spec import ConfigError
from runners import (
    cluster_config,
    config,
    experiment_config,
    live_config,
    profile_config,
    train_config,
    validate_config,
)

BENCHMARKS = {
    "emulator": ("runners.bench_emulator", config.parse_bench_emulator, "how fast the emulator runs on this machine"),
    "env": ("runners.bench_env", config.parse_bench_env, "how fast the env runs on this machine"),
    "planner": ("runners.bench_planner", config.parse_bench_planner, "how good plans are, against time"),
    "cost": ("runners.bench_cost", config.parse_bench_cost, "what the stochastic cost gains"),
    "rwt": ("runners.bench_rwt", config.parse_bench_rwt, "how well waiting times are predicted"),
    "scale": ("runners.bench_scale", config.parse_bench_scale, "how long a day of a large cluster takes"),
    "placement": ("runners.bench_placement", config.parse_bench_placement, "how fast placements are planned"),
}
"""Name -> module with a function ``measure(options) -> list[Figure]``, what parses these options, and a summary."""


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


def _attainable(options: config.AttainableConfig) -> None:
    from runners.attainable import report_attainable

    report_attainable(options)


def _train(options: train_config.TrainConfig) -> float:
    _require_learning()
    from runners.train import train

    return train(options)


def _record(options: train_config.RecordDemonstrationsConfig) -> None:
    _require_learning()
    from runners.record import record

    record(options)


def _require_learning() -> None:
    """Refuse in one line where a library that learning needs is missing."""
    for library in ("torch", "sb3_contrib", "safetensors"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(f"{library} is not installed; pip install 'qlm-env[train]'")


def _merge_trainings(out: Path) -> None:
    from runners.train_log import merge_jobs

    merge_jobs(out)


def _describe(options: config.WorkloadConfig) -> None:
    from runners.workload_commands import describe_workload

    describe_workload(options)


def _export(options: config.WorkloadConfig) -> None:
    from runners.workload_commands import export_workload

    export_workload(options)


def _list_profiles(options: profile_config.ListOptions) -> None:
    from runners.profile_commands import list_all

    list_all(options)


def _show_profile(options: profile_config.ShowOptions) -> None:
    from runners.profile_commands import show

    show(options)


def _fit_profile(options: profile_config.FitOptions) -> None:
    from runners.profile_commands import fit

    fit(options)


def _measure_profile(options: live_config.MeasureOptions) -> None:
    from runners.profile_measure import measure

    measure(options)


def _record_run(options: live_config.RecordConfig) -> None:
    from runners.profile_record import record

    record(options)


def _validate(options: validate_config.ValidateConfig) -> None:
    from runners.profile_validate import validate

    validate(options)


def _serve_vllm(options: live_config.ServeOptions) -> None:
    from runners.vllm_serve import serve

    serve(options)


def _make_model(options: cluster_config.MakeModelOptions) -> None:
    from runners.make_model import make_model

    make_model(options)


def _cluster_up(options: cluster_config.UpConfig) -> None:
    from runners.cluster_commands import up

    up(options)


def _cluster_status(options: cluster_config.FolderOptions) -> None:
    from runners.cluster_commands import status

    status(options)


def _cluster_down(options: cluster_config.FolderOptions) -> None:
    from runners.cluster_commands import down

    down(options)


def _sweep(options: experiment_config.SweepConfig) -> None:
    from runners.sweep import sweep

    sweep(options)


def _merge_sweep(out: Path) -> None:
    from runners.sweep import merge_jobs

    merge_jobs(out)


def _figures(options: experiment_config.FiguresOptions) -> None:
    # By name: figures import the runners, which must not depend on them.
    importlib.import_module("paper_figs.draw").draw_figures(options)


def _report(options: experiment_config.ReportOptions) -> None:
    from runners.report import report

    report(options)


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
    run: Callable[[Any], float | None]
    """Returns what a sweeper may optimise, if there is such a thing."""
    words: str = ""
    """The setting that words without ``=`` are values of; without it there are none."""
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
            "qlm compare backend=vllm cluster=live_cpu workload=live_multi planner=[fcfs,edf,qlm] seeds=1",
            "qlm compare backend=[emulator,vllm] cluster=live_cpu workload=live_multi planner=edf seeds=1",
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
    "sweep": Command(
        summary="one experiment: a grid of scenarios, several planners and seeds",
        config_name="sweep",
        parse=experiment_config.parse_sweep,
        run=_sweep,
        merge=_merge_sweep,
        examples=(
            "qlm sweep experiment=w_a_rate",
            "qlm sweep experiment=headline experiment.seeds=3 quick=true",
            "qlm sweep -m experiment=headline experiment.seeds=[0,1],[2,3]",
        ),
    ),
    "figures": Command(
        summary="the paper's figures, as PNG and PDF with a gallery page",
        config_name="figures",
        parse=experiment_config.parse_figures,
        run=_figures,
        words="names",
        examples=("qlm figures --quick", "qlm figures w_a_attainment w_b_ablation out=results/figures"),
    ),
    "report": Command(
        summary="one page about the results of a comparison, for any browser and without the network",
        config_name="report",
        parse=experiment_config.parse_report,
        run=_report,
        words="folder",
        examples=("qlm report results/first", "qlm report results/first out=first.html"),
    ),
    "train": Command(
        summary="a policy trained by reinforcement learning or imitation",
        config_name="train",
        parse=train_config.parse_train,
        run=_train,
        merge=_merge_trainings,
        examples=(
            "qlm train cluster=small workload=w_a train=ppo_pointer out=results/w_a_pointer",
            "qlm train cluster=smoke workload=smoke train=ppo_mlp train.total_steps=20000 out=results/first",
            "qlm train train=imitation train.dataset=results/recorded-decisions out=results/imitation",
            "qlm train train=ppo_pointer train.initial=results/imitation/checkpoint out=results/imitation_ppo",
        ),
    ),
    "record": Command(
        summary="a planner's decisions over several workloads, for imitation",
        config_name="record",
        parse=train_config.parse_record,
        run=_record,
        examples=("qlm record planner=edf cluster=small workload=w_a seeds=20 out=results/recorded-decisions",),
    ),
    "attainable": Command(
        summary="how many requests any policy could serve in time, at most",
        config_name="attainable",
        parse=config.parse_attainable,
        run=_attainable,
        examples=(
            "qlm attainable cluster=small workload=w_a workload.arrivals.load=2.0 seeds=3 out=results/bound",
            "qlm attainable cluster=smoke workload=smoke seeds=3 out=results/first",
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
    "profile list": Command(
        summary="the latency profiles there are, and how well each fits",
        config_name="profile_list",
        parse=profile_config.parse_list,
        run=_list_profiles,
        examples=("qlm profile list", "qlm profile list device=A100 tp=1"),
    ),
    "profile show": Command(
        summary="every number of one latency profile, with its source",
        config_name="profile_show",
        parse=profile_config.parse_show,
        run=_show_profile,
        examples=("qlm profile show device=A100 architecture=llama-3.1-8b",),
    ),
    "profile fit": Command(
        summary="a latency profile fitted to a table of measured steps",
        config_name="profile_fit",
        parse=profile_config.parse_fit,
        run=_fit_profile,
        examples=(
            "qlm profile fit table=steps.csv device=A100 architecture=llama-3.1-8b out=results/fitted",
            "qlm profile fit table=steps.csv device=MYGPU architecture=qwen3-8b like=a100_qwen3-8b_tp1.yaml "
            "num_gpu_blocks=20000",
        ),
    ),
    "profile measure": Command(
        summary="the latency profile of a running vLLM server, measured over HTTP",
        config_name="profile_measure",
        parse=live_config.parse_measure,
        run=_measure_profile,
        examples=(
            "qlm profile measure url=http://127.0.0.1:8000 device=A100 architecture=llama-3.1-8b out=results/measured",
            "qlm profile measure device=CPU architecture=tiny like=mine.yaml repeats=5 out=results/measured",
        ),
    ),
    "profile record": Command(
        summary="one workload on a running vLLM server, recorded for comparison with the emulator",
        config_name="profile_record",
        parse=live_config.parse_record,
        run=_record_run,
        examples=(
            "qlm profile record url=http://127.0.0.1:8000 workload.num_requests=100 "
            "~workload.arrivals.load workload.arrivals.rate_per_s=1 out=results/recorded",
            "qlm profile record profile=results/measured/cpu_tiny_tp1.yaml workload.arrivals.load=1.0 "
            "out=results/recorded",
        ),
    ),
    "profile validate": Command(
        summary="a recorded run of a real vLLM server against the emulator",
        config_name="profile_validate",
        parse=validate_config.parse_validate,
        run=_validate,
        examples=(
            "qlm profile validate run=vllm_runs/RTX4090/Llama-3.1-8B device=RTX4090 architecture=llama-3.1-8b",
            "qlm profile validate run=results/recorded profile=results/measured/cpu_tiny_tp1.yaml",
        ),
    ),
    "vllm serve": Command(
        summary="one vLLM server on this machine, of a small random-weight model or your own",
        config_name="vllm_serve",
        parse=live_config.parse_serve,
        run=_serve_vllm,
        examples=("qlm vllm serve port=8000", "qlm vllm serve model_folder=my-model name=mine max_num_seqs=64"),
    ),
    "vllm make-model": Command(
        summary="a small model of random weights, for a server to serve",
        config_name="vllm_make_model",
        parse=cluster_config.parse_make_model,
        run=_make_model,
        examples=("qlm vllm make-model out=models/chat seed=1",),
    ),
    "cluster up": Command(
        summary="vLLM servers that outlive one run, one per instance and model",
        config_name="cluster_up",
        parse=cluster_config.parse_up,
        run=_cluster_up,
        examples=(
            "qlm cluster up cluster=live_cpu workload=live_multi out=results/cluster",
            "qlm cluster up cluster=live_gpu workload=w_a cluster.vllm.model_folders.vicuna-7b=/models/vicuna-7b",
        ),
    ),
    "cluster status": Command(
        summary="how every server of such a cluster stands",
        config_name="cluster_status",
        parse=cluster_config.parse_folder,
        run=_cluster_status,
        examples=("qlm cluster status out=results/cluster",),
    ),
    "cluster down": Command(
        summary="stops such a cluster, with all its servers",
        config_name="cluster_down",
        parse=cluster_config.parse_folder,
        run=_cluster_down,
        examples=("qlm cluster down out=results/cluster",),
    ),
    **{
        f"bench {name}": Command(
            summary=summary,
            config_name=f"bench_{name}",
            parse=parse_options,
            run=functools.partial(_bench, name),
            examples=(f"qlm bench {name} out=results/bench-{name}",),
        )
        for name, (_, parse_options, summary) in BENCHMARKS.items()
    },
}
