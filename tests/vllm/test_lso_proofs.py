"""Every operation is seen in vLLM's own metrics and answers."""

from __future__ import annotations

import json

import pytest

from qlm_env.backends.base import EventKind
from qlm_env.backends.emulator.state import GPU, HOST, STORAGE
from qlm_env.backends.vllm.backend import VllmBackend
from qlm_env.requests import NOWHERE
from tests.backends.conformance import make_requests
from tests.vllm.observed import ask, evict, observe, until, wait_for, wait_for_tokens
from tests.vllm.real_cluster import BLOCK_SIZE, KV_STORE_INSTANCE

PREFIX_CACHE, KV_STORE = 1 - KV_STORE_INSTANCE, KV_STORE_INSTANCE


def is_sleeping(cluster: VllmBackend, instance: int, model: int) -> bool:
    return bool(json.loads(ask(cluster, instance, model, "/is_sleeping"))["is_sleeping"])


def test_pull_and_evict_change_the_running_count(cluster: VllmBackend) -> None:
    cluster.reset(make_requests(*[(20, 480)] * 3))
    assert observe(cluster, 0).running == 0
    for r in range(3):
        cluster.pull(0, r)
    assert until(lambda: observe(cluster, 0).running == 3)
    wait_for_tokens(cluster, 1)
    evict(cluster, 0, 1, keep_kv=False)
    assert until(lambda: observe(cluster, 0).running == 2)
    assert cluster.fleet.engine["num_running"][0] == 2
    evict(cluster, 0, 0, keep_kv=False)
    evict(cluster, 0, 2, keep_kv=False)
    assert until(lambda: observe(cluster, 0).running == 0)
    before = observe(cluster, 0)
    assert not until(lambda: observe(cluster, 0).since(before).generated > 0, 1.0), "an evicted request goes on"


@pytest.mark.parametrize(
    ("instance", "keep_kv", "source"),
    [
        (PREFIX_CACHE, True, "local_cache_hit"),
        (KV_STORE, True, "external_kv_transfer"),
        (PREFIX_CACHE, False, None),
        (KV_STORE, False, None),
    ],
)
def test_resume_finds_kept_kv_and_no_dropped_kv(
    cluster: VllmBackend, instance: int, keep_kv: bool, source: str | None
) -> None:
    requests = make_requests((100, 300))
    requests["prompt_tokens"] = 70
    cluster.reset(requests)
    cluster.pull(instance, 0)
    wait_for_tokens(cluster, 0, 5)
    tokens = evict(cluster, instance, 0, keep_kv)
    computed = 70 + tokens - 1
    assert requests["kv_host"][0] == (instance if keep_kv else NOWHERE)
    assert until(lambda: observe(cluster, instance).running == 0)
    before = observe(cluster, instance)
    cluster.pull(instance, 0)
    wait_for(cluster, EventKind.FINISHED, 0)
    sources = dict(observe(cluster, instance).since(before).prompt_tokens)
    found = sources.pop(source) if source is not None else 0
    assert sources.pop("local_compute") == computed + 1 - found
    assert all(count == 0 for count in sources.values()), sources
    if keep_kv:
        assert computed - BLOCK_SIZE <= found <= computed
        assert requests["recomputed_tokens"][0] == computed - found
    else:
        assert requests["recomputed_tokens"][0] == computed
    assert requests["generated_tokens"][0] == 300


def test_kv_in_a_store_outlives_a_swap(cluster: VllmBackend) -> None:
    requests = make_requests((70, 300), (10, 5))
    requests["model"][1] = 1
    cluster.reset(requests)
    cluster.pull(KV_STORE, 0)
    wait_for_tokens(cluster, 0, 5)
    computed = 70 + evict(cluster, KV_STORE, 0, keep_kv=True) - 1
    cluster.swap_model(KV_STORE, 1)
    wait_for(cluster, EventKind.MODEL_READY, 1)
    assert is_sleeping(cluster, KV_STORE, 0)
    cluster.pull(KV_STORE, 1)
    wait_for(cluster, EventKind.FINISHED, 1)
    cluster.swap_model(KV_STORE, 0)
    wait_for(cluster, EventKind.MODEL_READY, 0)
    before = observe(cluster, KV_STORE)
    cluster.pull(KV_STORE, 0)
    wait_for(cluster, EventKind.FINISHED, 0)
    found = observe(cluster, KV_STORE).since(before).prompt_tokens["external_kv_transfer"]
    assert computed - BLOCK_SIZE <= found <= computed


def test_warm_start_then_swap(cluster: VllmBackend) -> None:
    """The model is there, asleep, while the other one goes on; after the swap it answers, and the other sleeps."""
    requests = make_requests((20, 480), (20, 30))
    requests["model"][1] = 1
    cluster.reset(requests)
    assert (0, 1) not in cluster.servers()
    cluster.pull(0, 0)
    cluster.warm_start(0, 1)
    wait_for(cluster, EventKind.WARM_READY, 1)
    assert is_sleeping(cluster, 0, 1)
    assert not is_sleeping(cluster, 0, 0)
    assert observe(cluster, 0, 0).generated > 0
    if requests["instance"][0] != NOWHERE:
        evict(cluster, 0, 0, keep_kv=False)
    cluster.swap_model(0, 1)
    wait_for(cluster, EventKind.MODEL_READY, 1)
    assert is_sleeping(cluster, 0, 0)
    assert not is_sleeping(cluster, 0, 1)
    served = json.loads(ask(cluster, 0, 1, "/v1/models"))["data"]
    assert [model["id"] for model in served] == ["m1"]
    before = observe(cluster, 0, 1)
    cluster.pull(0, 1)
    wait_for(cluster, EventKind.FINISHED, 1)
    assert observe(cluster, 0, 1).since(before).generated == 30
    assert cluster.fleet.placement["residency"][0].tolist() == [HOST, GPU, STORAGE, STORAGE]
    # The model that is in storage again has no process any more.
    url = cluster.servers()[0, 1].url
    cluster.reset(make_requests((10, 5)))
    assert (0, 1) not in cluster.servers()
    assert not is_sleeping(cluster, 0, 0)
    assert all(server.url != url for server in cluster.servers().values())


def test_balance_lets_a_request_go_on_elsewhere(cluster: VllmBackend) -> None:
    requests = make_requests((20, 300))
    cluster.reset(requests)
    cluster.pull(0, 0)
    wait_for_tokens(cluster, 0, 5)
    tokens = evict(cluster, 0, 0, keep_kv=True)
    assert until(lambda: observe(cluster, 0).running == 0)
    before = [observe(cluster, i) for i in (0, 1)]
    cluster.pull(1, 0)
    assert until(lambda: observe(cluster, 1).running == 1)
    wait_for(cluster, EventKind.FINISHED, 0)
    here, there = (observe(cluster, i).since(before[i]) for i in (0, 1))
    assert here.generated == 0
    assert there.generated == 300 - tokens
    assert there.prompt_tokens["local_compute"] == 20 + tokens
