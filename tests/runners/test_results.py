"""Rows and their identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from planners.spec import parse_planner
from runners import results
from runners.config import CompareConfig
from runners.results import EpisodeKey
from tests.runners import fakes


def test_everything_that_decides_the_numbers_is_in_the_key(
    configure: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = configure().scenario
    fcfs, edf = parse_planner("fcfs", {}), parse_planner("edf", {})
    key = EpisodeKey(scenario, "fcfs", fcfs, 0)
    assert key.digest == EpisodeKey(configure().scenario, "fcfs", parse_planner("fcfs", {}), 0).digest
    others = [
        EpisodeKey(configure("workload.num_requests=9").scenario, "fcfs", fcfs, 0),
        EpisodeKey(scenario, "fcfs", edf, 0),
        EpisodeKey(scenario, "again", fcfs, 0),
        EpisodeKey(scenario, "fcfs", fcfs, 1),
    ]
    digests = {key.digest, *(other.digest for other in others)}
    monkeypatch.setattr(results, "code_version", lambda: "other code")
    digests.add(key.digest)
    assert len(digests) == 6


def test_profiles_of_ones_own_are_in_the_key(configure: Callable[..., CompareConfig], tmp_path: Path) -> None:
    scenario = configure(f"cluster.profile_folder={tmp_path}").scenario
    key = EpisodeKey(scenario, "fcfs", parse_planner("fcfs", {}), 0)
    digests = {key.digest}
    for text in ("a", "b"):
        (tmp_path / "cpu_tiny_tp1.yaml").write_text(text)
        digests.add(key.digest)
    assert len(digests) == 3


def test_the_code_version_is_a_function_of_the_files() -> None:
    first = results.code_version()
    results.code_version.cache_clear()
    assert results.code_version() == first
    assert len(first) == 12


def test_a_row_survives_its_file(configure: Callable[..., CompareConfig], tmp_path: Path) -> None:
    config = configure()
    planner = config.planners["edf"]
    key = EpisodeKey(config.scenario, "edf", planner, 2)
    row = results.make_row(key, fakes.episode(config.scenario, planner, 2, timeline=False))
    path = key.row_path(tmp_path)
    results.write_row(path, row)
    read = results.read_row(path)
    assert read is not None
    assert str(read) == str(row)  # as text, since the NaN of an empty class is not equal to itself
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "row.parquet"
    results.write_row(path, {"a": 1})
    with pytest.raises(pa.ArrowInvalid):
        results.write_row(path, {"a": object()})
    assert results.read_row(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", None])
def test_what_is_no_row_is_no_row(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "row.parquet"
    if content is not None:
        path.write_bytes(content)
    assert results.read_row(path) is None
