"""`qlm profile validate`: a recorded run of a real server, replayed by the emulator and compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from qlm_env.fidelity import Comparison, RecordedRun, compare_runs, read_run, replay
from qlm_env.fidelity.errors import LATENCIES, Statistics, emulated_latencies_s, recorded_latencies_s
from qlm_env.fidelity.layer_steps import read_layer_steps, replay_by_steps
from qlm_env.fidelity.replay import ReplayedRun, sample_counts
from qlm_env.profiles import Profile, load_profile
from qlm_env.profiles.load import read_profile
from qlm_env.spec import SloSpec
from runners.files import write_text
from runners.tables import console
from runners.validate_config import ValidateConfig, ValidateOptions
from runners.validation_plot import draw_validation

COUNT_SAMPLES = 200
"""Points of the emulated batch and queue over time in the plot."""


def validate(config: ValidateConfig) -> None:
    """Print how far the emulator is from the recorded run; write ``validation.json`` and ``validation.png`` to ``out``.

    Raises:
        ConfigError: run or profile cannot be used; nothing is written then.
    """
    run = read_run(Path(config.options.run))
    profile, source = find_validated_profile(config.options, run)
    slo = config.slo if run.engine.slo is None else run.engine.slo
    class_names = tuple(slo_class.name for slo_class in slo.classes)
    replayed = replay(run, profile, class_names)
    compared = compare_runs(run.requests, replayed, slo, config.options.targets_s)
    interpolated = None
    if config.options.layer_times is not None:
        steps = read_layer_steps(Path(config.options.layer_times), profile)
        by_steps = replay_by_steps(run, profile, steps, class_names)
        interpolated = compare_runs(run.requests, by_steps, slo, config.options.targets_s)
    counts = sample_counts(run, profile, class_names, COUNT_SAMPLES)

    values = report(run, profile, source, replayed, compared, slo)
    if interpolated is not None:
        values["interpolated_latencies_s"] = latency_values(interpolated)
    write_text(config.out / "validation.json", json.dumps(values, indent=2) + "\n")
    draw_validation(
        config.out / "validation.png",
        f"{run.engine.model}, vLLM {run.engine.vllm_version}, and the emulator as {profile.device}",
        recorded_latencies_s(run.requests),
        emulated_latencies_s(run.requests, replayed),
        counts,
        run.series,
    )
    printer = console()
    name = f"{run.engine.model}, vLLM {run.engine.vllm_version}: {len(run.requests.line):,} requests"
    against = f"{profile.architecture} on {profile.device} tp={profile.tp}"
    printer.print(latency_table(compared, f"{name}, against {against}"))
    if interpolated is not None:
        printer.print(
            latency_table(interpolated, f"the same, with step times interpolated in {config.options.layer_times}")
        )
    printer.print(attainment_table(compared, slo))
    for line in assumptions(run, profile, source):
        printer.print(line, highlight=False, markup=False)
    printer.print(f"{config.out / 'validation.json'}, {config.out / 'validation.png'}", highlight=False, markup=False)


def find_validated_profile(options: ValidateOptions, run: RecordedRun) -> tuple[Profile, str]:
    """The profile that ``options`` name, and what to call it.

    Raises:
        ConfigError: there is none, or its file is malformed.
    """
    if options.profile is not None:
        return read_profile(Path(options.profile)), options.profile
    assert options.device is not None
    assert options.architecture is not None
    tp = run.engine.tp if options.tp is None else options.tp
    profile = load_profile(options.device, options.architecture, tp)
    return profile, f"{profile.architecture} on {profile.device} tp={profile.tp}"


def assumptions(run: RecordedRun, profile: Profile, source: str) -> list[str]:
    """What entered the replay that the record alone does not tell, one line each."""
    lines = [f"step times: {profile.c5_s_per_sequence.kind}, {profile.c5_s_per_sequence.source}"]
    settings = run.engine.settings.model_dump(mode="json")
    for name, origin in run.engine.origins.items():
        if "." not in origin or not origin.startswith(("resolved_config", "kv_cache", "engine_kwargs")):
            value = int(profile.num_gpu_blocks.value) if name == "num_gpu_blocks" else settings[name]
            lines.append(f"{name}={value} is not recorded: {origin}")
    if profile.tp != run.engine.tp:
        lines.append(f"the run had tp={run.engine.tp}, the profile ({source}) has tp={profile.tp}")
    return lines


def report(
    run: RecordedRun, profile: Profile, source: str, replayed: ReplayedRun, compared: Comparison, slo: SloSpec
) -> dict[str, Any]:
    """Everything that was compared, as plain JSON values."""
    return {
        "run": {
            "model": run.engine.model,
            "vllm_version": run.engine.vllm_version,
            "device": run.engine.device_name,
            "tp": run.engine.tp,
            "num_requests": len(run.requests.line),
            "engine": run.engine.settings.model_dump(mode="json"),
            "found_in": dict(run.engine.origins),
        },
        "profile": {
            "name": source,
            "device": profile.device,
            "architecture": profile.architecture,
            "tp": profile.tp,
            "step_time": profile.step_time._asdict(),
            "source": profile.c0_s.source,
        },
        "emulator": {
            "engine_steps": replayed.engine_steps,
            "preemptions": replayed.preemptions,
            "recomputed_tokens": replayed.recomputed_tokens,
        },
        "latencies_s": latency_values(compared),
        "slo_metric": slo.metric,
        "attainment": [vars(row) for row in compared.attainment],
        "overall_attainment": None
        if compared.overall_attainment is None
        else dict(zip(("recorded", "emulated"), compared.overall_attainment, strict=True)),
    }


def latency_values(compared: Comparison) -> dict[str, Any]:
    """Every latency's statistics and errors, as plain JSON values."""
    return {
        name: {
            "recorded": error.recorded._asdict(),
            "emulated": error.emulated._asdict(),
            "relative_error": {key: _finite(value) for key, value in error.relative_error._asdict().items()},
            "mean_absolute_error_s": error.mean_absolute_error_s,
        }
        for name, error in compared.latencies.items()
    }


