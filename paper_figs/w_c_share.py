"""Figure 9: SLO attainment against the share of mega prompts."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("w_c_share",)
SHARE = "point.workload.mega_prompts.share"


def data(source: Source) -> pd.DataFrame:
    return tidy.means(source.rows("w_c_share"), (SHARE, "planner"), ("slo_attainment",))


def plot(data: pd.DataFrame) -> Picture:
    picture, (axes,) = style.panels(1, width=5.2)
    style.curves(axes, data.assign(**{SHARE: 100 * data[SHARE]}), SHARE, scale=100)
    axes.set_xlabel("prompts of 3,000 to 4,000 tokens (%)")
    axes.set_ylabel("SLO attainment (%)")
    style.legend_below(picture, axes, 4)
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        f"SLO attainment against the share of mega prompts, {tidy.INTERVALS}. "
        f"{tidy.setting(source.rows('w_c_share'))} The arrival rate is the cluster's capacity for each mix, so fewer "
        "requests arrive where more are long."
    )
