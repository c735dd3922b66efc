"""`qlm report`: one page about a comparison that any browser opens, with nothing to fetch from anywhere."""

from __future__ import annotations

import html
import importlib.util
import json
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from qlm_env.spec import ConfigError
from runners import files
from runners.experiment_config import ReportOptions
from runners.report_data import Json, report_data
from runners.stats import Interval
from runners.tables import interval_percent, number

PAGE = "report.html"


class _PageTemplate(Template):
    """Placeholders that are nothing in JavaScript or CSS."""

    delimiter = "%%"


def report(options: ReportOptions) -> None:
    """Write the page about the results in ``options.folder``.

    Raises:
        ConfigError: there are no results, or plotly is not installed.
        CommandFailed: the results are mixed.
    """
    folder = Path(options.folder)
    path = Path(options.out) if options.out is not None else folder / PAGE
    write_report(folder, path)
    print(f"the report is {path}", file=sys.stderr)


def available() -> bool:
    """Whether the library that draws the plots is installed."""
    return importlib.util.find_spec("plotly") is not None


def write_report(folder: Path, path: Path) -> None:
    """Write the page about a comparison to ``path``, atomically.

    Raises:
        ConfigError, CommandFailed: as :func:`report`.
    """
    data = report_data(folder)
    if not available():
        raise ConfigError("plotly is not installed; pip install 'qlm-env[report]'")
    files.write_text(path, page(data))


def page(data: Json) -> str:
    """The page as HTML: the numbers as plain tables, and plots for browsers that run scripts."""
    from plotly.offline import get_plotlyjs

    template = _PageTemplate(resources.files(__package__).joinpath("report_page.html").read_text(encoding="utf-8"))
    # In a script, "</" could end it.
    values = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    counts = sorted({len(entry["seeds"]) for entry in data["summary"]})
    told = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    metric = {"e2e": "end-to-end latency", "ttft": "time to first token"}[data["metric"]]
    targets = ", ".join(f"{c['name']} {c['target_s']:g} s" for c in data["classes"])
    lead = f"{len(data['planners'])} planners, {told}, backend {data['backend']}. Targets on {metric}: {targets}."
    return template.substitute(
        title=html.escape(data["title"]),
        lead=html.escape(lead),
        summary=_summary(data),
        provenance=_provenance(data),
        plotly=get_plotlyjs(),
        data=values,
    )


def _summary(data: Json) -> str:
    classes = list(dict.fromkeys(name for entry in data["summary"] for name in entry["slo_attainment_per_class"]))
    first = data["planners"][0]
    heads = ["planner", "SLO attainment (%)", *classes, f"minus {first}", "requests/s", "swaps", "evictions"]
    heads += ["decision p50 / p99 (ms)", "n"]
    lines = []
    for entry in data["summary"]:
        per_class = entry["slo_attainment_per_class"]
        difference = data["differences"].get(entry["planner"])
        lines.append(
            [
                entry["planner"],
                _percent(entry["slo_attainment"]),
                *(_percent(per_class.get(name)) for name in classes),
                _percent(difference, "+"),
                *(number(entry[name]) for name in ("request_throughput_per_s", "swaps", "evictions")),
                f"{number(entry['decision_p50_ms'])} / {number(entry['decision_p99_ms'])}",
                str(len(entry["seeds"])),
            ]
        )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _percent(triple: Mapping[str, float | None] | None, sign: str = "") -> str:
    if triple is None or triple["iqm"] is None:
        return "-"
    return interval_percent(Interval(*(triple[name] or 0.0 for name in Interval._fields)), sign)


def _provenance(data: Json) -> str:
    known: Mapping[str, Any] = data["provenance"] or {}
    command = known.get("command", "not recorded")
    facts = {
        "run at": known.get("time", "not recorded"),
        "version": known.get("qlm_env", "not recorded"),
        "code": data["code_version"],
        "Python": known.get("python", "not recorded"),
        "machine": f"{known['cores']} cores, {known['processor']}, {known['system']}" if known else "not recorded",
        "packages": ", ".join(f"{name} {version}" for name, version in known.get("packages", {}).items())
        or "not recorded",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
    scenario = html.escape(json.dumps(data["scenario"], indent=1))
    planners = html.escape(json.dumps(data["planner_options"], indent=1))
    return (
        f"<pre>{html.escape(str(command))}</pre><dl>{listed}</dl>"
        f"<details><summary>planners</summary><pre>{planners}</pre></details>"
        f"<details><summary>scenario</summary><pre>{scenario}</pre></details>"
    )
