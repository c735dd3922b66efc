from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_env.profiles import (
    ModelLoad,
    Profile,
    check_placement,
    cluster_capacity_per_s,
    fitting_profile,
    list_profiles,
    load_profile,
    mean_resident_tokens,
    saturated_rate_per_s,
    usable_kv_blocks,
)
from qlm_env.spec import (
    ClusterSpec,
    ConfigError,
    EngineSpec,
    InstancesSpec,
    MixSpec,
    ModelSpec,
    SyntheticWorkload,
)
from tests.profiles.toy import toy_profile, write_profile

SHIPPED = [load_profile(*key) for key in list_profiles()]


# --------------------------------------------------------------------------- one instance
def test_usable_blocks_leave_out_the_null_block() -> None:
    profile = toy_profile(num_gpu_blocks=1001)
    assert usable_kv_blocks(profile, EngineSpec()) == 1000
    assert usable_kv_blocks(profile, EngineSpec(block_size=32)) == 499
    assert usable_kv_blocks(profile, EngineSpec(num_gpu_blocks=51)) == 50


def test_a_rate_by_hand_where_kv_memory_binds() -> None:
    """16,000 KV tokens / (300 + 200/2) = 40 requests; per 200 steps 40 * 499 = 19,960 tokens, 99.8 a step."""
    steps, batch = 200, 40
    seconds = (
        steps * 0.01
        + steps * 64 * 1e-5
        + steps * (99.8 - 64) * 1e-4
        + batch * 199 * 399 * 1e-6
        + batch * 300**2 / 2 * 1e-8
        + batch * 199 * 1e-4
        + batch * 199 * 399 * 2e-7 * batch / steps  # one prompt enters per step, in so many of them
    )
    assert saturated_rate_per_s(toy_profile(), EngineSpec(), 300, 200) == pytest.approx(batch / seconds)


def test_a_rate_by_hand_where_slots_bind() -> None:
    """Four requests; per 200 steps 4 * 499 = 1,996 tokens, 9.98 a step, below the break."""
    engine = EngineSpec(max_num_seqs=4)
    seconds = 200 * 0.01 + 1996 * 1e-5 + 4 * 199 * 399 * 1e-6 + 4 * 300**2 / 2 * 1e-8 + 4 * 199 * 1e-4
    seconds += 4 * 199 * 399 * 2e-7 * 4 / 200
    assert saturated_rate_per_s(toy_profile(), engine, 300, 200) == pytest.approx(4 / seconds)


def test_a_rate_by_hand_where_the_token_budget_binds() -> None:
    """16,000 / 1,005 requests of 1,009 tokens need more than 10 steps of 512 tokens."""
    batch = 16_000 / 1005
    tokens = batch * 1009
    steps = tokens / 512
    assert steps > 10
    seconds = (
        steps * (0.01 + 64 * 1e-5 + 448 * 1e-4)
        + batch * 9 * 1004 * 1e-6
        + batch * 1000**2 / 2 * 1e-8
        + batch * 9 * 1e-4
        + batch * 9 * 1004 * 2e-7 * batch / steps
    )
    engine = EngineSpec(max_num_batched_tokens=512)
    assert saturated_rate_per_s(toy_profile(), engine, 1000, 10) == pytest.approx(batch / seconds)


def test_resident_tokens_of_a_sample_by_hand() -> None:
    """(10 * 105 + 30 * 25) / 40: the second request is there three times as long."""
    assert mean_resident_tokens(np.array([100, 10]), np.array([10, 30])) == pytest.approx(45.0)
    assert mean_resident_tokens(np.array([300]), np.array([200])) == pytest.approx(400.0)


def test_resident_tokens_default_to_requests_all_alike() -> None:
    rates = [saturated_rate_per_s(toy_profile(), EngineSpec(), 300, 200, resident) for resident in (None, 400, 500)]
    assert rates[0] == rates[1] > rates[2]


