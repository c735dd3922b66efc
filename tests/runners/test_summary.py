"""The summary is a function of the rows, not of their order."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from runners.config import CompareConfig
from runners.results import EpisodeKey, make_row
from runners.summary import combined_hash, differences, summarise
from tests.runners import fakes


@pytest.fixture
def rows(configure: Callable[..., CompareConfig]) -> pd.DataFrame:
    config = configure("planner=[fcfs,edf]", "seeds=5")
    keys = [
        EpisodeKey(config.scenario, label, planner, seed)
        for label, planner in config.planners.items()
        for seed in config.options.seeds
    ]
    return pd.DataFrame(
        [make_row(key, fakes.episode(key.scenario, key.planner, key.seed, timeline=False)) for key in keys]
    )


def test_the_order_of_seeds_does_not_matter(rows: pd.DataFrame) -> None:
    fcfs, edf = summarise(rows)
    assert summarise(rows[::-1]) == [edf, fcfs]
    assert fcfs["seeds"] == [0, 1, 2, 3, 4]
    assert fcfs["slo_attainment"]["iqm"] == pytest.approx(0.52)
    assert fcfs["workload_hash"] == combined_hash([f"smoke-{seed}" for seed in range(5)])


def test_differences_are_paired_by_seed_with_the_first_planner(rows: pd.DataFrame) -> None:
    assert differences(rows) == {"edf": pytest.approx((0.1, 0.1, 0.1))}
    only_edf_1 = rows[(rows["planner"] == "fcfs") | (rows["seed"] == 1)]
    assert differences(only_edf_1) == {"edf": pytest.approx((0.1, 0.1, 0.1))}
    disjoint = rows[(rows["planner"] == "fcfs") == (rows["seed"] < 2)]
    assert differences(disjoint) == {}


def test_the_combined_hash_depends_on_every_seed_and_their_order() -> None:
    assert combined_hash(["a"]) == "a"
    assert len({combined_hash(hashes) for hashes in (["a", "b"], ["b", "a"], ["a", "c"], ["ab"])}) == 4
    assert len(combined_hash(["a", "b"])) == 16
