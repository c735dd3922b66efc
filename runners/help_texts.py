"""The texts of `qlm`, `qlm --help` and `qlm COMMAND --help`."""

from __future__ import annotations

from pathlib import Path

from runners.commands import COMMANDS, Command
from runners.composition import group_options, read_schema

GROUPS = {
    "cluster": "instances by device type, engine settings, injected failures, real servers",
    "workload": "models, SLO mix, arrivals and lengths, or a trace",
    "slo": "SLO classes and the latency they are measured on",
    "environment": "decision epochs, request groups, decision time, costs",
    "planner": "one or several: planner=edf, planner=[fcfs,edf,qlm]",
    "train": "algorithm, network, action set and their tuned values",
    "tracking": "where results are mirrored to",
    "experiment": "a question as a grid of scenarios, with planners and seeds",
}

SETTINGS = {
    "seeds": "a count (3 is 0, 1, 2) or a list ([4,7])",
    "seed": "the seed that everything random comes from",
    "out": "the folder of what is written; the same folder again resumes a run",
    "jobs": "episodes at once; null is one per CPU core",
    "num_requests": "requests of every load",
    "loads": "arrival rates, as shares of the instance's capacity",
    "memory": "also serve 10 million requests in a process of its own and tell its peak memory",
    "families": "groups, instances and models of random problems, such as [[40,8,5]]",
    "backlog": "work that waits in random problems, in minutes of all instances together",
    "search_times_s": "wall-clock limits of the search",
    "bound_time_limit_s": "wall-clock limit of column generation",
    "snapshots": "also plan problems met in episodes",
    "large": "also plan 2,000 groups on 1,000 instances in a process of its own and tell its peak memory",
    "duration_s": "wall-clock seconds of each measurement, or emulated time over which requests arrive",
    "instances": "of the cluster, two fifths of them A10 and the rest A100",
    "planner": "the planner's name",
    "delta": "size of request groups, in average batches",
    "interval_s": "emulated time between two decisions",
    "preset": "the workload: w_a, w_a_13b, w_a_70b or w_c",
    "queues": "requests left waiting when their waiting times are predicted",
    "histories": "requests served before that, beside the first batch",
    "episodes": "seeds of every queue and history",
    "profile_factors": "the step times of the estimate are also taken as wrong by each of these",
    "sizes": "instances of the clusters",
    "models": "models of every cluster",
    "scenarios": "sampled demands, or service times, that are planned for",
    "fresh_scenarios": "sampled service times that plans are judged by",
    "problems": "random problems of every size",
    "time_limit_s": "wall-clock guard of one solve",
    "node_limit": "the reproducible limit of one solve",
    "relative_gap": "a solution within this of the bound is good enough",
    "url": "where the vLLM server is",
    "model": "the model's name on the server, or in the table; null takes the only one there",
    "api_key_env": "the environment variable that holds the server's API key",
    "profiles": "a folder of your own profiles, beside the shipped ones",
    "table": "a CSV file of measured steps, or a folder of vLLM layer times",
    "system": "the device's name in the table, where it differs",
    "backend": "what serves the requests: emulator, vllm (real servers, cluster.vllm), or [emulator,vllm] for both",
    "weight_bytes": "of all GPUs of the instance; null is that of the architecture",
    "kv_bytes_per_token": "KV cache of one token; null is that of the architecture",
    "context_tokens": "longest context; null is that of the architecture",
    "cold_start_s": "storage to a serving engine; null is estimated for the device, or that of like",
    "stage_s": "storage to host memory; null as cold_start_s",
    "wake_s": "host memory to GPU; null as cold_start_s",
    "sleep_s": "GPU to host memory; null as cold_start_s",
    "kv_swap_bytes_per_s": "KV cache between GPU and host memory; null as cold_start_s",
    "device": "the device's name, such as A100",
    "architecture": "the architecture's name, such as llama-3.1-8b",
    "tp": "GPUs of one instance",
    "repeats": "times everything is measured; medians count",
    "prefill_tokens": "prompt lengths to measure, such as [64,512]; null is a grid up to the server's limits",
    "prefixes": "cached tokens before a prompt to measure; null is one where the server caches prefixes",
    "decode_seqs": "batch sizes to measure; null is a grid up to the server's limits",
    "context_lens": "tokens before a decode step to measure; null is a grid up to the server's limits",
    "max_num_seqs": "the engine's limit of running requests",
    "max_num_batched_tokens": "the engine's token budget per step",
    "like": "a profile file that gives the numbers that are not measured",
    "max_error": "the largest mean error of a fit, per regime",
    "force": "write the profile even if the fit is worse",
    "profile": "a profile file of the server; record needs it for a rate given as workload.arrivals.load",
    "run": "the folder of a recorded run: requests.jsonl, meta.json, timeseries.csv",
    "layer_times": "a folder of measured layer times: replay with step times interpolated in it, too",
    "targets_s": "targets in seconds for requests that were recorded without an SLO class",
    "tick_s": "seconds between two looks at the server's metrics",
    "model_folder": "a model of your own; null makes a small one with random weights",
    "name": "the name the model is served as",
    "port": "port of the loopback address",
    "python": "the interpreter of the environment that has vLLM",
    "max_model_len": "longest prompt + output in tokens",
    "num_gpu_blocks": "KV blocks; null is what the memory holds",
    "kv_cache_gib": "memory for the KV cache of a CPU engine, in GiB",
    "dtype": "number format of weights and KV cache",
    "scheduling_policy": "fcfs or priority",
    "servers": "all: of every model an instance can hold, all but one asleep; initial: of its initial model alone",
    "cpus": "cores a CPU engine computes on, such as [0]; null is all but one",
    "arguments": "further arguments of the server, such as [--no-enable-prefix-caching]",
    "start_timeout_s": "seconds until a server that is not ready is given up",
    "quick": "the small form: fewer seeds, points and requests",
    "names": "figures to draw; null draws all",
    "rows": "where rows of episodes and measurements are kept; the same folder again resumes",
    "simulate": "run what is missing; without, missing rows are an error",
    "learned": "a folder of qlm compare with learned policies",
    "validations": "a folder of results of qlm profile validate, each in a folder of its own",
    "folder": "results of qlm compare or qlm evaluate",
    "tensorboard": "write curves to out/tensorboard",
    "timeline": "write a Chrome trace of every episode to out/timelines",
}

