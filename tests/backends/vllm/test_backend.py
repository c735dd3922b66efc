"""What the backend of real servers does beyond the contract, on stand-ins: failures, reuse, waiting, keys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlm_env.backends.base import BackendEvent, EventKind
from qlm_env.backends.emulator.state import GPU, HOST, STORAGE
from qlm_env.backends.vllm.backend import WARM_UP_SALT, VllmBackend
from qlm_env.backends.vllm.errors import RequestRefused, ServerError
from qlm_env.backends.vllm.instance import Patience
from qlm_env.requests import FINISHED, NOWHERE, WAITING
from tests.backends.conformance import make_requests
from tests.backends.vllm.fake_provider import BLOCK_SIZE, FakeServers, fake_backend

SHORT = Patience(hang_s=1.0, first_retry_s=0.1)


@pytest.fixture
def provider() -> FakeServers:
    return FakeServers()


@pytest.fixture
def backend(tmp_path: Path, provider: FakeServers) -> Iterator[VllmBackend]:
    backend = fake_backend(tmp_path, provider, SHORT)
    yield backend
    backend.close()


def wait_for(
    backend: VllmBackend, kind: EventKind, subject: int = NOWHERE, seconds: float = 20.0
) -> list[BackendEvent]:
    """Everything told up to the first event of this kind and subject."""
    told: list[BackendEvent] = []
    deadline_s = backend.now_s + seconds
    while not any((event.kind, event.subject) == (kind, subject) for event in told):
        assert backend.now_s < deadline_s, f"no {kind.name} {subject} in {told}"
        told += backend.advance(deadline_s)
    return told


def wait_for_tokens(backend: VllmBackend, request: int, tokens: int = 1) -> None:
    while backend.requests["generated_tokens"][request] < tokens:
        backend.advance(backend.now_s + 0.01)


def asked(provider: FakeServers) -> list[dict[str, Any]]:
    """The completions that the first instance's model 0 was asked for, but the one that tries it out."""
    return [body for body in provider.running[0, 0].server.bodies if body["cache_salt"] != WARM_UP_SALT]


def residency(backend: VllmBackend, instance: int = 0) -> list[int]:
    return backend.fleet.placement["residency"][instance].tolist()


# --------------------------------------------------------------------------- while nobody looks
def test_what_happens_between_two_calls_is_told_with_its_time(backend: VllmBackend) -> None:
    """The engine goes on while a policy thinks: the batch is filled up, and times are when things happened."""
    requests = make_requests(*[(10, 30)] * 6)
    backend.reset(requests)
    for r in range(6):
        backend.pull(0, r)
    time.sleep(1.5)
    assert (requests["state"] == WAITING).all(), "the arrays ran ahead of the events"
    events = backend.advance(backend.now_s + 10.0)
    assert sorted(event.subject for event in events) == list(range(6))
    assert [event.time_s for event in events] == sorted(event.time_s for event in events)
    assert events[-1].time_s < 1.0
    late = requests["first_scheduled_s"][4:]
    assert (late >= requests["finish_s"][:4].min()).all()
    assert (late < 0.7).all()


def test_engine_queue_is_by_class_under_the_priority_policy(tmp_path: Path) -> None:
    provider = FakeServers()
    backend = fake_backend(tmp_path, provider, scheduling_policy="priority")
    try:
        requests = make_requests(*[(10, 60)] * 4, (10, 5), (10, 5))
        requests["slo_class"][4] = 1
        backend.reset(requests)
        for r in range(6):
            backend.pull(0, r)
        assert backend.fleet.engine["queue_head"][0] == 0
        wait_for(backend, EventKind.FINISHED, 4)
        assert requests["first_scheduled_s"][5] < requests["first_scheduled_s"][4]
        assert sorted(body.get("priority", 0) for body in asked(provider)) == [0] * 5 + [1]
    finally:
        backend.close()