def rate_by_steps(profile: Profile, max_num_seqs: int, prompt: int, output: int, steps: int) -> float:
    """Completions per second of a plain loop over steps: slots refilled at once, their starts staggered."""
    c = profile.step_time
    progress = [slot * output // max_num_seqs for slot in range(max_num_seqs)]
    finished, seconds = 0, 0.0
    for _ in range(steps):
        new_tokens = kv_tokens = attention = decodes = 0.0
        for slot, generated in enumerate(progress):
            if generated == 0:
                new_tokens += prompt
                attention += prompt**2 / 2
            else:
                new_tokens += 1
                kv_tokens += prompt + generated - 1
                decodes += 1
            progress[slot] = (generated + 1) % output
            finished += progress[slot] == 0
        seconds += (
            c.c0_s
            + c.c1_s_per_token * min(new_tokens, c.n0_tokens)
            + c.c2_s_per_token * max(0.0, new_tokens - c.n0_tokens)
            + c.c3_s_per_kv_token * kv_tokens
            + c.c4_s_per_token2 * attention
            + c.c5_s_per_sequence * decodes
            + (c.c6_s_per_mixed_kv_token * kv_tokens if attention else 0.0)
        )
    return finished / seconds


@pytest.mark.parametrize(("prompt", "output", "slots"), [(50, 100, 100), (100, 50, 10), (1, 20, 60), (30, 1, 8)])
def test_the_rate_is_that_of_a_loop_over_steps(prompt: int, output: int, slots: int) -> None:
    """Exact without a break in the token cost and a cost of mixing, since then only sums count."""
    profile = toy_profile(c2_s_per_token=1e-5, c6_s_per_mixed_kv_token=0.0)
    expected = rate_by_steps(profile, slots, prompt, output, steps=5 * output)
    engine = EngineSpec(max_num_seqs=slots, max_num_batched_tokens=8192)
    assert saturated_rate_per_s(profile, engine, prompt, output) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("prompt", "output", "slots"), [(50, 100, 100), (100, 50, 10)])
def test_decodes_beside_a_prefill_cost_more(prompt: int, output: int, slots: int) -> None:
    profile = toy_profile(c2_s_per_token=1e-5, c6_s_per_mixed_kv_token=2e-6)
    expected = rate_by_steps(profile, slots, prompt, output, steps=5 * output)
    engine = EngineSpec(max_num_seqs=slots, max_num_batched_tokens=8192)
    assert saturated_rate_per_s(profile, engine, prompt, output) == pytest.approx(expected, rel=0.02)
    unmixed = toy_profile(c2_s_per_token=1e-5, c6_s_per_mixed_kv_token=0.0)
    assert expected < 0.97 * saturated_rate_per_s(unmixed, engine, prompt, output)


def test_what_does_not_fit_the_kv_cache_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="15000 \\+ 1001 tokens exceeds the 16000 tokens of KV cache of toy-1b on TOY"
    ):
        saturated_rate_per_s(toy_profile(), EngineSpec(), 15_000, 1001)
    with pytest.raises(ConfigError):
        saturated_rate_per_s(toy_profile(), EngineSpec(), 1, 1, 16_001)


@pytest.mark.parametrize("lengths", [(0, 1), (1, 0), (float("nan"), 1), (1, 1, 0)])
def test_lengths_below_one_are_refused(lengths: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        saturated_rate_per_s(toy_profile(), EngineSpec(), *lengths)


lengths_tokens = st.floats(1, 2000)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SHIPPED), lengths_tokens, lengths_tokens, st.integers(1, 255))
def test_a_larger_batch_never_costs_more_per_request(
    profile: Profile, prompt: float, output: float, slots: int
) -> None:
    """But for prompts that enter beside more decodes, which c6 charges for."""
    unmixed = profile.model_copy(
        update={"c6_s_per_mixed_kv_token": profile.c6_s_per_mixed_kv_token.model_copy(update={"value": 0.0})}
    )
    smaller, larger = (
        saturated_rate_per_s(unmixed, EngineSpec(max_num_seqs=n), prompt, output) for n in (slots, slots + 1)
    )
    assert 0 < smaller <= larger * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SHIPPED), lengths_tokens, lengths_tokens, st.floats(1, 1000), st.floats(1, 1000))
def test_longer_requests_are_never_served_faster(
    profile: Profile, prompt: float, output: float, more_prompt: float, more_output: float
) -> None:
    rate = saturated_rate_per_s(profile, EngineSpec(), prompt, output)
    assert saturated_rate_per_s(profile, EngineSpec(), prompt + more_prompt, output) <= rate * (1 + 1e-12)
    assert saturated_rate_per_s(profile, EngineSpec(), prompt, output + more_output) <= rate * (1 + 1e-12)


