"""vLLM where it is installed, and a table of what the random cases covered."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest

COUNTS = "fidelity"
"""Name under which a test leaves its counts in the report."""


@pytest.fixture(scope="session")
def vllm_core(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """:mod:`tests.fidelity.vllm_core` and a folder that describes a model. Importing vLLM takes some 15 s."""
    pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-env")
    from tests.fidelity import vllm_core

    vllm_core.quiet()
    return vllm_core


@pytest.fixture(scope="session")
def model_folder(vllm_core: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that describes a model without weights."""
    return vllm_core.make_model_folder(tmp_path_factory.mktemp("model"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Cases and steps by combination of options, and how many cases met each thing that can go on."""
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == COUNTS:
                for options, counts in value.items():
                    totals[options].update(counts)
    if not totals:
        return
    totals["all"] = sum(totals.values(), collections.Counter())
    columns = list(totals["all"])
    width = max(map(len, totals))
    terminalreporter.section("agreement with vLLM's scheduler: steps, all identical, and cases with ...")
    terminalreporter.write_line("  ".join([" " * width, *columns]))
    for options, counts in totals.items():
        row = [f"{counts[column]:{len(column)}}" for column in columns]
        terminalreporter.write_line("  ".join([f"{options:{width}}", *row]))
