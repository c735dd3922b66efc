"""The backend contract as tests. A backend passes it by a subclass of :class:`BackendConformance`.

The subclass has a pytest fixture ``backend``: a backend, before its first ``reset``, of

- two instances alike and four models, all of which fit both; model 0 is on both GPUs, the others in storage;
- engines of 4 batch slots (``max_num_seqs``), FCFS, with KV blocks for 4 requests of 128 tokens and more;
- host memory for the weights of two models, not of three, per instance;
- host KV memory for one request of 120 tokens, not for two of 60, per instance;
- models that take requests of up to 512 tokens.

Nothing here knows how long anything takes, so that the suite runs on wall-clock time as well; a backend
on which 200 tokens take less than ``poll_s`` or a cold start longer than ``patience_s`` sets these. One whose
fixture outlives a test, as starting it takes long, overrides ``close``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from qlm_env.backends.base import Backend, BackendError, BackendEvent, EventKind
from qlm_env.backends.emulator.engine import slot_generated_tokens
from qlm_env.backends.emulator.state import GPU, HOST, STORAGE
from qlm_env.requests import FINISHED, NOWHERE, PENDING, RUNNING, WAITING, RequestTable, make_request_table

DOWN, FINISHED_EVENT, MODEL_READY = EventKind.DOWN, EventKind.FINISHED, EventKind.MODEL_READY
RETURNED, UP, WARM_READY = EventKind.RETURNED, EventKind.UP, EventKind.WARM_READY

MAX_NUM_SEQS = 4


def make_requests(*lengths: tuple[int, int], model: int = 0) -> RequestTable:
    """Requests of (prompt, output) tokens that arrived at time 0."""
    prompt, output = (np.array(column) for column in zip(*lengths, strict=True))
    n = len(lengths)
    return make_request_table(np.zeros(n), prompt, output, np.full(n, model), np.zeros(n, int))


def generated_tokens(backend: Backend, request: int) -> int:
    """Output so far, also of a request in a batch."""
    instance = int(backend.requests["instance"][request])
    if backend.requests["state"][request] == RUNNING:
        for slot in range(int(backend.fleet.engine["num_running"][instance])):
            if backend.fleet.slot["request"][instance, slot] == request:
                return int(slot_generated_tokens(backend.fleet, backend.requests, instance, slot))
    return int(backend.requests["generated_tokens"][request])


class BackendConformance:
    """What every backend must do."""

    poll_s = 0.05
    """How long to wait between two looks at the arrays."""
    patience_s = 300.0
    """How long to wait for anything at all."""
    kv_granularity = 1
    """Kept KV comes back in whole blocks of so many tokens."""
    random_runs = 5
    random_steps = 200
    """Of each run of arbitrary commands."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "seed" in metafunc.fixturenames:
            metafunc.parametrize("seed", range(self.random_runs))

    # ------------------------------------------------------------------- helpers
    def until(self, backend: Backend, *wanted: tuple[EventKind, int]) -> list[BackendEvent]:
        """Let time pass until all of the wanted (kind, subject) were told; returns every event up to then."""
        missing = set(wanted)
        events: list[BackendEvent] = []
        deadline_s = backend.now_s + self.patience_s
        while missing:
            assert backend.now_s < deadline_s, f"waited in vain for {missing}"
            news = backend.advance(deadline_s)
            events += news
            missing -= {(event.kind, event.subject) for event in news}
        return events

    def until_generated(self, backend: Backend, request: int, tokens: int) -> None:
        """Let time pass until a running request has at least so many tokens, but has not finished."""
        deadline_s = backend.now_s + self.patience_s
        while generated_tokens(backend, request) < tokens:
            assert backend.now_s < deadline_s
            backend.advance(backend.now_s + self.poll_s)
        assert backend.requests["state"][request] == RUNNING

    def quietly(self, backend: Backend, seconds: float) -> None:
        """Let time pass in which nothing may happen."""
        assert backend.advance(backend.now_s + seconds) == []

    def finish_all(self, backend: Backend, *requests: int) -> list[BackendEvent]:
        return self.until(backend, *((FINISHED_EVENT, request) for request in requests))

    def evict(self, backend: Backend, instance: int, requests: list[int], keep_kv: bool) -> None:
        """Evict and wait until they have left."""
        backend.evict(instance, requests, keep_kv)
        self.until(backend, *((RETURNED, request) for request in requests))

    def swap(self, backend: Backend, instance: int, model: int) -> float:
        """Swap and wait; returns how long it took."""
        before_s = backend.now_s
        backend.swap_model(instance, model)
        (event,) = self.until(backend, (MODEL_READY, model))
        assert event.instance == instance
        return event.time_s - before_s

    def warm(self, backend: Backend, instance: int, model: int) -> None:
        backend.warm_start(instance, model)
        self.until(backend, (WARM_READY, model))

    def residency(self, backend: Backend, instance: int) -> list[int]:
        return [int(value) for value in backend.fleet.placement["residency"][instance]]

    def close(self, backend: Backend) -> None:
        backend.close()
        backend.close()

    def assert_restored(self, backend: Backend, request: int) -> None:
        """Nothing of its kept KV was computed again, but what is less than a whole block."""
        assert 0 <= backend.requests["recomputed_tokens"][request] < self.kv_granularity

    @pytest.fixture(autouse=True)
    def _closed_afterwards(self, backend: Backend) -> Iterator[None]:
        yield
        self.close(backend)

    # ------------------------------------------------------------------- reset
    def test_starts_empty_and_starts_over(self, backend: Backend) -> None:
        requests = make_requests((20, 200), (20, 200))
        for _ in range(2):
            backend.reset(requests)
            assert 0.0 <= backend.now_s < 1.0
            assert backend.requests is requests
            assert (requests["state"] == PENDING).all()
            assert backend.fleet.engine["up"].tolist() == [1, 1]
            assert backend.fleet.engine["active_model"].tolist() == [0, 0]
            assert backend.fleet.engine["num_running"].tolist() == [0, 0]
            assert self.residency(backend, 0) == [GPU, STORAGE, STORAGE, STORAGE]
            backend.pull(0, 0)
            self.until_generated(backend, 0, 1)
            backend.warm_start(0, 1)
            backend.fail(1)

    # ------------------------------------------------------------------- running requests
    def test_pulled_requests_run_to_exactly_their_tokens(self, backend: Backend) -> None:
        requests = make_requests((30, 1), (1, 2), (17, 64))
        backend.reset(requests)
        for r in range(3):
            assert backend.has_room(0, r)
            backend.pull(0, r)
            assert requests["instance"][r] == 0
        events = self.finish_all(backend, 0, 1, 2)
        assert sorted(event.subject for event in events) == [0, 1, 2]
        assert {event.kind for event in events} == {FINISHED_EVENT}
        assert requests["generated_tokens"].tolist() == [1, 2, 64]
        assert (requests["state"] == FINISHED).all()
        assert (requests["instance"] == NOWHERE).all()
        for event in events:
            request = requests[event.subject]
            assert event.instance == 0
            assert event.time_s == request.finish_s
            assert 0.0 <= request.first_scheduled_s < request.first_token_s <= request.finish_s
        assert requests["first_token_s"][0] == requests["finish_s"][0]
        assert requests["first_token_s"][2] < requests["finish_s"][2]
        assert requests["recomputed_tokens"].sum() == 0
        assert backend.fleet.engine["num_running"][0] == 0

    def test_batch_holds_no_more_than_its_slots(self, backend: Backend) -> None:
        requests = make_requests(*[(10, 200 + 10 * k) for k in range(MAX_NUM_SEQS + 2)])
        backend.reset(requests)
        for r in range(MAX_NUM_SEQS):
            assert backend.has_room(0, r)
            backend.pull(0, r)
        for r in (MAX_NUM_SEQS, MAX_NUM_SEQS + 1):
            assert not backend.has_room(0, r)
            backend.pull(0, r)
        self.until_generated(backend, 0, 1)
        assert backend.fleet.engine["num_running"][0] == MAX_NUM_SEQS
        assert backend.fleet.engine["queue_length"][0] == 2
        batch = backend.fleet.slot["request"][0, :MAX_NUM_SEQS].tolist()
        assert batch == list(range(MAX_NUM_SEQS)), "not first come first served"
        assert requests["state"].tolist() == [RUNNING] * MAX_NUM_SEQS + [WAITING] * 2
        while (requests["state"] != FINISHED).any():
            backend.advance(backend.now_s + self.patience_s)
            assert backend.fleet.engine["num_running"][0] <= MAX_NUM_SEQS
        first_finish_s = requests["finish_s"].min()
        assert (requests["first_scheduled_s"][MAX_NUM_SEQS:] >= first_finish_s).all()

    def test_no_room_for_what_does_not_fit_the_blocks(self, backend: Backend) -> None:
        """Room is counted in blocks as well, those of requests that still wait in the engine included."""
        backend.reset(make_requests(*[(400, 20)] * MAX_NUM_SEQS))
        num_blocks = int(backend.fleet.placement["num_blocks"][0, 0])
        assert backend.fleet.engine["free_blocks"][0] == num_blocks
        together = num_blocks // -(-400 // backend.fleet.block_size)
        if together >= MAX_NUM_SEQS:
            pytest.skip("this backend's KV cache holds a full batch of long requests")
        for r in range(together):
            assert backend.has_room(0, r)
            backend.pull(0, r)
        assert not backend.has_room(0, together)

    def test_instances_run_side_by_side(self, backend: Backend) -> None:
        requests = make_requests((10, 200), (10, 200))
        backend.reset(requests)
        backend.pull(0, 0)
        backend.pull(1, 1)
        self.until_generated(backend, 0, 1)
        self.until_generated(backend, 1, 1)
        assert requests["instance"].tolist() == [0, 1]
        self.finish_all(backend, 0, 1)

    def test_pull_refuses_what_cannot_run(self, backend: Backend) -> None:
        requests = make_requests((10, 200), (10, 20), (2000, 20))
        requests["model"][1] = 1
        backend.reset(requests)
        backend.pull(0, 0)
        refused = {"other model": (0, 1), "too long": (0, 2), "in an engine": (1, 0), "again": (0, 0)}
        for instance, request in refused.values():
            assert not backend.has_room(instance, request)
            with pytest.raises(BackendError):
                backend.pull(instance, request)
        self.finish_all(backend, 0)
        with pytest.raises(BackendError):
            backend.pull(0, 0)
        assert not backend.has_room(0, 0)

    def test_indices_are_checked(self, backend: Backend) -> None:
        backend.reset(make_requests((10, 20)))
        for instance in (-1, 2):
            for call in (backend.fail, backend.recover):
                with pytest.raises(BackendError):
                    call(instance)
            with pytest.raises(BackendError):
                backend.pull(instance, 0)
            with pytest.raises(BackendError):
                backend.evict(instance, [], keep_kv=False)
        for request in (-1, 1):
            with pytest.raises(BackendError):
                backend.has_room(0, request)
            with pytest.raises(BackendError):
                backend.evict(0, [request], keep_kv=False)
        for model in (-1, 4):
            with pytest.raises(BackendError):
                backend.swap_model(0, model)
            with pytest.raises(BackendError):
                backend.warm_start(0, model)

    # ------------------------------------------------------------------- eviction
    def test_kept_kv_is_restored_not_recomputed(self, backend: Backend) -> None:
        requests = make_requests((50, 200), (50, 300))
        backend.reset(requests)
        backend.pull(0, 0)
        backend.pull(0, 1)
        self.until_generated(backend, 0, 5)
        before = generated_tokens(backend, 0)
        self.evict(backend, 0, [0], keep_kv=True)
        tokens = int(requests["generated_tokens"][0])
        assert 5 <= before <= tokens < 200
        assert requests["state"].tolist() == [WAITING, RUNNING]
        assert requests["instance"].tolist() == [NOWHERE, 0]
        assert requests["kv_host"].tolist() == [0, NOWHERE]
        # The KV of the last token is not there before it is fed back.
        assert requests["computed_tokens"][0] == 50 + tokens - 1
        kept_bytes = (50 + tokens - 1) * backend.fleet.placement["kv_bytes_per_token"][0, 0]
        assert backend.fleet.engine["host_kv_used_bytes"][0] == kept_bytes
        first_token_s = float(requests["first_token_s"][0])

        backend.pull(0, 0)
        self.finish_all(backend, 0, 1)
        assert requests["generated_tokens"].tolist() == [200, 300]
        assert requests["first_token_s"][0] == first_token_s
        self.assert_restored(backend, 0)
        assert requests["recomputed_tokens"][1] == 0
        assert requests["evictions"].tolist() == [1, 0]
        assert backend.fleet.engine["evictions"][0] == 1
        assert backend.fleet.engine["host_kv_used_bytes"][0] == 0
        assert backend.fleet.engine["kv_swapped_bytes"][0] == 2 * kept_bytes

    def test_dropped_kv_is_recomputed_and_tokens_are_kept(self, backend: Backend) -> None:
        requests = make_requests((50, 200))
        backend.reset(requests)
        backend.pull(0, 0)
        self.until_generated(backend, 0, 5)
        self.evict(backend, 0, [0], keep_kv=False)
        tokens = int(requests["generated_tokens"][0])
        assert 5 <= tokens < 200
        assert requests["kv_host"][0] == NOWHERE
        assert requests["computed_tokens"][0] == 0
        assert requests["recomputed_tokens"][0] == 50 + tokens - 1
        backend.pull(1, 0)
        self.finish_all(backend, 0)
        assert requests["generated_tokens"][0] == 200
        assert requests["recomputed_tokens"][0] == 50 + tokens - 1
        assert backend.fleet.engine["kv_swapped_bytes"].sum() == 0

    def test_host_kv_memory_is_a_limit(self, backend: Backend) -> None:
        """Of two requests of which host memory holds one, one is kept, and the other dropped and counted."""
        requests = make_requests((60, 200), (60, 200))
        backend.reset(requests)
        backend.pull(0, 0)
        backend.pull(0, 1)
        self.until_generated(backend, 0, 1)
        self.until_generated(backend, 1, 1)
        self.evict(backend, 0, [0, 1], keep_kv=True)
        (kept,) = np.flatnonzero(requests["kv_host"] == 0)
        dropped = 1 - kept
        engine = backend.fleet.engine[0]
        assert 0 < engine.host_kv_used_bytes <= engine.host_kv_bytes
        assert requests["recomputed_tokens"][kept] == 0
        assert requests["recomputed_tokens"][dropped] == 60 + requests["generated_tokens"][dropped] - 1
        for r in (0, 1):
            backend.pull(0, r)
        self.finish_all(backend, 0, 1)
        assert backend.fleet.engine["host_kv_used_bytes"][0] == 0

    def test_kept_kv_does_not_travel(self, backend: Backend) -> None:
        requests = make_requests((50, 200))
        backend.reset(requests)
        backend.pull(0, 0)
        self.until_generated(backend, 0, 5)
        self.evict(backend, 0, [0], keep_kv=True)
        computed = int(requests["computed_tokens"][0])
        backend.pull(1, 0)
        self.finish_all(backend, 0)
        assert requests["recomputed_tokens"][0] == computed
        assert requests["generated_tokens"][0] == 200
        assert backend.fleet.engine["host_kv_used_bytes"].tolist() == [0, 0]

    def test_kept_kv_can_be_dropped(self, backend: Backend) -> None:
        requests = make_requests((50, 200))
        backend.reset(requests)
        backend.drop_kv(0)
        assert requests["recomputed_tokens"][0] == 0, "dropped what was not there"
        backend.pull(0, 0)
        self.until_generated(backend, 0, 5)
        with pytest.raises(BackendError):
            backend.drop_kv(0)
        self.evict(backend, 0, [0], keep_kv=True)
        computed = int(requests["computed_tokens"][0])
        backend.drop_kv(0)
        assert requests["kv_host"][0] == NOWHERE
        assert requests["computed_tokens"][0] == 0
        assert backend.fleet.engine["host_kv_used_bytes"][0] == 0
        backend.pull(0, 0)
        self.finish_all(backend, 0)
        assert requests["recomputed_tokens"][0] == computed
        assert requests["generated_tokens"][0] == 200

    def test_requests_still_waiting_in_the_engine_can_be_evicted(self, backend: Backend) -> None:
        requests = make_requests(*[(10, 250)] * (MAX_NUM_SEQS + 3))
        backend.reset(requests)
        for r in range(MAX_NUM_SEQS + 3):
            backend.pull(0, r)
        self.until_generated(backend, 0, 1)
        self.evict(backend, 0, [1, MAX_NUM_SEQS + 1], keep_kv=False)
        assert requests["instance"][1] == requests["instance"][MAX_NUM_SEQS + 1] == NOWHERE
        assert requests["generated_tokens"][MAX_NUM_SEQS + 1] == 0
        others = [r for r in range(MAX_NUM_SEQS + 3) if r not in (1, MAX_NUM_SEQS + 1)]
        self.finish_all(backend, *others)
        late = requests["first_scheduled_s"][[MAX_NUM_SEQS, MAX_NUM_SEQS + 2]]
        assert late[0] <= late[1], "the engine's queue lost its order"
        assert math.isnan(requests["first_scheduled_s"][MAX_NUM_SEQS + 1])

    def test_evict_refuses_what_is_not_there(self, backend: Backend) -> None:
        requests = make_requests((10, 200), (10, 200))
        backend.reset(requests)
        backend.pull(0, 0)
        self.until_generated(backend, 0, 1)
        for instance, leaving in ((0, [0, 1]), (1, [0])):
            with pytest.raises(BackendError):
                backend.evict(instance, leaving, keep_kv=True)
        self.finish_all(backend, 0)
        assert requests["evictions"].sum() == 0, "a refused eviction was carried out"

    # ------------------------------------------------------------------- models
    def test_swap_is_cold_then_warm(self, backend: Backend) -> None:
        requests = make_requests((10, 20), model=1)
        backend.reset(requests)
        cold_s = self.swap(backend, 0, 1)
        assert self.residency(backend, 0) == [HOST, GPU, STORAGE, STORAGE]
        assert backend.fleet.engine["active_model"].tolist() == [1, 0]
        backend.pull(0, 0)
        self.finish_all(backend, 0)
        warm_s = self.swap(backend, 0, 0)
        assert self.residency(backend, 0) == [GPU, HOST, STORAGE, STORAGE]
        assert warm_s < cold_s
        self.warm(backend, 0, 2)
        assert self.residency(backend, 0) == [GPU, HOST, HOST, STORAGE]
        assert self.swap(backend, 0, 2) < cold_s
        engine = backend.fleet.engine[0]
        assert (engine.swaps, engine.cold_starts, engine.warm_hits, engine.warm_starts) == (3, 1, 2, 1)
        assert self.residency(backend, 1) == [GPU, STORAGE, STORAGE, STORAGE]

    def test_requests_run_during_a_warm_start(self, backend: Backend) -> None:
        requests = make_requests((10, 200))
        backend.reset(requests)
        backend.pull(0, 0)
        backend.warm_start(0, 1)
        assert self.residency(backend, 0)[1] == STORAGE
        self.until(backend, (FINISHED_EVENT, 0), (WARM_READY, 1))
        assert self.residency(backend, 0)[1] == HOST

    def test_least_recently_used_model_leaves_host_memory(self, backend: Backend) -> None:
        backend.reset(make_requests((10, 20)))
        self.warm(backend, 0, 1)
        self.warm(backend, 0, 2)
        assert self.residency(backend, 0) == [GPU, HOST, HOST, STORAGE]
        self.warm(backend, 0, 3)
        assert self.residency(backend, 0) == [GPU, STORAGE, HOST, HOST]
        # Model 2 runs and goes back to sleep, so that 3 is now the older one.
        self.swap(backend, 0, 2)
        self.swap(backend, 0, 0)
        assert self.residency(backend, 0) == [GPU, STORAGE, HOST, HOST]
        self.warm(backend, 0, 1)
        assert self.residency(backend, 0) == [GPU, HOST, HOST, STORAGE]
        engine = backend.fleet.engine[0]
        assert 0 < engine.host_used_bytes <= engine.host_memory_bytes

    def test_swap_waits_for_a_warm_start_under_way_or_overtakes_it(self, backend: Backend) -> None:
        """Either way the staging is over when the model runs, and its host memory is free again."""
        backend.reset(make_requests((10, 20)))
        backend.warm_start(0, 1)
        self.quietly(backend, self.poll_s)
        self.swap(backend, 0, 1)
        assert self.residency(backend, 0) == [HOST, GPU, STORAGE, STORAGE]
        assert backend.fleet.engine["stage_target"][0] == NOWHERE
        assert backend.fleet.engine["host_used_bytes"][0] == backend.fleet.placement["weight_bytes"][0, 0]

    def test_swap_refuses(self, backend: Backend) -> None:
        requests = make_requests((10, 200), (10, 20))
        backend.reset(requests)
        with pytest.raises(BackendError):
            backend.swap_model(0, 0)
        backend.pull(0, 0)
        with pytest.raises(BackendError):
            backend.swap_model(0, 1)
        self.until_generated(backend, 0, 1)
        with pytest.raises(BackendError):
            backend.swap_model(0, 1)
        self.finish_all(backend, 0)
        backend.swap_model(0, 1)
        for model in (1, 2):
            with pytest.raises(BackendError):
                backend.swap_model(0, model)
        assert not backend.has_room(0, 1)
        with pytest.raises(BackendError):
            backend.pull(0, 1)
        events = self.until(backend, (MODEL_READY, 1))
        assert len(events) == 1
        assert backend.fleet.engine["swaps"][0] == 1

    def test_warm_start_refuses(self, backend: Backend) -> None:
        backend.reset(make_requests((10, 20)))
        with pytest.raises(BackendError):
            backend.warm_start(0, 0)
        backend.warm_start(0, 1)
        for model in (1, 2):
            with pytest.raises(BackendError):
                backend.warm_start(0, model)
        self.until(backend, (WARM_READY, 1))
        with pytest.raises(BackendError):
            backend.warm_start(0, 1)

    # ------------------------------------------------------------------- failures
    def test_failure_returns_requests_and_loses_kv(self, backend: Backend) -> None:
        requests = make_requests(*[(20, 250)] * (MAX_NUM_SEQS + 2))
        backend.reset(requests)
        evicted = MAX_NUM_SEQS + 1
        backend.pull(0, evicted)
        self.until_generated(backend, evicted, 3)
        self.evict(backend, 0, [evicted], keep_kv=True)
        assert requests["kv_host"][evicted] == 0
        inside = list(range(MAX_NUM_SEQS + 1))
        for r in inside:
            backend.pull(0, r)
        self.until_generated(backend, 0, 3)
        before = [generated_tokens(backend, r) for r in range(len(requests))]
        self.warm(backend, 1, 1)
        backend.fail(0)
        events = self.until(backend, (DOWN, NOWHERE))
        returned = sorted(event.subject for event in events if event.kind == RETURNED)
        unfinished = [r for r in inside if requests["state"][r] != FINISHED]
        assert returned == unfinished
        assert events[-1].kind == DOWN
        assert {event.instance for event in events if event.kind != FINISHED_EVENT} == {0}
        for r in unfinished:
            assert requests["state"][r] == WAITING
            assert requests["instance"][r] == NOWHERE
            assert requests["generated_tokens"][r] >= before[r]
        assert (requests["kv_host"] == NOWHERE).all()
        assert requests["recomputed_tokens"][evicted] == 20 + before[evicted] - 1
        assert backend.fleet.engine["up"].tolist() == [0, 1]
        assert self.residency(backend, 0) == [STORAGE] * 4
        assert self.residency(backend, 1) == [GPU, HOST, STORAGE, STORAGE]

        for r in (*unfinished, evicted):
            assert not backend.has_room(0, r)
            with pytest.raises(BackendError):
                backend.pull(0, r)
            backend.pull(1, r)
        self.finish_all(backend, *unfinished, evicted)
        assert (requests["generated_tokens"] == 250).all()

    def test_a_failed_instance_takes_no_commands_and_recovers_empty(self, backend: Backend) -> None:
        requests = make_requests((10, 20))
        backend.reset(requests)
        with pytest.raises(BackendError):
            backend.recover(0)
        self.warm(backend, 0, 1)
        backend.fail(0)
        self.until(backend, (DOWN, NOWHERE))
        for call in (backend.swap_model, backend.warm_start):
            with pytest.raises(BackendError):
                call(0, 2)
        with pytest.raises(BackendError):
            backend.fail(0)
        backend.recover(0)
        (event,) = self.until(backend, (UP, NOWHERE))
        assert event.instance == 0
        engine = backend.fleet.engine[0]
        assert (engine.up, engine.active_model, engine.host_used_bytes) == (1, NOWHERE, 0.0)
        assert self.residency(backend, 0) == [STORAGE] * 4
        with pytest.raises(BackendError):
            backend.pull(0, 0)
        self.swap(backend, 0, 0)
        assert backend.fleet.engine["cold_starts"][0] == 1
        backend.pull(0, 0)
        self.finish_all(backend, 0)

    def test_a_failure_ends_loading(self, backend: Backend) -> None:
        backend.reset(make_requests((10, 20)))
        backend.swap_model(0, 1)
        backend.warm_start(0, 2)
        self.quietly(backend, self.poll_s)
        backend.fail(0)
        backend.recover(0)
        events = self.until(backend, (DOWN, NOWHERE), (UP, NOWHERE))
        assert [event.kind for event in events] == [DOWN, UP]
        self.swap(backend, 0, 2)
        assert self.residency(backend, 0) == [STORAGE, STORAGE, GPU, STORAGE]

    # ------------------------------------------------------------------- time
    def test_time_is_monotonic_and_advance_stops_at_what_happens(self, backend: Backend) -> None:
        requests = make_requests((10, 150), (10, 250))
        backend.reset(requests)
        backend.pull(0, 0)
        backend.pull(1, 1)
        told: list[BackendEvent] = []
        while len(told) < 2:
            before_s = backend.now_s
            until_s = before_s + self.poll_s
            events = backend.advance(until_s)
            assert backend.now_s >= before_s
            if events:
                assert all(before_s <= event.time_s <= backend.now_s for event in events)
            else:
                assert backend.now_s >= until_s
            told += events
        assert [event.subject for event in told] == [0, 1]
        assert told[0].time_s < told[1].time_s
        now_s = backend.now_s
        assert backend.advance(now_s - 1.0) == []
        assert backend.now_s >= now_s
        with pytest.raises(BackendError):
            backend.advance(math.inf)

    # ------------------------------------------------------------------- all together
    def test_nothing_is_lost(self, backend: Backend, seed: int) -> None:
        """Random commands, then what the rest needs: every request finishes once, with exactly its tokens."""
        rng = np.random.default_rng(seed)
        n = 40
        requests = make_requests(*[(int(rng.integers(1, 60)), int(rng.integers(1, 250))) for _ in range(n)])
        requests["model"] = rng.integers(0, 3, n)
        backend.reset(requests)
        finished: list[int] = []
        for step in range(self.random_steps + 200):
            for instance in (0, 1):
                try:
                    self._command(backend, instance, rng, random=step < self.random_steps)
                except BackendError:
                    continue
            slice_s = (
                self.poll_s * float(rng.choice([0.2, 2.0, 100.0])) if step < self.random_steps else self.patience_s
            )
            for event in backend.advance(backend.now_s + slice_s):
                if event.kind == FINISHED_EVENT:
                    finished.append(event.subject)
            in_engines = backend.fleet.engine["num_running"] + backend.fleet.engine["queue_length"]
            for instance in (0, 1):
                assert in_engines[instance] == (requests["instance"] == instance).sum()
            if len(finished) == n:
                break
        assert sorted(finished) == list(range(n))
        assert (requests["generated_tokens"] == requests["output_tokens"]).all()
        assert requests["evictions"].sum() > 0
        assert backend.fleet.engine["host_kv_used_bytes"].tolist() == [0.0, 0.0]

    def _command(self, backend: Backend, instance: int, rng: np.random.Generator, random: bool) -> None:
        """One command, arbitrary or what the instance needs to go on, which may be refused."""
        requests, engine = backend.requests, backend.fleet.engine[instance]
        waiting = np.flatnonzero((requests["state"] <= WAITING) & (requests["instance"] == NOWHERE))
        ready = waiting[requests["model"][waiting] == engine.active_model]
        inside = np.flatnonzero(requests["instance"] == instance)
        verb = "pull"
        if random:
            verb = str(rng.choice(["pull", "evict", "swap", "warm", "fail"], p=[0.7, 0.17, 0.05, 0.05, 0.03]))
        if not engine.up:
            backend.recover(instance)
        elif verb == "fail":
            backend.fail(instance)
        elif verb == "warm":
            backend.warm_start(instance, int(rng.integers(4)))
        elif verb == "evict" and len(inside):
            leaving = rng.choice(inside, int(rng.integers(1, len(inside) + 1)), replace=False)
            backend.evict(instance, [int(r) for r in leaving], bool(rng.integers(2)))
        elif verb == "pull" and len(ready):
            for r in ready[: int(rng.integers(1, 8))]:
                backend.pull(instance, int(r))
        elif len(waiting) and (verb == "swap" or not random):
            backend.swap_model(instance, int(requests["model"][waiting[0]]))