# --------------------------------------------------------------------------- clusters
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """FAST holds both architectures, SLOW only the small one at half the speed."""
    write_profile(tmp_path, toy_profile("FAST", "small"))
    write_profile(tmp_path, toy_profile("FAST", "big", c0_s=0.03))
    fast = toy_profile().step_time
    slow = fast._replace(n0_tokens=fast.n0_tokens / 2)._asdict()
    slow = {name: 2 * value for name, value in slow.items()}
    write_profile(tmp_path, toy_profile("SLOW", "small", **slow))
    return tmp_path


def cluster(*groups: tuple[str, int], **settings: Any) -> ClusterSpec:
    return ClusterSpec(
        name="test",
        instances=tuple(InstancesSpec(device=device, count=count, **settings) for device, count in groups),
    )


MODELS = (ModelSpec(name="s", architecture="small"), ModelSpec(name="b", architecture="big"))


def rate(folder: Path, device: str, architecture: str) -> float:
    return saturated_rate_per_s(load_profile(device, architecture, 1, folder), EngineSpec(), 300, 200)


def test_one_model_gets_every_instance(folder: Path) -> None:
    capacity = cluster_capacity_per_s(
        cluster(("FAST", 3), ("SLOW", 4)), MODELS, [ModelLoad("s", 1.0, 300, 200)], folder
    )
    assert rate(folder, "SLOW", "small") == pytest.approx(rate(folder, "FAST", "small") / 2)
    assert capacity == pytest.approx(5 * rate(folder, "FAST", "small"))


def test_two_models_on_one_instance_share_its_time(folder: Path) -> None:
    """Time per request is the mean over the mix: 3 parts s and 1 part b, whatever the scale of the shares."""
    loads = [ModelLoad("s", 30.0, 300, 200), ModelLoad("b", 10.0, 300, 200)]
    seconds = 0.75 / rate(folder, "FAST", "small") + 0.25 / rate(folder, "FAST", "big")
    assert cluster_capacity_per_s(cluster(("FAST", 1)), MODELS, loads, folder) == pytest.approx(1 / seconds)


def test_each_model_goes_where_it_fits(folder: Path) -> None:
    """b needs FAST and is scarce there: s takes SLOW, and FAST has no time left for it."""
    loads = [ModelLoad("s", 0.1, 300, 200), ModelLoad("b", 0.9, 300, 200)]
    capacity = cluster_capacity_per_s(cluster(("FAST", 1), ("SLOW", 1)), MODELS, loads, folder)
    assert capacity == pytest.approx(rate(folder, "FAST", "big") / 0.9)


def test_resident_tokens_reach_the_capacity(folder: Path) -> None:
    alike, varied = (
        cluster_capacity_per_s(cluster(("FAST", 1)), MODELS, [ModelLoad("s", 1.0, 300, 200, resident)], folder)
        for resident in (None, 800)
    )
    assert alike > varied


def test_one_model_may_have_several_loads(folder: Path) -> None:
    loads = [ModelLoad("s", 0.5, 300, 200), ModelLoad("s", 0.5, 300, 200)]
    capacity = cluster_capacity_per_s(cluster(("FAST", 1)), MODELS, loads, folder)
    assert capacity == pytest.approx(rate(folder, "FAST", "small"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=5, max_size=5), st.integers(1, 20))
def test_capacity_is_homogeneous_and_grows_with_the_cluster(shares: list[float], count: int) -> None:
    names = [
        ("llama-2-7b", 1),
        ("llama-2-13b", 1),
        ("llama-3.1-8b", 1),
        ("llama-2-7b", 1),
        ("llama-2-13b", 1),
    ]
    models = [ModelSpec(name=f"m{i}", architecture=architecture) for i, (architecture, _) in enumerate(names)]
    loads = [ModelLoad(f"m{i}", share, 246, 326) for i, share in enumerate(shares)]
    once, twice, more = (
        cluster_capacity_per_s(cluster(*groups), models, loads)
        for groups in (
            [("A10", count), ("A100", count)],
            [("A10", 2 * count), ("A100", 2 * count)],
            [("A10", count + 1), ("A100", count)],
        )
    )
    assert twice == pytest.approx(2 * once, rel=1e-6)
    assert more >= once * (1 - 1e-9)


