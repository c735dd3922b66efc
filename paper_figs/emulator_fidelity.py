"""Figure 16: the emulator against recorded runs of real vLLM servers."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure as Picture

from paper_figs import style
from paper_figs.figure import MissingInputError, Source
from runners.errors import CommandFailed

EXPERIMENTS: tuple[str, ...] = ()
FILE = "validation.json"
LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end to end"}
STATISTICS = ("mean", "p50", "p99")


def data(source: Source) -> pd.DataFrame:
    folder = Path(source.options.validations)
    paths = sorted([*folder.glob(FILE), *folder.glob(f"*/{FILE}")])
    if not paths:
        raise MissingInputError(
            f"there is no {FILE} in '{folder}' or a folder in it; make one for each recorded run with qlm profile "
            f"validate run=... out={folder}/NAME"
        )
    rows = []
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            run, profile, latencies = report["run"], report["profile"], report["latencies_s"]
            rows += [
                {
                    "run": f"{run['model'].rpartition('/')[2]}\n{profile['device']} tp={profile['tp']}",
                    "requests": run["num_requests"],
                    "vllm": run["vllm_version"],
                    "latency": name,
                    "statistic": statistic,
                    "recorded_s": latencies[name]["recorded"][statistic],
                    "emulated_s": latencies[name]["emulated"][statistic],
                }
                for name in LATENCIES
                if name in latencies
                for statistic in STATISTICS
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandFailed(
                f"'{path}' is not what qlm profile validate writes ({type(error).__name__}: {error})"
            ) from None
    return pd.DataFrame(rows)


def plot(data: pd.DataFrame) -> Picture:
    picture, axes = style.panels(len(LATENCIES), width=3.6)
    for each, (latency, what) in zip(axes, LATENCIES.items(), strict=True):
        for marker, statistic in zip("os^", STATISTICS, strict=True):
            shown = data[(data["latency"] == latency) & (data["statistic"] == statistic)]
            each.plot(shown["run"], 100 * (shown["emulated_s"] / shown["recorded_s"] - 1), marker, label=statistic)
        each.axhline(0, color="0.4", linewidth=0.8)
        each.set_title(what, fontsize="medium")
        each.tick_params(axis="x", labelsize="x-small")
        each.margins(x=0.2)
    axes[0].set_ylabel("emulated over recorded, less 1 (%)")
    style.legend_below(picture, axes[0])
    return picture


def caption(data: pd.DataFrame, source: Source) -> str:
    runs = data.drop_duplicates("run")
    told = "; ".join(
        f"{name.replace(chr(10), ' on ')}: {requests:,} requests, vLLM {vllm}"
        for name, requests, vllm in zip(runs["run"], runs["requests"], runs["vllm"], strict=True)
    )
    return f"Latencies of recorded runs of real vLLM servers, and the emulator's error in replaying them: {told}."
