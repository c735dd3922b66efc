"""What happened on servers, written into the arrays: times and counters by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlm_env.backends.emulator import commands
from qlm_env.backends.vllm.mirror import Effect, EffectKind, Mirror
from qlm_env.cluster import make_cluster
from qlm_env.requests import NOWHERE, RequestTable
from tests.backends.conformance import make_requests
from tests.backends.toy_cluster import COLD_START_S, SLEEP_S, toy_scenario
from tests.profiles.toy import toy_profile, write_profile

START_S = 100.0
BLOCKS = 89


def make_mirror(folder: Path, requests: RequestTable) -> Mirror:
    write_profile(folder, toy_profile(num_gpu_blocks=BLOCKS + 1))
    scenario = toy_scenario(num_models=2)
    return Mirror(make_cluster(scenario.cluster, scenario.workload.models, folder), requests, START_S)


def happen(mirror: Mirror, kind: EffectKind, time_s: float, subject: int = NOWHERE, value: int = 0) -> None:
    mirror.apply(Effect(kind, START_S + time_s, 0, subject, value))


def test_busy_time_and_blocks_are_counted_while_something_runs(tmp_path: Path) -> None:
    requests = make_requests((30, 4), (10, 9))
    mirror = make_mirror(tmp_path, requests)
    engine = mirror.fleet.engine[0]
    for r in (0, 1):
        assert mirror.command(commands.PULL, 0, r, 0.5)
    happen(mirror, EffectKind.ADMITTED, 1.0, 0)
    assert (engine.free_blocks, engine.queue_length, engine.first_prefill) == (BLOCKS - 2, 1, 0)
    happen(mirror, EffectKind.ADMITTED, 2.0, 1)
    happen(mirror, EffectKind.TOKENS, 3.0, 0, 3)
    # 33 tokens are three blocks of 16.
    assert (engine.free_blocks, engine.first_prefill) == (BLOCKS - 4, 1)
    happen(mirror, EffectKind.TOKENS, 4.0, 0, 4)
    happen(mirror, EffectKind.FINISHED, 4.0, 0)
    happen(mirror, EffectKind.TOKENS, 4.5, 1, 1)
    happen(mirror, EffectKind.LOST, 5.0, 1)
    happen(mirror, EffectKind.DOWN, 5.0)
    assert engine.busy_s == 4.0
    assert engine.kv_block_s == 2 * 1.0 + 3 * 1.0 + 4 * 1.0 + 1 * 1.0
    mirror.pass_time(9.0)
    assert engine.busy_s == 4.0
    assert requests["first_token_s"].tolist() == [3.0, 4.5]
    assert requests["finish_s"][0] == 4.0
    assert requests["recomputed_tokens"].tolist() == [0, 10]


@pytest.mark.parametrize("took_s", [3.0, 300.0])
def test_a_swap_is_booked_as_expected_and_counted_as_it_was(tmp_path: Path, took_s: float) -> None:
    mirror = make_mirror(tmp_path, make_requests((30, 4)))
    engine = mirror.fleet.engine[0]
    mirror.swap(0, 1, 1.0)
    assert engine.next_event_s == 1.0 + COLD_START_S + SLEEP_S
    mirror.pass_time(1.0 + took_s)
    assert engine.next_event_s == max(1.0 + COLD_START_S + SLEEP_S, 1.0 + took_s)
    happen(mirror, EffectKind.MODEL_READY, 1.0 + took_s, 1)
    assert engine.swapping_s == pytest.approx(took_s)
    assert engine.active_model == 1


def test_a_swap_that_fails_counts_as_long_as_it_lasted(tmp_path: Path) -> None:
    mirror = make_mirror(tmp_path, make_requests((30, 4)))
    engine = mirror.fleet.engine[0]
    mirror.swap(0, 1, 1.0)
    mirror.pass_time(200.0)
    happen(mirror, EffectKind.DOWN, 201.0)
    assert engine.swapping_s == pytest.approx(200.0)
    assert (engine.up, engine.swap_target) == (0, NOWHERE)
