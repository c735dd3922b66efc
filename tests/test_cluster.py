"""From a scenario to the arrays of an episode."""

from __future__ import annotations

import pytest

from qlm_env.cluster import make_failures
from qlm_env.spec import FailureSpec


@pytest.mark.parametrize(
    ("outages", "expected"),
    [
        ([], []),
        ([(5.0, 2.0)], [(5.0, 0, 0), (7.0, 0, 1)]),
        ([(5.0, 2.0), (0.0, 10.0)], [(0.0, 0, 0), (10.0, 0, 1)]),
        ([(0.0, 5.0), (5.0, 3.0)], [(0.0, 0, 0), (8.0, 0, 1)]),
        ([(0.0, 1.0), (2.0, 1.0)], [(0.0, 0, 0), (1.0, 0, 1), (2.0, 0, 0), (3.0, 0, 1)]),
    ],
)
def test_overlapping_failures_are_one(
    outages: list[tuple[float, float]], expected: list[tuple[float, int, int]]
) -> None:
    failures = tuple(FailureSpec(instance=0, at_s=at_s, duration_s=duration_s) for at_s, duration_s in outages)
    assert make_failures(failures).tolist() == expected


def test_failures_of_different_instances_stay_apart() -> None:
    failures = (FailureSpec(instance=1, at_s=1.0, duration_s=4.0), FailureSpec(instance=0, at_s=2.0, duration_s=1.0))
    assert make_failures(failures).tolist() == [(1.0, 1, 0), (2.0, 0, 0), (3.0, 0, 1), (5.0, 1, 1)]
