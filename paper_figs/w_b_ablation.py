"""Figure 8: each operation left out, on five models."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import ablation, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("w_b_ablation",)


def data(source: Source) -> pd.DataFrame:
    return ablation.without_each(source.rows("w_b_ablation"))


def plot(data: pd.DataFrame) -> Picture:
    return ablation.plot_without_each(data)


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        f"QLM on five models with operations left out, {tidy.INTERVALS}. Without swaps, every instance is dedicated "
        f"to one model. {tidy.setting(source.rows('w_b_ablation'))}"
    )
