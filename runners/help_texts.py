"""The texts of `qlm`, `qlm --help` and `qlm COMMAND --help`."""

from __future__ import annotations

from pathlib import Path

from runners.commands import COMMANDS, Command
from runners.composition import group_options, read_schema

GROUPS = {
    "cluster": "instances by device type, engine settings, injected failures",
    "workload": "models, SLO mix, arrivals and lengths, or a trace",
    "slo": "SLO classes and the latency they are measured on",
    "environment": "decision epochs, request groups, decision time, costs",
    "planner": "one or several: planner=edf, planner=[fcfs,edf,qlm]",
    "tracking": "where results are mirrored to",
}

SETTINGS = {
    "seeds": "a count (3 is 0, 1, 2) or a list ([4,7])",
    "seed": "the seed the requests are drawn from",
    "out": "where results are written; the same folder again resumes the run",
    "jobs": "episodes at once; null is one per CPU core",
    "num_requests": "requests of every load",
    "loads": "arrival rates, as shares of the instance's capacity",
    "memory": "also serve 10 million requests in a process of its own and tell its peak memory",
    "duration_s": "wall-clock seconds of each measurement",
    "timeline": "write a Chrome trace of every episode to out/timelines",
}

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
        f"usage: qlm {name} [key=value ...] [options]",
        "",
        f"{command.summary[0].upper()}{command.summary[1:]}.",
    ]
    if schema.groups:
        lines += ["", "groups (group=option, and group.key=value for any key in them; --cfg shows the keys):"]
        for group in schema.groups:
            lines.append(f"  {group:12} {GROUPS[group]}")
            lines.append(f"  {'':12}   {', '.join(group_options(group, config_dir))}")
    lines += ["", "settings:"]
    for key, default in schema.settings.items():
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        lines.append(f"  {key:12} {SETTINGS[key]} (default: {shown})")
    options = [*OPTIONS, *([MULTIRUN_OPTION] if command.merge else [])]
    lines += ["", "options:", *(f"  {flag:18} {text}" for flag, text in options)]
    lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines)