def test_loads_are_checked(folder: Path) -> None:
    with pytest.raises(ConfigError, match="loads name model 'x'; allowed: s, b"):
        cluster_capacity_per_s(cluster(("FAST", 1)), MODELS, [ModelLoad("x", 1.0, 300, 200)], folder)
    with pytest.raises(ConfigError, match="share of model 's' must be positive"):
        cluster_capacity_per_s(cluster(("FAST", 1)), MODELS, [ModelLoad("s", 0.0, 300, 200)], folder)
    with pytest.raises(ConfigError, match="at least one"):
        cluster_capacity_per_s(cluster(("FAST", 1)), MODELS, [], folder)
    with pytest.raises(ConfigError, match=r"model 'b' .* fits no instance of cluster 'test'"):
        cluster_capacity_per_s(cluster(("SLOW", 1)), MODELS, [ModelLoad("b", 1.0, 300, 200)], folder)


# --------------------------------------------------------------------------- placement
def workload(*models: ModelSpec) -> SyntheticWorkload:
    return SyntheticWorkload(
        models=models, mix=tuple(MixSpec(model=model.name, slo_class="batch-1") for model in models)
    )


def test_placement_names_the_groups_a_model_fits(folder: Path) -> None:
    placement = check_placement(cluster(("SLOW", 1), ("FAST", 2)), workload(*MODELS), folder)
    assert placement == {"s": (0, 1), "b": (1,)}


def test_a_model_fits_only_where_the_kv_cache_holds_its_context(folder: Path) -> None:
    group = InstancesSpec(device="FAST")
    fits, too_long = (ModelSpec(name="s", architecture="small", context_tokens=tokens) for tokens in (16_000, 16_001))
    assert fitting_profile(group, EngineSpec(), fits, folder) is not None
    assert fitting_profile(group, EngineSpec(), too_long, folder) is None
    with pytest.raises(ConfigError, match="FAST tp=1: KV cache of 16000 tokens below context_tokens=16001"):
        check_placement(cluster(("FAST", 1)), workload(too_long), folder)


def test_a_model_that_fits_nowhere_is_named_with_its_bytes(folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check_placement(cluster(("SLOW", 1)), workload(*MODELS), folder)
    assert str(error.value) == (
        "model 'b' (big, 10.0e9 bytes of weights) fits no instance of cluster 'test' "
        "(SLOW tp=1: no profile); profiles of big: FAST tp=1"
    )
    with pytest.raises(ConfigError, match=r"'x' \(unheard-of\) .* profiles of unheard-of: none"):
        check_placement(cluster(("SLOW", 1)), workload(ModelSpec(name="x", architecture="unheard-of")), folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_model": "b"}, "initial_model 'b' (big, 10.0e9 bytes of weights) does not fit SLOW tp=1"),
        ({"warm_models": ("b",)}, "warm_models 'b' (big, 10.0e9 bytes of weights) does not fit SLOW tp=1"),
        ({"initial_model": "x"}, "initial_model names model 'x'; allowed: s, b"),
    ],
)
def test_models_placed_at_the_start_must_fit(folder: Path, settings: dict[str, Any], message: str) -> None:
    group = InstancesSpec(device="SLOW", **settings)
    spec = ClusterSpec(name="test", instances=(InstancesSpec(device="FAST"), group))
    with pytest.raises(ConfigError) as error:
        check_placement(spec, workload(*MODELS), folder)
    assert str(error.value) == message


def test_warm_models_must_fit_host_memory_together(folder: Path) -> None:
    warm = {"warm_models": ("s", "b")}
    check_placement(cluster(("FAST", 1), **warm, host_memory_gb=20.0), workload(*MODELS), folder)
    with pytest.raises(ConfigError) as error:
        check_placement(cluster(("FAST", 1), **warm, host_memory_gb=19.9), workload(*MODELS), folder)
    assert str(error.value) == (
        "host_memory_gb of FAST tp=1 is 19.9, but warm_models s, b have 20.0e9 bytes of weights"
    )
