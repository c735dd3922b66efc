"""Figure 6: each operation left out, on one model."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import ablation, tidy
from paper_figs.figure import Source

EXPERIMENTS = ("w_a_ablation",)


def data(source: Source) -> pd.DataFrame:
    return ablation.without_each(source.rows("w_a_ablation"))


def plot(data: pd.DataFrame) -> Picture:
    return ablation.plot_without_each(data)


def caption(data: pd.DataFrame, source: Source) -> str:
    return (
        f"QLM on one model with operations left out, {tidy.INTERVALS}. With one model there is nothing to swap or to "
        f"stage. {tidy.setting(source.rows('w_a_ablation'))}"
    )