def latency_table(compared: Comparison, title: str) -> Table:
    """Recorded and emulated statistics of every latency in seconds, with relative errors."""
    table = Table(title=title)
    table.add_column("latency", no_wrap=True)
    table.add_column("")
    for statistic in Statistics._fields:
        table.add_column(f"{statistic} (s)", justify="right")
    table.add_column("mean absolute\nerror (s)", justify="right")
    for latency, error in compared.latencies.items():
        table.add_row(LATENCIES[latency], "recorded", *(f"{value:.4g}" for value in error.recorded), "")
        table.add_row(
            "", "emulated", *(f"{value:.4g}" for value in error.emulated), f"{error.mean_absolute_error_s:.4g}"
        )
        table.add_row("", "error", *map(_percent, error.relative_error), "", end_section=True)
    return table


def attainment_table(compared: Comparison, slo: SloSpec) -> Table:
    """SLO attainment of both runs in percent, one target per line."""
    table = Table("SLO class", title=f"SLO attainment, on {LATENCIES[slo.metric]}")
    for name in ("target (s)", "requests", "recorded (%)", "emulated (%)", "difference (points)"):
        table.add_column(name, justify="right")
    for row in compared.attainment:
        table.add_row(
            row.slo_class or "(none)",
            f"{row.target_s:g}",
            f"{row.num_requests:,}",
            f"{100 * row.recorded:.1f}",
            f"{100 * row.emulated:.1f}",
            f"{100 * (row.emulated - row.recorded):+.1f}",
        )
    if compared.overall_attainment is not None:
        recorded, emulated = compared.overall_attainment
        shares = (f"{100 * recorded:.1f}", f"{100 * emulated:.1f}", f"{100 * (emulated - recorded):+.1f}")
        table.add_row("all", "own", "", *shares)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %" if math.isfinite(share) else "-"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
