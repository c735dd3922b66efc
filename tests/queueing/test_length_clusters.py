"""Groups by length: where lengths fall apart they are told apart, elsewhere not, and the books stay true."""

from __future__ import annotations

import numpy as np
import pytest

from qlm_env.env import QLMEnv
from qlm_env.lso import Balance, Lso, SwapModel
from qlm_env.queueing.length_clusters import LENGTH_DTYPE, NUM_BUCKETS, cluster_buckets, prompt_bucket
from qlm_env.requests import Records
from tests.invariants import Invariants

CUT = 0.8


def histogram(prompts: np.ndarray, outputs: np.ndarray) -> Records:
    """What a (model, class) has seen once such requests have arrived and finished."""
    lengths = np.zeros(NUM_BUCKETS, LENGTH_DTYPE).view(np.recarray)
    for prompt, output in zip(prompts.tolist(), outputs.tolist(), strict=True):
        bucket = lengths[prompt_bucket(prompt)]
        bucket.arrived += 1
        bucket.recent += 1
        bucket.prompt_tokens += prompt
        bucket.finished += 1
        bucket.output_tokens += output
    return lengths


@pytest.mark.parametrize(
    ("prompt", "bucket"), [(0, 0), (1, 0), (2, 2), (3, 3), (4, 4), (1024, 20), (2**40, NUM_BUCKETS - 1)]
)
def test_a_bucket_is_half_an_octave(prompt: int, bucket: int) -> None:
    assert prompt_bucket(prompt) == bucket


@pytest.mark.parametrize("shape", ["exponential", "normal", "equal"])
def test_one_hump_stays_together(shape: str) -> None:
    rng = np.random.default_rng(3)
    prompts = {
        "exponential": 1 + rng.exponential(250.0, 2000),
        "normal": np.maximum(1.0, rng.normal(600.0, 120.0, 2000)),
        "equal": np.full(2000, 300.0),
    }[shape]
    lengths = histogram(prompts.astype(int), np.full(2000, 200))
    assert cluster_buckets(lengths, 3, CUT).tolist() == [0] * NUM_BUCKETS


def test_mega_prompts_are_told_apart() -> None:
    rng = np.random.default_rng(4)
    prompts = np.where(rng.random(2000) < 0.1, rng.integers(3000, 4000, 2000), rng.integers(20, 500, 2000))
    cluster = cluster_buckets(histogram(prompts, np.full(2000, 200)), 3, CUT)
    assert {cluster[prompt_bucket(prompt)] for prompt in range(20, 500)} == {0}
    assert {cluster[prompt_bucket(prompt)] for prompt in range(3000, 4000)} == {1}
    assert cluster.max() == 1
    assert (np.diff(cluster) >= 0).all()
    assert cluster_buckets(histogram(prompts, np.full(2000, 200)), 1, CUT).max() == 0


def test_answers_of_different_length_are_told_apart_by_their_prompts() -> None:
    """Prompts alike, but the longer ones ask for essays."""
    rng = np.random.default_rng(5)
    prompts = rng.choice([100, 200], 1000)
    outputs = np.where(prompts == 100, 50, 1500)
    cluster = cluster_buckets(histogram(prompts, outputs), 3, CUT)
    assert (cluster[prompt_bucket(100)], cluster[prompt_bucket(200)]) == (0, 1)


def test_three_kinds_make_three_clusters_and_no_more() -> None:
    prompts = np.repeat([50, 3000, 8000], 300)
    cluster = cluster_buckets(histogram(prompts, np.full(900, 100)), 8, CUT)
    assert [cluster[prompt_bucket(prompt)] for prompt in (50, 3000, 8000)] == [0, 1, 2]
    assert cluster.max() == 2


def mega_prompt_env(max_clusters: int) -> QLMEnv:
    return QLMEnv(
        cluster="smoke",
        workload={
            "preset": "smoke",
            "num_requests": 240,
            "mix": [{"model": "vicuna-7b", "slo_class": "interactive"}],
            "lengths": {
                "kind": "uniform",
                "prompt_min_tokens": 20,
                "prompt_max_tokens": 200,
                "output_min_tokens": 20,
                "output_max_tokens": 300,
            },
            "mega_prompts": {"share": 0.2, "min_tokens": 1000, "max_tokens": 1200},
        },
        environment={"grouping": {"max_clusters": max_clusters, "recluster_requests": 50}, "strict": True},
    )


def least_waiting(env: QLMEnv) -> list[Lso]:
    """Every new group to the instance with the shortest queue; swaps as the heads need them."""
    view = env.view
    lsos: list[Lso] = []
    for group in view.groups:
        options = [i for i in view.instances if i.up and i.fits(group.model)]
        if not group.queued and options:
            lsos.append(Balance(group.id, min(options, key=lambda i: i.waiting).index))
    for instance in view.instances:
        if instance.queue:
            swap = SwapModel(instance.index, view.group(instance.queue[0]).model)
            if instance.serving_model != swap.model and view.is_legal(swap):
                lsos.append(swap)
    return lsos


def test_an_episode_with_clusters_keeps_its_books() -> None:
    env = mega_prompt_env(max_clusters=3)
    env.reset(seed=1)
    invariants = Invariants(env._running_world())
    seen = set()
    done = False
    while not done:
        _, _, terminated, truncated, info = env.step_plan(least_waiting(env))
        invariants.check()
        groups = env.view.groups
        seen |= {group.cluster for group in groups}
        done = terminated or truncated
    assert seen == {0, 1}
    assert info["metrics"]["finished"] == 240


def test_formed_groups_hold_lengths_of_one_kind() -> None:
    """Once clusters are known, no group holds short and mega prompts."""
    env = mega_prompt_env(max_clusters=3)
    env.reset(seed=1)
    world = env._running_world()
    while world.clock["next_arrival"][0] < 240:
        env.step_plan([])
    requests = world.requests
    late = np.arange(140, 240)
    for g in np.unique(requests["group"][late]):
        members = late[requests["group"][late] == g]
        mega = requests["prompt_tokens"][members] >= 1000
        assert mega.all() or not mega.any()


def test_clusters_are_the_same_every_time() -> None:
    hashes = set()
    for _ in range(2):
        env = mega_prompt_env(max_clusters=3)
        env.reset(seed=2)
        for _ in range(100):
            env.step_plan(least_waiting(env))
        world = env._running_world()
        hashes.add(world.queues.group.tobytes() + world.queues.lengths.tobytes())
    assert len(hashes) == 1


def test_a_mix_that_changes_changes_the_clusters() -> None:
    """Mega prompts that stop coming are forgotten."""
    rng = np.random.default_rng(6)
    short, mega = rng.integers(20, 500, 500), rng.integers(3000, 4000, 100)
    lengths = histogram(np.concatenate([short, mega]), np.full(600, 200))
    assert cluster_buckets(lengths, 3, CUT).max() == 1
    for _ in range(16):
        lengths["recent"] *= 0.5
        lengths["prompt_tokens"] *= 0.5
        for prompt in rng.integers(20, 500, 200).tolist():
            lengths[prompt_bucket(prompt)].recent += 1
            lengths[prompt_bucket(prompt)].prompt_tokens += prompt
    assert cluster_buckets(lengths, 3, CUT).max() == 0
