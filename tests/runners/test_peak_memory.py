"""Peak memory is a process's own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from runners.peak_memory import peak_bytes

MIB = 1 << 20


def peak_with(size_bytes: int) -> int:
    np.ones(size_bytes, np.uint8)
    return peak_bytes()


def test_what_a_process_had_and_gave_back_counts() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        little = pool.submit(peak_with, MIB).result()
        much = pool.submit(peak_with, 200 * MIB).result()
        later = pool.submit(peak_with, MIB).result()
    assert 190 * MIB < much - little < 260 * MIB
    assert later == much


def test_what_the_parent_had_does_not() -> None:
    np.ones(600 * MIB, np.uint8)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(peak_with, MIB).result() < 500 * MIB
