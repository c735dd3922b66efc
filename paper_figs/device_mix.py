"""Figure 10: SLO attainment on clusters of unlike devices."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("device_mix",)


def data(source: Source) -> pd.DataFrame:
    found = tidy.means(source.rows("device_mix"), ("case", "planner"), ("slo_attainment",))
    return found.assign(a10=found["case"].astype(int))


def plot(data: pd.DataFrame) -> Picture:
    picture, (axes,) = style.panels(1, width=5.2)
    style.curves(axes, data, "a10", scale=100)
    axes.set_xticks(sorted(data["a10"].unique()))
    axes.set_xlabel("A10 among eight GPUs, the others A100")
    axes.set_ylabel("SLO attainment (%)")
    style.legend_below(picture, axes, 4)
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        f"SLO attainment against the mix of devices, {tidy.INTERVALS}. {tidy.setting(source.rows('device_mix'))} The "
        "arrival rate is each cluster's own capacity."
    )
