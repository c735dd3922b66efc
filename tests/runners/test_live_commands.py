"""`qlm profile measure` and `qlm profile record` against a stand-in server: what they write, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.step_grid import StepGrid
from qlm_env.backends.vllm.step_times import Measurement, StepMeter, measure_steps
from qlm_env.profiles.load import read_profile
from qlm_env.profiles.step_tables import REGIMES, read_step_table
from runners.cli import main
from tests.backends.vllm.fake_server import FakeServer
from tests.backends.vllm.test_client import closed_port
from tests.backends.vllm.test_step_times import OVERHEAD_S, step_s
from tests.backends.vllm.virtual_engine import VirtualEngine

Command = Callable[..., list[str]]

ROOT = Path(__file__).parents[2]

SMALL_GRID = (
    "prefill_tokens=[8,16,24,32,48,64,96,128]",
    "decode_seqs=[1,2,4]",
    "context_lens=[8,32,64]",
    "repeats=1",
)
NUMBERS = ("cold_start_s=40", "stage_s=41", "wake_s=1", "sleep_s=1", "kv_swap_bytes_per_s=1e9")
BYTES = ("weight_bytes=2e7", "kv_bytes_per_token=3072")
NAMES = ("device=CPU", "architecture=tiny")


def measure(server_url: str, out: Path, *more: str) -> list[str]:
    return ["profile", "measure", f"url={server_url}", f"out={out}", *NAMES, *more]


def record(server_url: str, out: Path, *more: str) -> list[str]:
    lengths = "workload.lengths={kind: uniform, prompt_min_tokens: 5, prompt_max_tokens: 9, " + (
        "output_min_tokens: 2, output_max_tokens: 4}"
    )
    rate = ("~workload.arrivals.load", "workload.arrivals.rate_per_s=200")
    return [
        *("profile", "record", f"url={server_url}", f"out={out}", "workload.num_requests=12", "tick_s=0.05"),
        *("~workload.lengths", f"+{lengths}", *rate, *more),
    ]


def error_line(argv: Sequence[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert main(argv) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qlm")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def virtual_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are measured on an engine with a virtual clock in the place of the server's, and so take exact times."""

    async def measure_virtually(
        meter: StepMeter, grid: StepGrid, repeats: int, advance: Callable[[str], None]
    ) -> Measurement:
        engine = cast(VllmClient, VirtualEngine(meter.facts, step_s, OVERHEAD_S))
        return await measure_steps(StepMeter(engine, meter.facts, np.random.default_rng(0)), grid, repeats, advance)

    monkeypatch.setattr("runners.profile_measure.measure_steps", measure_virtually)


@pytest.mark.usefixtures("virtual_steps")
def test_measuring_writes_a_table_and_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert main(measure(server.url, tmp_path / "out", *SMALL_GRID, *NUMBERS, *BYTES)) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cpu_tiny_tp1.yaml",
        "measurement.json",
        "steps.csv",
    ]
    steps = read_step_table(tmp_path / "out" / "steps.csv", {})
    assert {REGIMES[index] for index in steps.regime} == set(REGIMES)
    profile = read_profile(tmp_path / "out" / "cpu_tiny_tp1.yaml")
    assert profile.num_gpu_blocks.value == 1000
    assert profile.num_gpu_blocks.kind == "measured"
    assert profile.context_tokens.value == 512
    assert profile.weight_bytes.value == 2e7
    assert (profile.c0_s.kind, profile.c0_s.source) == (
        "fitted",
        f"fit to {len(steps.latency_s)} steps measured over HTTP on vLLM 0.32.0",
    )
    fitted = [
        getattr(profile, name).value for name in ("c0_s", "c1_s_per_token", "c2_s_per_token", "c3_s_per_kv_token")
    ]
    assert fitted == pytest.approx([0.005, 1e-4, 1e-4, 1e-6], rel=0.1)
    facts = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert facts["engine"]["max_num_seqs"] == 4
    assert facts["front_end_overhead_s"] == pytest.approx(OVERHEAD_S, abs=5e-5)
    assert "decode" in capsys.readouterr().out


@pytest.mark.usefixtures("virtual_steps")
def test_a_missing_number_leaves_the_table_to_fit_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        line = error_line(measure(server.url, tmp_path / "out", *SMALL_GRID, *NUMBERS), capsys)
    assert "no weight_bytes, kv_bytes_per_token for tiny on CPU" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["measurement.json", "steps.csv"]


