"""The real cluster's backend passes the contract on stand-in servers, where everything but vLLM is real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlm_env.backends.base import Backend
from tests.backends.conformance import BackendConformance
from tests.backends.vllm.fake_provider import BLOCK_SIZE, FakeServers, fake_backend


class TestOnStandIns(BackendConformance):
    """With blocks for three long requests."""

    patience_s = 30.0
    kv_granularity = BLOCK_SIZE
    poll_s = 0.02
    random_runs = 2
    random_steps = 40

    @pytest.fixture
    def provider(self) -> FakeServers:
        return FakeServers()

    @pytest.fixture
    def backend(self, tmp_path: Path, provider: FakeServers) -> Iterator[Backend]:
        yield fake_backend(tmp_path, provider)
        assert not provider.now_running()
