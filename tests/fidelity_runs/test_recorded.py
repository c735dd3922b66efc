"""Reading recorded runs: clocks, settings and their origins, and one line for whatever is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlm_env.fidelity.recorded import read_run
from qlm_env.spec import ConfigError
from tests.fidelity_runs.runs import CLIENT_CLOCK_S, ENGINE_CLOCK_S, META, ROW, write_run


def test_arrivals_move_to_the_engine_clock_by_the_least_delayed_request(tmp_path: Path) -> None:
    late = ROW | {"arrival_time": CLIENT_CLOCK_S + 10, "queued_ts": ENGINE_CLOCK_S + 12.5}
    late |= dict.fromkeys(("scheduled_ts", "first_token_ts", "last_token_ts"), ENGINE_CLOCK_S + 13)
    requests = read_run(write_run(tmp_path, [late, ROW])).requests
    # In order of arrival, whatever the file's order; the second waited 2.5 s for the engine to take it in.
    np.testing.assert_allclose(requests.arrival_s, [0.0, 10.0], atol=1e-6)
    np.testing.assert_allclose(requests.first_token_s, [1.0, 13.0], atol=1e-6)
    assert requests.line.tolist() == [2, 1]


def test_without_engine_times_one_clock_is_assumed(tmp_path: Path) -> None:
    row = {name: value for name, value in ROW.items() if name not in ("queued_ts", "scheduled_ts")}
    row |= {"arrival_time": 7.0, "first_token_ts": 8.0, "last_token_ts": 9.0, "scheduled_ts": None}
    requests = read_run(write_run(tmp_path, [row])).requests
    assert requests.first_token_s.tolist() == [1.0]
    assert np.isnan(requests.scheduled_s).all()
    assert requests.slo_class == (None,)


def test_settings_come_from_what_the_engine_resolved_and_else_from_its_arguments(tmp_path: Path) -> None:
    meta = copy.deepcopy(META)
    meta["resolved_config"]["scheduler_config"]["max_num_seqs"] = 4
    engine = read_run(write_run(tmp_path, meta=meta)).engine
    assert engine.settings.max_num_seqs == 4
    assert engine.origins["max_num_seqs"] == "resolved_config.scheduler_config.max_num_seqs"
    assert engine.settings.max_num_batched_tokens == 64
    assert engine.origins["max_num_batched_tokens"] == "engine_kwargs.max_num_batched_tokens"
    assert engine.settings.num_gpu_blocks == 101
    assert engine.settings.async_scheduling
    assert engine.settings.enable_prefix_caching


@pytest.mark.parametrize(
    ("version", "expected"), [("0.19.0", True), ("0.14.0rc1", True), ("0.11.2", False), ("?", False)]
)
def test_a_bare_meta_gives_the_defaults_of_its_vllm(tmp_path: Path, version: str, expected: bool) -> None:
    meta = {"vllm_version": version, "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 64}}
    engine = read_run(write_run(tmp_path, meta=meta)).engine
    assert engine.settings.num_gpu_blocks is None
    assert engine.settings.enable_prefix_caching
    assert engine.settings.async_scheduling is expected
    assert version in engine.origins["async_scheduling"]
    assert engine.tp == 1


def test_time_series(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "without")).series is None
    series = read_run(write_run(tmp_path / "with", series="t,running,waiting,other\n1,2,3,x\n2.5,1,0,y\n")).series
    assert series is not None
    assert series.time_s.tolist() == [1.0, 2.5]
    assert series.running.tolist() == [2.0, 1.0]
    assert series.waiting.tolist() == [3.0, 0.0]


def changed(**values: Any) -> Callable[[Path], None]:
    """A run whose second request differs in ``values``; ``None`` leaves the field out."""
    row = {name: value for name, value in (ROW | values).items() if value is not None}
    return lambda folder: void(write_run(folder, [ROW, row]))


def with_meta(**values: Any) -> Callable[[Path], None]:
    return lambda folder: void(write_run(folder, meta=META | values))


def with_file(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_run(folder)
        (folder / name).write_text(text, encoding="utf-8")

    return write


def void(_: object) -> None:
    return None


MISTAKES = {
    "no requests": (with_file("requests.jsonl", "\n"), "requests.jsonl: holds no request"),
    "no JSON": (with_file("requests.jsonl", json.dumps(ROW) + "\n{"), "requests.jsonl, line 2: is not JSON"),
    "no object": (with_file("requests.jsonl", "[1]"), "requests.jsonl, line 1: is not a JSON object"),
    "binary": (lambda folder: void((write_run(folder) / "requests.jsonl").write_bytes(b"\xff\xfe")), "is not UTF-8"),
    "field missing": (changed(output_toks=None), "line 2, field 'output_toks': is missing"),
    "time missing": (changed(first_token_ts=None), "line 2, field 'first_token_ts': is missing"),
    "text for a number": (changed(input_toks="many"), "line 2, field 'input_toks': \"many\" is not a finite number"),
    "truth for a number": (changed(input_toks=True), "line 2, field 'input_toks': true is not a finite number"),
    "not finite": (changed(last_token_ts=float("inf")), "line 2, field 'last_token_ts': Infinity is not a finite"),
    "fraction of a token": (changed(input_toks=1.5), "line 2, field 'input_toks': 1.5 is not a whole number from 1"),
    "no tokens": (changed(output_toks=0), "line 2, field 'output_toks': 0 is not a whole number from 1"),
    "negative time": (changed(arrival_time=-1.0), "line 2, field 'arrival_time': -1.0 is negative"),
    "last before first": (
        changed(last_token_ts=ENGINE_CLOCK_S + 0.5),
        "line 2, field 'last_token_ts': is before first_token_ts",
    ),
    "scheduled before queued": (
        changed(scheduled_ts=ENGINE_CLOCK_S - 1),
        "line 2, field 'scheduled_ts': is before queued_ts",
    ),
    "first before queued": (
        changed(scheduled_ts=None, first_token_ts=ENGINE_CLOCK_S - 1),
        "line 2, field 'first_token_ts': is before queued_ts",
    ),
    "answer before question": (
        changed(arrival_time=CLIENT_CLOCK_S + 2, queued_ts=None, scheduled_ts=None),
        "line 2, field 'first_token_ts': the first token came before the request",
    ),
    "class no name": (changed(slo_class=3), "line 2, field 'slo_class': 3 is no name of an SLO class"),
    "too long": (changed(input_toks=1600), "line 2: 1,600 prompt and 5 output tokens are more than the 1,600 tokens"),
    "meta no JSON": (with_file("meta.json", "{"), "meta.json: is not JSON"),
    "meta no object": (with_file("meta.json", "[]"), "meta.json: is not a JSON object"),
    "no budget": (
        with_meta(engine_kwargs={"max_num_seqs": 8}),
        "meta.json: lacks max_num_batched_tokens (looked in resolved_config.scheduler_config.max_num_batched_tokens "
        "or engine_kwargs.max_num_batched_tokens)",
    ),
    "no batch": (with_meta(engine_kwargs={"max_num_batched_tokens": 64}), "meta.json: lacks max_num_seqs"),
    "bad setting": (
        with_meta(engine_kwargs={"max_num_seqs": 0, "max_num_batched_tokens": 64}),
        "meta.json: 'max_num_seqs': input should be greater than 0 (got 0)",
    ),
    "budget below batch": (
        with_meta(engine_kwargs={"max_num_seqs": 8, "max_num_batched_tokens": 4}),
        "meta.json: 'EngineSpec': max_num_batched_tokens (4) must be at least max_num_seqs (8)",
    ),
    "bad tp": (
        with_meta(engine_kwargs={"max_num_seqs": 8, "max_num_batched_tokens": 64, "tensor_parallel_size": "two"}),
        "field 'engine_kwargs.tensor_parallel_size': \"two\" is not a count of GPUs",
    ),
    "bad SLO": (with_meta(slo={"metric": "ttfx"}), "meta.json: 'slo.metric': "),
    "series column": (with_file("timeseries.csv", "t,running\n1,2\n"), "timeseries.csv: "),
    "series empty": (with_file("timeseries.csv", ""), "timeseries.csv: "),
    "series number": (
        with_file("timeseries.csv", "t,running,waiting\n1,2,3\n2,-2,0\n"),
        "timeseries.csv, line 3, field 'running': '-2' is not a non-negative number",
    ),
    "series order": (
        with_file("timeseries.csv", "t,running,waiting\n2,2,3\n1,2,0\n"),
        "timeseries.csv, line 3, field 't': times do not ascend",
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_line_with_its_place(mistake: str, tmp_path: Path) -> None:
    write, expected = MISTAKES[mistake]
    write(tmp_path)
    with pytest.raises(ConfigError) as raised:
        read_run(tmp_path)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'run': no folder '.*nope'"):
        read_run(tmp_path / "nope")
    for name in ("meta.json", "requests.jsonl"):
        folder = write_run(tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=rf"{name}: No such file"):
            read_run(folder)