# --------------------------------------------------------------------------- KV
def test_resumed_requests_send_what_they_have_under_a_salt_that_tells_kept_from_dropped(
    backend: VllmBackend, provider: FakeServers
) -> None:
    requests = make_requests((50, 200))
    backend.reset(requests)
    backend.pull(0, 0)
    for keep_kv in (True, False):
        wait_for_tokens(backend, 0, int(requests["generated_tokens"][0]) + 5)
        backend.evict(0, [0], keep_kv)
        wait_for(backend, EventKind.RETURNED, 0)
        backend.pull(0, 0)
    wait_for(backend, EventKind.FINISHED, 0)
    first, kept, dropped = asked(provider)
    for body in (kept, dropped):
        assert body["prompt"][:50] == first["prompt"]
        assert len(body["prompt"]) + body["max_tokens"] == 250
    assert first["cache_salt"] == kept["cache_salt"] != dropped["cache_salt"]


def test_kv_that_the_server_has_lost_is_counted_as_recomputed(backend: VllmBackend, provider: FakeServers) -> None:
    requests = make_requests((50, 200))
    backend.reset(requests)
    backend.pull(0, 0)
    wait_for_tokens(backend, 0, 5)
    backend.evict(0, [0], keep_kv=True)
    wait_for(backend, EventKind.RETURNED, 0)
    kept = int(requests["computed_tokens"][0])
    server = provider.running[0, 0].server
    assert server.aborted.wait(5.0)
    server.cached.clear()
    backend.pull(0, 0)
    wait_for(backend, EventKind.FINISHED, 0)
    assert requests["recomputed_tokens"][0] == kept


def test_kept_kv_that_is_dropped_elsewhere_makes_room(backend: VllmBackend) -> None:
    requests = make_requests((61, 100), (61, 100))
    backend.reset(requests)
    for r in (0, 1):
        backend.pull(0, r)
        wait_for_tokens(backend, r, 1)
        backend.evict(0, [r], keep_kv=True)
        wait_for(backend, EventKind.RETURNED, r)
        assert requests["kv_host"][r] == 0
        assert backend.fleet.engine["host_kv_used_bytes"][0] > 0
        backend.pull(1, r)
        assert backend.fleet.engine["host_kv_used_bytes"][0] == 0
    while (requests["state"] != FINISHED).any():
        backend.advance(backend.now_s + 10.0)


def test_kv_is_stored_at_every_length(tmp_path: Path) -> None:
    """Also where the connector finds another entry than it reads, and beside the one of all short prompts."""
    provider = FakeServers(kv_store=tmp_path / "kv")
    backend = fake_backend(tmp_path, provider, SHORT)
    try:
        lengths = [(n, 60) for n in range(BLOCK_SIZE - 2, 2 * BLOCK_SIZE + 4)]
        requests = make_requests((3, 2), *lengths)
        backend.reset(requests)
        backend.pull(0, 0)
        wait_for(backend, EventKind.FINISHED, 0)
        for r in range(1, len(requests)):
            backend.pull(0, r)
            wait_for_tokens(backend, r, 2)
            backend.evict(0, [r], keep_kv=True)
            wait_for(backend, EventKind.RETURNED, r)
            tokens = requests["prompt_tokens"][r] + requests["generated_tokens"][r]
            assert requests["kv_host"][r] == (0 if tokens > BLOCK_SIZE + 1 else NOWHERE)
            dropped = int(requests["recomputed_tokens"][r])
            backend.pull(0, r)
            wait_for(backend, EventKind.FINISHED, r)
            assert 0 <= requests["recomputed_tokens"][r] - dropped <= BLOCK_SIZE
        assert requests["generated_tokens"].tolist() == requests["output_tokens"].tolist()
    finally:
        backend.close()


def test_kept_kv_is_lost_when_its_model_leaves_the_gpu(backend: VllmBackend) -> None:
    requests = make_requests((50, 200))
    backend.reset(requests)
    backend.pull(0, 0)
    wait_for_tokens(backend, 0, 5)
    backend.evict(0, [0], keep_kv=True)
    wait_for(backend, EventKind.RETURNED, 0)
    kept = int(requests["computed_tokens"][0])
    backend.swap_model(0, 1)
    assert requests["kv_host"][0] == NOWHERE
    assert requests["recomputed_tokens"][0] == kept
    assert backend.fleet.engine["host_kv_used_bytes"][0] == 0


