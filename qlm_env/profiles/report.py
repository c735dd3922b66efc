"""The tables of ``docs/profiles.md``: fit errors, checks of the scaling rules, saturated rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qlm_env.profiles.capacity import Lengths, mean_resident_tokens, saturated_rate_per_s
from qlm_env.profiles.catalogue import AEGAEON, AICONFIGURATOR, FITTED, LAYERWISE, Fit
from qlm_env.profiles.hardware import ARCHITECTURES
from qlm_env.profiles.least_squares import predict_s, regime_errors
from qlm_env.profiles.load import ProfileKey
from qlm_env.profiles.scaling import PARALLEL_EFFICIENCY, scale_architecture, scale_tp
from qlm_env.profiles.schema import Profile
from qlm_env.profiles.step_tables import REGIMES
from qlm_env.spec import ConfigError, EngineSpec


def fit_table(fits: Mapping[ProfileKey, Fit]) -> str:
    """Markdown: held-out errors of every fit by regime, and their means over the tables of each source."""
    rows = [
        [
            key.device,
            key.architecture,
            str(key.tp),
            FITTED[key].table,
            f"{len(fit.table.latency_s):,}",
            *(
                f"{fit.fit.errors[regime].mean:.1%} ({fit.fit.errors[regime].worst:.0%})"
                if regime in fit.fit.errors
                else ""
                for regime in REGIMES
            ),
        ]
        for key, fit in sorted(fits.items())
    ]
    for source in (AEGAEON, AICONFIGURATOR, LAYERWISE):
        errors = [fit.fit.errors for key, fit in fits.items() if FITTED[key].table == source]
        means = [[error[regime].mean for error in errors if regime in error] for regime in REGIMES]
        cells = [f"**{np.mean(values):.1%}**" if values else "" for values in means]
        rows.append(["**mean**", f"{len(errors)} tables", "", source, "", *cells])
    header = ["device", "architecture", "tp", "data", "steps", *(f"{regime}, mean (worst)" for regime in REGIMES)]
    return _table(header, rows)


RULE_CHECKS = (
    ("A100", ("llama-2-7b", 1), ("llama-2-13b", 1), f"within {AEGAEON}"),
    ("H800", ("llama-2-13b", 1), ("llama-2-7b", 1), f"within {AEGAEON}"),
    ("H800", ("internlm2.5-7b", 1), ("yi-1.5-9b", 1), f"within {AEGAEON}"),
    ("H100", ("llama-3.1-8b", 1), ("qwen3-8b", 1), f"within {AICONFIGURATOR}"),
    ("H200", ("llama-3.1-8b", 1), ("qwen3-8b", 1), f"within {AICONFIGURATOR}"),
    ("L40S", ("llama-3.1-8b", 1), ("qwen3-8b", 1), f"within {AICONFIGURATOR}"),
    (
        "A100",
        ("llama-3.1-8b", 1),
        ("llama-3.1-70b", 4),
        f"within {AICONFIGURATOR}, which the A100's efficiencies come from",
    ),
    ("A100", ("llama-2-7b", 1), ("llama-3.1-8b", 1), f"from {AEGAEON} to {AICONFIGURATOR}"),
)
"""Device, fitted and target (architecture, tp), and what the two fits have in common."""


def rule_table(fits: Mapping[ProfileKey, Fit]) -> str:
    """Markdown: the scaling rules applied where the answer is known, against the steps measured there."""
    rows = []
    for device, fitted, wanted, remark in RULE_CHECKS:
        source, target = ProfileKey(device, *fitted), ProfileKey(device, *wanted)
        scaled = scale_architecture(
            fits[source].fit.coefficients, ARCHITECTURES[source.architecture], ARCHITECTURES[target.architecture]
        )
        if target.tp != source.tp:
            scaled = scale_tp(scaled, target.tp, PARALLEL_EFFICIENCY[target.device, target.tp])
        table = fits[target].table
        errors = regime_errors(table, predict_s(table, scaled))
        rows.append(
            [
                device,
                f"{source.architecture} tp={source.tp}",
                f"{target.architecture} tp={target.tp}",
                remark,
                *(f"{errors[regime].mean:.0%}" if regime in errors else "" for regime in REGIMES),
            ]
        )
    return _table(["device", "from", "to", "data", *REGIMES], rows)


def rate_table(profiles: Mapping[ProfileKey, Profile], prompt_tokens: Lengths, output_tokens: Lengths) -> str:
    """Markdown: what each profile serves with the default engine settings, for a sample of lengths (N,)."""
    prompt, output = float(np.mean(prompt_tokens)), float(np.mean(output_tokens))
    resident = mean_resident_tokens(prompt_tokens, output_tokens)
    engine = EngineSpec()
    rows = []
    for key, profile in sorted(profiles.items()):
        alike = saturated_rate_per_s(profile, engine, prompt, output)
        rate = saturated_rate_per_s(profile, engine, prompt, output, resident)
        rows.append(
            [
                key.device,
                key.architecture,
                str(key.tp),
                profile.c5_s_per_sequence.kind,
                f"{profile.num_gpu_blocks.value:,.0f}",
                f"{profile.cold_start_s.value:.1f}",
                f"{profile.wake_s.value:.2f}",
                f"{alike:.2f}",
                f"{rate:.2f}",
                f"{rate * output:,.0f}",
            ]
        )
    header = ["device", "architecture", "tp", "step time", "KV blocks", "cold start, s", "wake, s"]
    return _table([*header, "requests/s, all alike", "requests/s", "output tokens/s"], rows)


def insert_tables(document: str, tables: Mapping[str, str]) -> str:
    """``document`` with the text between ``<!-- name -->`` and ``<!-- end name -->`` replaced by each table.

    Raises:
        ConfigError: a pair of markers is missing.
    """
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, found_start, rest = document.partition(start)
        _, found_end, after = rest.partition(end)
        if not (found_start and found_end):
            raise ConfigError(f"the document lacks the markers {start} and {end}")
        document = f"{before}{start}\n\n{table}\n\n{end}{after}"
    return document


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
