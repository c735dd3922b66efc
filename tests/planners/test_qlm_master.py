"""The SCIP master against exhaustive choice among the columns."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from planners.qlm.master import Column, solve_master


def random_columns(rng: np.random.Generator, num_groups: int, num_instances: int) -> tuple[list[Column], list[Column]]:
    """Columns of several random plans, and one of the plans."""
    columns: dict[tuple[int | None, tuple[int, ...]], Column] = {}
    start: list[Column] = []
    for _ in range(6):
        assignment = rng.integers(0, num_instances + 1, num_groups)
        start = []
        for i in range(num_instances):
            groups = tuple(int(g) for g in np.flatnonzero(assignment == i))
            if groups:
                start.append(
                    columns.setdefault((i, groups), Column(i, groups, float(rng.uniform(1, 20) * len(groups))))
                )
        for g in np.flatnonzero(assignment == num_instances):
            held = Column(None, (int(g),), float(rng.uniform(5, 30)))
            start.append(columns.setdefault((None, (int(g),)), held))
    return list(columns.values()), start


def cheapest_choice(columns: list[Column], num_groups: int) -> float:
    best = np.inf
    for size in range(1, num_groups + 1):
        for chosen in itertools.combinations(columns, size):
            groups = sorted(g for column in chosen for g in column.groups)
            instances = [column.instance for column in chosen if column.instance is not None]
            if groups == list(range(num_groups)) and len(set(instances)) == len(instances):
                best = min(best, sum(column.cost for column in chosen))
    return best


@pytest.mark.parametrize("seed", range(25))
def test_master_finds_the_cheapest_choice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns, start = random_columns(rng, 4, 2)
    result = solve_master(columns, 4, start, time_limit_s=5.0, node_limit=1000)
    assert result.optimal
    assert result.cost == pytest.approx(cheapest_choice(columns, 4))
    assert sorted(g for column in result.columns for g in column.groups) == list(range(4))


def test_a_stopped_solve_returns_at_least_the_start() -> None:
    rng = np.random.default_rng(1)
    columns, start = random_columns(rng, 30, 8)
    result = solve_master(columns, 30, start, time_limit_s=1e-6, node_limit=1)
    assert result.cost <= sum(column.cost for column in start) + 1e-9
    assert sorted(g for column in result.columns for g in column.groups) == list(range(30))


def test_the_time_limit_holds() -> None:
    rng = np.random.default_rng(2)
    columns = [
        Column(
            int(rng.integers(20)), tuple(sorted(rng.choice(60, 4, replace=False).tolist())), float(rng.uniform(1, 9))
        )
        for _ in range(4000)
    ]
    held = [Column(None, (g,), 9.0) for g in range(60)]
    begin = time.perf_counter()
    solve_master(columns + held, 60, held, time_limit_s=0.3, node_limit=10**6)
    # Building the model is outside SCIP's clock.
    assert time.perf_counter() - begin < 3.0