SETTINGS_OF_COMMANDS = {
    ("profile fit", "backend"): "the engine's name in the table; null takes the only one there",
}
"""Where a key means something else."""

OPTIONS = (
    ("-h, --help", "show this help"),
    ("--cfg", "print the composed configuration and stop"),
    ("--config-dir DIR", "a folder of your own options, DIR/workload/mine.yaml for workload=mine"),
)
MULTIRUN_OPTION = ("-m, --multirun", "one run per combination of comma-separated values")


def overview() -> str:
    """What `qlm` prints without arguments."""
    width = max(map(len, COMMANDS))
    lines = [
        "qlm: which LLM serving operation should a cluster run next?",
        "",
        "usage: qlm COMMAND [key=value ...] [options]",
        "",
        "commands:",
        *(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "first steps:",
        f"  {COMMANDS['compare'].examples[0]}",
        "",
        "qlm COMMAND --help lists the groups and keys of a command; qlm --version prints the version.",
    ]
    return "\n".join(lines)


def command_help(name: str, command: Command, config_dir: Path | None = None) -> str:
    """What `qlm COMMAND --help` prints: usage, groups with their options, settings, options, examples."""
    schema = read_schema(command.config_name)
    lines = [
        f"usage: qlm {name} {f'[{command.words.upper()}] ' if command.words else ''}[key=value ...] [options]",
        "",
        f"{command.summary[0].upper()}{command.summary[1:]}.",
    ]
    if schema.groups:
        lines += ["", "groups (group=option, and group.key=value for any key in them; --cfg shows the keys):"]
        for group in schema.groups:
            lines.append(f"  {group:12} {GROUPS[group]}")
            lines.append(f"  {'':12}   {', '.join(group_options(group, config_dir))}")
    lines += ["", "settings:"]
    width = max(12, *map(len, schema.settings))
    for key, default in schema.settings.items():
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        lines.append(f"  {key:{width}} {SETTINGS_OF_COMMANDS.get((name, key), SETTINGS[key])} (default: {shown})")
    options = [*OPTIONS, *([MULTIRUN_OPTION] if command.merge else [])]
    lines += ["", "options:", *(f"  {flag:18} {text}" for flag, text in options)]
    lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines)