def test_recording_writes_a_run(tmp_path: Path) -> None:
    with FakeServer() as server:
        assert main(record(server.url, tmp_path / "out")) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert {row["slo_class"] for row in rows} <= {"interactive", "batch-1", "batch-2"}
    asked = [(len(body["prompt"]), body["max_tokens"]) for body in server.bodies]
    assert sorted((row["input_toks"], row["output_toks"]) for row in rows) == sorted(asked)
    for row in rows:
        stamps = [row[name] for name in ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")]
        assert stamps == sorted(stamps)
    arrivals = [row["arrival_time"] for row in rows]
    assert arrivals == sorted(arrivals)
    # One clock: arrivals and the stamps of when requests were sent are the same distance apart.
    distance = [row["queued_ts"] - row["arrival_time"] for row in rows]
    assert max(distance) - min(distance) < 1e-6
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["model"], meta["num_requests"], meta["kv_cache"]["num_gpu_blocks"]) == ("tiny", 12, 1000)
    assert meta["engine_kwargs"]["max_num_batched_tokens"] == 128
    header, *ticks = (tmp_path / "out" / "timeseries.csv").read_text().splitlines()
    assert header == "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct"
    assert ticks[0].endswith(",3,2,25.00")
    assert all(float(tick.split(",")[0]) >= 0 for tick in ticks)


def test_a_recorded_run_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "requests.jsonl").write_text("precious")
    assert "holds a recorded run already; name another folder" in error_line(record("http://h:1", tmp_path), capsys)


@pytest.mark.parametrize("command", [measure, record])
class TestBadServers:
    """Each is one line and leaves nothing behind."""

    def check(self, argv: list[str], out: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert message in error_line(argv, capsys)
        assert not out.exists()

    def test_nothing_there(self, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        self.check(command(f"http://127.0.0.1:{closed_port()}", out), out, "nothing answers at http://127", capsys)

    def test_bad_url(self, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.check(command("localhost", tmp_path / "out"), tmp_path / "out", "'url': expected an address", capsys)

    def test_another_model(self, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        with FakeServer() as server:
            self.check(command(server.url, out, "model=big"), out, "does not serve big; it serves tiny", capsys)

    def test_missing_endpoint(self, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        with FakeServer(missing=frozenset({"/metrics"})) as server:
            self.check(command(server.url, out), out, "/metrics answers 404", capsys)

    def test_death_on_the_way(self, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        with FakeServer(dies_after_tokens=15) as server:
            self.check(command(server.url, out), out, "the server has stopped", capsys)

    def test_keys(
        self,
        command: Command,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        out = tmp_path / "out"
        monkeypatch.setenv("MY_KEY", "wr0ng")
        with FakeServer(api_key="s3cret") as server:
            self.check(command(server.url, out), out, "it wants an API key; name the environment variable", capsys)
            self.check(command(server.url, out, "api_key_env=MY_KEY"), out, "answers 401", capsys)
            unset = "'api_key_env': the environment variable NO_SUCH_KEY is not set"
            self.check(command(server.url, out, "api_key_env=NO_SUCH_KEY"), out, unset, capsys)


def test_an_api_key_is_in_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    with FakeServer(api_key="s3cret") as server:
        assert main(record(server.url, tmp_path / "out", "api_key_env=MY_KEY")) == 0
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "s3cret" not in written + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prefill_tokens=[256]", "'prefill_tokens': 256 tokens take several steps of the server's max_num_batched"),
        ("prefixes=[480]", "a prompt of 608 tokens and one more exceed the context of 512 of tiny"),
        ("prefixes=[100]", "'prefixes': expected multiples of the server's block size 16"),
        ("decode_seqs=[5]", "'decode_seqs': 5 exceed the server's max_num_seqs=4"),
        ("context_lens=[511]", "'context_lens': not even 1 x 511 tokens fit the context of 512"),
        ("device=null", "missing key 'device'"),
        ("repeats=0", "'repeats': input should be greater than 0"),
        ("like=nope.yaml", "profile nope.yaml: "),
    ],
)
def test_what_a_server_cannot_be_measured_for(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer() as server:
        assert message in error_line(measure(server.url, tmp_path / "out", override), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["workload.models.0.context_tokens=100000", "workload.lengths.output_max_tokens=600"],
            "more than the context",
        ),
        (["workload=smoke"], "'workload.models': one server serves one model (got vicuna-7b, vicuna-13b)"),
    ],
)
def test_workloads_a_server_cannot_serve(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer() as server:
        assert message in error_line(record(server.url, tmp_path / "out", *overrides), capsys)
    assert not (tmp_path / "out").exists()


def test_a_load_needs_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(max_model_len=4096) as server:
        line = error_line(["profile", "record", f"url={server.url}", f"out={tmp_path / 'out'}"], capsys)
    assert "'workload.arrivals.load' is a share of the server's capacity, which takes a profile=FILE of it" in line


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with FakeServer() as server:
        server.TOKEN_S = 0.2  # type: ignore[misc]
        process = subprocess.Popen(
            [sys.executable, "-m", "runners", *measure(server.url, out)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert process.stderr is not None
        assert process.stderr.readline().startswith("[1/")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read().splitlines()[-1] == "qlm: interrupted"
        process.stderr.close()
    assert not out.exists()
