"""Prompt prefixes from a Mooncake trace, and what they are worth in an episode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlm_env.env import QLMEnv
from qlm_env.prefixes import NO_PREFIXES
from qlm_env.spec import ScenarioSpec, TraceWorkload, parse
from qlm_env.workload import TraceError, load_prefixes


def write_trace(path: Path, *rows: tuple[int, int, Any]) -> Path:
    """Rows of (timestamp in ms, prompt tokens, hash ids)."""
    lines = [
        json.dumps({"timestamp": at, "input_length": prompt, "output_length": 8, "hash_ids": ids})
        for at, prompt, ids in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def workload(path: Path, **settings: Any) -> dict[str, Any]:
    return {
        "kind": "trace",
        "path": str(path),
        "format": "mooncake",
        "models": [{"name": "m", "architecture": "llama-3.1-8b", "context_tokens": 8192}],
        "mix": [{"model": "m", "slo_class": "interactive"}],
        **settings,
    }


def scenario_workload(path: Path, **settings: Any) -> TraceWorkload:
    values = {
        "cluster": {"instances": [{"device": "A100"}]},
        "workload": workload(path, **settings),
        "slo": {"classes": [{"name": "interactive", "target_s": 20.0}]},
    }
    spec = parse(ScenarioSpec, values).workload
    assert isinstance(spec, TraceWorkload)
    return spec


def test_ids_follow_the_rows_that_are_replayed(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", (0, 600, [5, 6]), (1000, 30, []), (2000, 1200, [5, 6, 9]))
    prefixes = load_prefixes(scenario_workload(path))
    assert prefixes.first.tolist() == [0, 2, 2, 5]
    assert prefixes.ids.tolist() == [5, 6, 5, 6, 9]
    assert prefixes.id_tokens == 512
    assert load_prefixes(scenario_workload(path, start_s=0.5)).first.tolist() == [0, 0, 3]


@pytest.mark.parametrize("ids", [[-1], [1.5], ["a"], 7, [True], [2**31]])
def test_ids_that_are_none(tmp_path: Path, ids: Any) -> None:
    path = write_trace(tmp_path / "t.jsonl", (0, 600, [1]), (1, 600, ids))
    with pytest.raises(TraceError, match=r"line 2, column .hash_ids.*not a list of whole numbers"):
        load_prefixes(scenario_workload(path))


def run(path: Path, **engine: Any) -> QLMEnv:
    env = QLMEnv(
        cluster={"instances": [{"device": "A100", "initial_model": "m"}], "engine": engine},
        workload=workload(path),
        slo={"classes": [{"name": "interactive", "target_s": 20.0}]},
    )
    env.reset(seed=0)
    done = False
    while not done:
        mask = env.action_masks()
        _, _, terminated, truncated, _ = env.step(int(np.flatnonzero(mask)[-1]) if mask[1:].any() else 0)
        done = terminated or truncated
    return env


def test_a_prompt_that_was_seen_is_not_computed_again(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", (0, 4096, list(range(8))), (60_000, 4096, list(range(8))))
    waits = {}
    for caching in (False, True):
        requests = run(path, enable_prefix_caching=caching)._running_world(allow_done=True).requests
        waits[caching] = (requests.first_token_s - requests.arrival_s).tolist()
    assert waits[True][0] == waits[False][0] == pytest.approx(waits[False][1])
    # Of 4,096 tokens all but the last block is found.
    assert waits[True][1] < 0.2 * waits[False][1]


def test_a_block_size_that_does_not_divide_a_hashed_block(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", (0, 600, [5, 6]))
    with pytest.raises(ValueError, match=r"block_size.*must divide the 512 tokens"):
        run(path, enable_prefix_caching=True, block_size=24)


def test_without_a_prefix_cache_or_hashes_there_are_no_prefixes(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", (0, 600, [5, 6]))
    azure = scenario_workload(path).model_copy(update={"format": "azure"})
    assert load_prefixes(azure) is NO_PREFIXES
