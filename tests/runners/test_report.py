"""The report page: what is in it, what it refuses, and that a browser draws it without the network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from qlm_env.spec import ConfigError
from runners import report_data, results
from runners.commands import COMMANDS
from runners.compare import compare
from runners.config import CompareConfig
from runners.errors import CommandFailed
from runners.experiment_config import ReportOptions
from runners.report import report
from tests.runners import fakes

pytest.importorskip("plotly", reason="plotly draws the report; pip install 'qlm-env[report]'")

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def folder(configure: Callable[..., CompareConfig], quick: None) -> Path:
    config = configure("planner=[fcfs,edf,qlm]", "seeds=3")
    compare(config, fakes.episode, fakes.check)
    return config.out


class Page(HTMLParser):
    """Cells of the first table, and everything a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_cell = tag == "td"
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells.append(data)
            self._in_cell = False


def test_the_page_has_everything_and_fetches_nothing(folder: Path) -> None:
    report(ReportOptions(folder=str(folder)))
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    # Planner, attainment, three classes, difference, requests/s, swaps, evictions, decision time, n.
    assert page.cells[:2] == ["fcfs", "51.0 [50.0, 52.0]"]
    assert page.cells[11:13] == ["edf", "61.0 [60.0, 62.0]"]
    assert page.cells[16] == "+10.0"
    assert page.cells[10] == "3"
    assert "code" in text
    assert results.code_version() in text
    data = embedded(text)
    assert data["planners"] == ["fcfs", "edf", "qlm"]
    assert data["seeds"]["qlm"] == {"0": 0.7, "1": 0.71, "2": 0.72}
    interactive = data["latencies"]["fcfs"]["interactive"]
    assert interactive["requests"] == 6
    assert interactive["e2e_s"]["s"][0] == 2.0
    assert interactive["e2e_s"]["s"][-1] == 6.0
    assert data["latencies"]["fcfs"]["batch-2"]["ttft_s"]["share"] == 0.5  # the others never got a token


def embedded(text: str) -> dict:  # type: ignore[type-arg]
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    values: dict = json.loads(found[1])  # type: ignore[type-arg]
    return values


def test_names_cannot_break_the_page(configure: Callable[..., CompareConfig], quick: None) -> None:
    config = configure("planner=[fcfs]", "seeds=1", "workload.name='</script><b>'")
    compare(config, fakes.episode, fakes.check)
    report(ReportOptions(folder=str(config.out)))
    text = (config.out / "report.html").read_text(encoding="utf-8")
    assert "<title>&lt;/script&gt;&lt;b&gt; on smoke</title>" in text
    assert embedded(text)["title"] == "</script><b> on smoke"


def test_without_timelines_the_page_says_so(configure: Callable[..., CompareConfig], quick: None) -> None:
    config = configure("planner=[fcfs]", "seeds=1", "timeline=false")
    compare(config, fakes.episode, fakes.check)
    data = report_data.report_data(config.out)
    assert data["latencies"] == {"fcfs": None}
    assert data["timelines"] == {"fcfs": None}


def test_what_is_no_comparison_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        report(ReportOptions(folder=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match=r"there is no results\.parquet"):
        report(ReportOptions(folder=str(tmp_path)))
    rows = pd.read_parquet(folder / "results.parquet")
    for column, what in (("code_version", "versions of the code"), ("config_hash", "scenarios")):
        mixed = rows.copy()
        mixed.loc[0, column] = "another"
        results.write_rows(folder / "results.parquet", mixed)
        with pytest.raises(CommandFailed, match=f"mixes rows of several {what} .*another"):
            report(ReportOptions(folder=str(folder)))
    results.write_rows(folder / "results.parquet", rows.assign(job="0"))
    with pytest.raises(ConfigError, match="holds several jobs; name one of"):
        report(ReportOptions(folder=str(folder)))
    (folder / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="cannot be read"):
        report(ReportOptions(folder=str(folder)))


def test_a_trace_is_read_into_tracks() -> None:
    events = [
        {"ph": "M", "pid": 100, "name": "process_name", "args": {"name": "cluster"}},
        {"ph": "M", "pid": 101, "name": "process_name", "args": {"name": "instance 0 A100"}},
        {"ph": "M", "pid": 101, "tid": 1, "name": "thread_name", "args": {"name": "model"}},
        {"ph": "X", "pid": 101, "tid": 1, "name": "loading chat", "ts": 0, "dur": 2_500_000},
        {"ph": "i", "pid": 101, "tid": 5, "name": "evict", "ts": 3_000_000, "args": {"requests": 4}},
        {"ph": "C", "pid": 100, "name": "requests", "ts": 1_000_000, "args": {"running": 1, "waiting": 2}},
        {"ph": "C", "pid": 101, "name": "requests", "ts": 1_000_000, "args": {"running": 9, "waiting": 9}},
    ]
    trace = report_data.read_trace(events)
    assert trace["instances"] == ["0 A100"]
    assert trace["slices"] == [[0, 0.0, 2.5, "loading chat", "model"]]
    assert trace["marks"] == {"evict": {"t": [3.0], "i": [0], "n": [4], "total": 1}}
    assert trace["queue"] == {"t": [1.0], "running": [1], "waiting": [2]}


def test_many_marks_are_thinned_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "MAX_MARKS", 10)
    process = {"ph": "M", "pid": 101, "name": "process_name", "args": {"name": "instance 0"}}
    events = [process, *({"ph": "i", "pid": 101, "tid": 4, "name": "pull", "ts": t} for t in range(25))]
    pulls = report_data.read_trace(events)["marks"]["pull"]
    assert pulls["total"] == 25
    assert len(pulls["t"]) == 9


def test_the_command_takes_the_folder_as_a_word() -> None:
    assert COMMANDS["report"].words == "folder"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; Debian's package is chromium")
def test_a_browser_draws_every_plot(folder: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    report(ReportOptions(folder=str(folder)))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=20000",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    page = (folder / "report.html").as_uri()
    done = subprocess.run([*command, page], capture_output=True, text=True, timeout=180, check=True)
    found = re.search(r'<html[^>]*data-drawn="(\d+)"', done.stdout)
    assert found is not None, "the page's script did not reach its end"
    # Plotly draws two layers per plot: attainment, two latencies, seed by seed, and two timelines with their queues.
    assert int(found[1]) >= 8