def test_kv_in_a_store_outlives_a_swap_and_dropped_kv_leaves_it(tmp_path: Path) -> None:
    provider = FakeServers(kv_store=tmp_path / "kv")
    backend = fake_backend(tmp_path, provider, SHORT)
    try:
        requests = make_requests((50, 200), (50, 200), (50, 200))
        backend.reset(requests)
        for r in range(3):
            backend.pull(0, r)
            wait_for_tokens(backend, r, 5)
        backend.evict(0, [0], keep_kv=True)
        backend.evict(0, [1, 2], keep_kv=False)
        for r in range(3):
            if requests["instance"][r] != NOWHERE:
                wait_for(backend, EventKind.RETURNED, r)
        store = provider.running[0, 0].kv_store
        assert store is not None
        assert requests["kv_host"].tolist() == [0, NOWHERE, NOWHERE]
        assert 1 <= len(list(store.iterdir())) <= 2
        backend.swap_model(0, 1)
        wait_for(backend, EventKind.MODEL_READY, 1)
        assert requests["kv_host"][0] == 0
        backend.swap_model(0, 0)
        wait_for(backend, EventKind.MODEL_READY, 0)
        provider.running[0, 0].server.cached.clear()
        dropped = requests["recomputed_tokens"].copy()
        for r in range(3):
            backend.pull(0, r)
        while (requests["state"] != FINISHED).any():
            backend.advance(backend.now_s + 10.0)
        assert requests["recomputed_tokens"][0] <= BLOCK_SIZE
        assert (requests["recomputed_tokens"][1:] == dropped[1:]).all()
        assert list(store.iterdir()) == []
        assert backend.fleet.engine["host_kv_used_bytes"][0] == 0
    finally:
        backend.close()


def test_prompts_are_new_to_the_servers_in_every_episode(backend: VllmBackend, provider: FakeServers) -> None:
    requests = make_requests((50, 2))
    for _ in range(2):
        backend.reset(requests)
        backend.pull(0, 0)
        wait_for(backend, EventKind.FINISHED, 0)
    first, second = asked(provider)
    assert first["prompt"] == second["prompt"]
    assert first["cache_salt"] != second["cache_salt"]


# --------------------------------------------------------------------------- failures
def test_a_dead_server_returns_its_requests_and_the_instance_comes_back_by_itself(
    backend: VllmBackend, provider: FakeServers
) -> None:
    requests = make_requests(*[(10, 200)] * 6)
    backend.reset(requests)
    for r in range(6):
        backend.pull(0, r)
    wait_for_tokens(backend, 0, 3)
    provider.running[0, 0].server.die()
    told = wait_for(backend, EventKind.UP)
    assert [event.kind for event in told[-2:]] == [EventKind.DOWN, EventKind.UP]
    assert sorted(event.subject for event in told if event.kind == EventKind.RETURNED) == list(range(6))
    assert (requests["state"] == WAITING).all()
    assert (requests["generated_tokens"][:4] >= 3).all()
    assert (requests["recomputed_tokens"][:4] == 10 + requests["generated_tokens"][:4] - 1).all()
    assert backend.fleet.engine["up"][0] == 1
    assert residency(backend) == [STORAGE] * 4
    assert provider.now_running() == {(1, 0)}
    backend.swap_model(0, 0)
    wait_for(backend, EventKind.MODEL_READY, 0)
    for r in range(6):
        backend.pull(r % 2, r)
    while (requests["state"] != FINISHED).any():
        backend.advance(backend.now_s + 10.0)
    assert (requests["generated_tokens"] == 200).all()


def test_a_server_that_dies_idle_is_noticed(backend: VllmBackend, provider: FakeServers) -> None:
    backend.reset(make_requests((10, 5)))
    provider.running[1, 0].server.die()
    assert wait_for(backend, EventKind.DOWN)[-1].instance == 1


@pytest.mark.parametrize("busy", [True, False])
def test_a_hung_server_is_killed(backend: VllmBackend, provider: FakeServers, busy: bool) -> None:
    requests = make_requests((10, 400))
    backend.reset(requests)
    if busy:
        backend.pull(0, 0)
        wait_for_tokens(backend, 0)
    hung = provider.running[0, 0]
    hung.server.hung = True
    wait_for(backend, EventKind.UP)
    assert hung.stopped
    assert hung.killed
    assert requests["instance"][0] == NOWHERE


