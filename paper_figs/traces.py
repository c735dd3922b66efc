"""Figure 17: production traces replayed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import MissingInputError, Source
from runners import experiment

EXPERIMENTS = ("traces",)


def check_inputs(source: Source) -> None:
    """Trace files are not shipped.

    Raises:
        MissingInputError: one is not there.
    """
    for cell in experiment.cells(source.experiment("traces")):
        path = Path(cell.config.scenario.workload.path)  # type: ignore[union-attr]
        if not path.is_file():
            raise MissingInputError(
                f"the trace of {cell.case} is not at '{path}'; name the folder of both traces in the variable "
                "QLM_TRACES (docs/workloads.md says where they are from)"
            )


def data(source: Source) -> pd.DataFrame:
    return tidy.means(source.rows("traces"), ("case", "planner"), ("slo_attainment", "request_throughput_per_s"))


def plot(data: pd.DataFrame) -> Picture:
    cases = list(data["case"].unique())
    picture, axes = style.panels(len(cases), width=4.8)
    for each, case in zip(axes, cases, strict=True):
        shown = data[(data["case"] == case) & (data["metric"] == "slo_attainment")]
        style.bars(
            each, shown, [style.label(p) for p in shown["planner"]], [style.colour(p) for p in shown["planner"]], 100
        )
        each.set_xlabel("SLO attainment (%)")
        each.set_xlim(0, 100)
        each.set_title(case, fontsize="medium")
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    rows = source.rows("traces")
    told = " ".join(f"{case}: {tidy.setting(group)}" for case, group in rows.groupby("case", sort=False))
    return (
        f"SLO attainment on production traces, {tidy.INTERVALS}. {told} Seeds deal models and SLO classes to "
        "requests; arrivals and lengths are the trace's."
    )
