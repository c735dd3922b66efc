"""The emulator passes the backend contract, and agrees with the engine that the oracle has checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlm_env.backends.base import Backend, EventKind
from qlm_env.backends.emulator.backend import EmulatorBackend
from qlm_env.backends.emulator.serve import serve
from qlm_env.cluster import make_cluster
from qlm_env.requests import make_request_table, reset_state
from tests.backends.conformance import BackendConformance
from tests.backends.toy_cluster import KV_BYTES_PER_TOKEN, WEIGHT_BYTES, toy_scenario
from tests.profiles.toy import toy_profile, write_profile


def toy_backend(folder: Path, num_gpu_blocks: int) -> EmulatorBackend:
    """Two instances as the conformance suite wants them; the time of a step depends on all that is in it."""
    write_profile(folder, toy_profile(num_gpu_blocks=num_gpu_blocks))
    instance = {
        "host_memory_gb": 2.5 * WEIGHT_BYTES / 1e9,
        "host_kv_gb": 119.5 * KV_BYTES_PER_TOKEN / 1e9,
    }
    scenario = toy_scenario(num_models=4, instances=[instance, instance], engine={"max_num_batched_tokens": 64})
    return EmulatorBackend(lambda: make_cluster(scenario.cluster, scenario.workload.models, folder))


class TestEmulator(BackendConformance):
    """With blocks for three long requests."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return toy_backend(tmp_path, 90)


@pytest.mark.parametrize("num_gpu_blocks", [35, 200])
def test_pulled_at_arrival_it_is_the_engine_alone(tmp_path: Path, num_gpu_blocks: int) -> None:
    """Requests pulled as they arrive finish when they do behind the engine's own queue, preempted or not."""
    rng = np.random.default_rng(num_gpu_blocks)
    n = 60
    requests = make_request_table(
        np.cumsum(rng.integers(0, 10, n)) / 100.0,
        rng.integers(1, 150, n),
        rng.integers(1, 150, n),
        np.zeros(n, int),
        np.zeros(n, int),
    )
    backend = toy_backend(tmp_path, num_gpu_blocks)
    backend.reset(requests)
    finished: list[int] = []
    arrived = 0
    while len(finished) < n:
        while arrived < n and requests["arrival_s"][arrived] <= backend.now_s:
            backend.pull(0, arrived)
            arrived += 1
        until_s = float(requests["arrival_s"][arrived]) if arrived < n else 1e6
        finished += [event.subject for event in backend.advance(until_s) if event.kind == EventKind.FINISHED]
    finish_s = requests["finish_s"].copy()
    preemptions = requests["preemptions"].copy()
    assert bool(preemptions.any()) == (num_gpu_blocks == 35)

    reset_state(requests)
    backend.reset(requests)
    serve(backend.fleet, requests, 0, np.inf)
    np.testing.assert_allclose(requests["finish_s"], finish_s, rtol=1e-9)
    assert requests["preemptions"].tolist() == preemptions.tolist()