def test_a_failing_instance_is_tried_less_and_less_often(backend: VllmBackend, provider: FakeServers) -> None:
    backend.reset(make_requests((10, 5)))
    provider.refuse = {1}
    pauses_s = []
    for _ in range(3):
        backend.swap_model(0, 1)
        down, up = (wait_for(backend, kind)[-1] for kind in (EventKind.DOWN, EventKind.UP))
        pauses_s.append(up.time_s - down.time_s)
    assert pauses_s[1] > 1.5 * pauses_s[0]
    assert pauses_s[2] > 1.5 * pauses_s[1]
    provider.refuse = set()
    backend.swap_model(0, 1)
    wait_for(backend, EventKind.MODEL_READY, 1)


def test_a_warm_start_that_fails_frees_its_memory_and_nothing_else_happens(
    backend: VllmBackend, provider: FakeServers
) -> None:
    backend.reset(make_requests((10, 5)))
    provider.refuse = {2}
    backend.warm_start(0, 2)
    assert backend.advance(backend.now_s + 0.5) == []
    engine = backend.fleet.engine[0]
    assert (engine.up, engine.active_model, engine.stage_target, engine.host_used_bytes) == (1, 0, NOWHERE, 0.0)
    backend.warm_start(0, 1)
    wait_for(backend, EventKind.WARM_READY, 1)


def test_a_warm_model_whose_server_dies_is_in_storage_again(backend: VllmBackend, provider: FakeServers) -> None:
    backend.reset(make_requests((10, 5)))
    backend.warm_start(0, 1)
    wait_for(backend, EventKind.WARM_READY, 1)
    assert provider.running[0, 1].server.asleep
    provider.running[0, 1].server.die()
    assert backend.advance(backend.now_s + 2.5) == []
    assert residency(backend) == [GPU, STORAGE, STORAGE, STORAGE]
    assert backend.fleet.engine["host_used_bytes"][0] == 0
    backend.swap_model(0, 1)
    wait_for(backend, EventKind.MODEL_READY, 1)
    assert backend.fleet.engine["cold_starts"][0] == 1


def test_a_request_that_servers_refuse_ends_the_run_with_their_reason(
    backend: VllmBackend, provider: FakeServers
) -> None:
    backend.reset(make_requests((10, 50)))
    provider.running[0, 0].server.max_model_len = 20
    backend.pull(0, 0)
    with pytest.raises(RequestRefused, match="maximum context length is 20"):
        wait_for(backend, EventKind.FINISHED, 0)


# --------------------------------------------------------------------------- servers
def test_reset_keeps_what_runs_where_it_is_wanted(backend: VllmBackend, provider: FakeServers) -> None:
    requests = make_requests((10, 400))
    backend.reset(requests)
    backend.pull(1, 0)
    backend.swap_model(0, 1)
    wait_for(backend, EventKind.MODEL_READY, 1)
    backend.reset(requests)
    assert provider.started == [(0, 0), (1, 0), (0, 1)]
    assert provider.now_running() == {(0, 0), (1, 0)}
    assert residency(backend) == [GPU, STORAGE, STORAGE, STORAGE]
    assert not provider.running[0, 0].server.asleep


def test_servers_that_cannot_be_stopped_sleep(tmp_path: Path) -> None:
    provider = FakeServers(can_stop=False)
    backend = fake_backend(tmp_path, provider, SHORT)
    try:
        backend.reset(make_requests((10, 5)))
        for model in (1, 2, 3):
            backend.warm_start(0, model)
            wait_for(backend, EventKind.WARM_READY, model)
        assert residency(backend) == [GPU, STORAGE, HOST, HOST]
        assert provider.now_running() == {(i, m) for i in range(2) for m in range(4)}
        assert len(provider.started) == 8
        assert [provider.running[0, m].server.asleep for m in range(4)] == [False, True, True, True]
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"block_size": 32}, r"serves m0 with block_size 32; the cluster's configuration needs 16$"),
        ({"num_gpu_blocks": 80}, r"serves m0 with num_gpu_blocks 79; the cluster's configuration needs 89$"),
        ({"max_model_len": 100}, r"serves m0 with max_model_len 100; the cluster's configuration needs 512$"),
    ],
)
def test_a_server_with_too_little_room_is_refused(tmp_path: Path, sizes: dict[str, int], reason: str) -> None:
    provider = FakeServers(**sizes)
    backend = fake_backend(tmp_path, provider, SHORT)
    try:
        with pytest.raises(ServerError, match=reason):
            backend.reset(make_requests((10, 5)))
    finally:
        backend.close()
    assert not provider.now_running()
