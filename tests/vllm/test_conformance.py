"""The backend contract on real vLLM servers."""

from __future__ import annotations

import pytest

from qlm_env.backends.base import Backend
from qlm_env.backends.vllm.backend import VllmBackend
from tests.backends.conformance import BackendConformance
from tests.vllm.real_cluster import BLOCK_SIZE


class TestRealServers(BackendConformance):
    """All tests share the servers; every reset brings them back to where they have to be."""

    poll_s = 0.03
    kv_granularity = BLOCK_SIZE
    random_runs = 1
    random_steps = 20

    @pytest.fixture
    def backend(self, cluster: VllmBackend) -> Backend:
        return cluster

    def close(self, backend: Backend) -> None:
        """The servers are stopped when the last test is over."""
