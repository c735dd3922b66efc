"""`qlm bench emulator`: requests and engine steps per second of the emulated engine.

One A100 serves llama-3.1-8b on one core, with the lengths of Azure's conversation trace and Poisson arrivals at shares
of its capacity. The compiled engine leaps over the steps between two events; the step-by-step reference
(:mod:`qlm_env.backends.emulator.reference`) runs each of them. Both serve the same requests in the same run.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from qlm_env.backends.emulator.reference import StepEngine, StepRequest, serve_by_steps
from qlm_env.backends.emulator.serve import serve
from qlm_env.cluster import COEFFICIENTS, make_cluster
from qlm_env.requests import RequestTable, reset_state
from qlm_env.scenario import Episodes
from qlm_env.spec import (
    ClusterSpec,
    EmpiricalLengths,
    InstancesSpec,
    MixSpec,
    ModelSpec,
    PoissonArrivals,
    ScenarioSpec,
    SyntheticWorkload,
)
from runners.bench import Figure
from runners.config import BenchEmulatorOptions
from runners.peak_memory import peak_bytes

REPEATS = 5
REFERENCE_REPEATS = 3
REFERENCE_REQUESTS = 2000
"""The first so many requests of every load go through the step-by-step reference as well."""

MEMORY_REQUESTS = 10_000_000
MEMORY_LOAD = 0.9


def measure(options: BenchEmulatorOptions) -> list[Figure]:
    """The figures of every load; with ``options.memory`` also those of one long run in a process of its own.

    Rates are medians over repeats and exclude compilation, workload generation and setting up.
    """
    figures: list[Figure] = []
    for load in options.loads:
        figures += measure_load(load, options.num_requests, options.seed)
    if options.memory:
        figures += measure_memory(MEMORY_REQUESTS, options.seed)
    return figures


def measure_load(load: float, num_requests: int, seed: int) -> list[Figure]:
    """Both engines at one load.

    Raises:
        RuntimeError: the engines disagree.
    """
    scenario = _scenario(load, num_requests)
    requests = Episodes(scenario).requests(seed)
    few = requests[:REFERENCE_REQUESTS].copy().view(np.recarray)
    _serve_compiled(scenario, few)  # compiles
    leaping_few = _median(lambda: _serve_compiled(scenario, few), REPEATS)
    stepping = _median(lambda: _serve_by_steps(scenario, few), REFERENCE_REPEATS)
    if leaping_few.steps != stepping.steps:
        raise RuntimeError(
            f"at load {load:g} the compiled engine took {leaping_few.steps} steps and the step-by-step reference "
            f"{stepping.steps}"
        )
    leaping = _median(lambda: _serve_compiled(scenario, requests), REPEATS)
    where = f"load {load:g}"
    return [
        Figure(name=f"{where}: compiled, requests", value=num_requests / leaping.seconds, unit="requests/s"),
        Figure(name=f"{where}: compiled, engine steps", value=leaping.steps / leaping.seconds, unit="steps/s"),
        Figure(name=f"{where}: step by step, requests", value=len(few) / stepping.seconds, unit="requests/s"),
        Figure(name=f"{where}: step by step, engine steps", value=stepping.steps / stepping.seconds, unit="steps/s"),
        Figure(
            name=f"{where}: speed-up on the same {len(few)} requests",
            value=stepping.seconds / leaping_few.seconds,
            unit="times",
        ),
    ]


def measure_memory(num_requests: int, seed: int) -> list[Figure]:
    """One run of ``num_requests`` in a fresh process: its speed, alone and with making the workload, and memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        workload_s, serve_s, peak_bytes = pool.submit(_long_run, num_requests, seed).result()
    where = f"{num_requests:,} requests at load {MEMORY_LOAD:g}"
    return [
        Figure(name=f"{where}: compiled", value=num_requests / serve_s, unit="requests/s"),
        Figure(name=f"{where}: and making them", value=num_requests / (workload_s + serve_s), unit="requests/s"),
        Figure(name=f"{where}: peak memory", value=peak_bytes / 1e9, unit="GB"),
    ]


def _long_run(num_requests: int, seed: int) -> tuple[float, float, int]:
    """Seconds to make the workload, seconds to serve it, and the peak resident bytes of this process."""
    small = _scenario(MEMORY_LOAD, 10)
    _serve_compiled(small, Episodes(small).requests(seed))  # compiles
    scenario = _scenario(MEMORY_LOAD, num_requests)
    start = time.perf_counter()
    requests = Episodes(scenario).requests(seed)
    workload_s = time.perf_counter() - start
    serve_s = _serve_compiled(scenario, requests).seconds
    return workload_s, serve_s, peak_bytes()


def _scenario(load: float, num_requests: int) -> ScenarioSpec:
    model = ModelSpec(name="llama-3.1-8b", architecture="llama-3.1-8b", context_tokens=16384)
    return ScenarioSpec(
        cluster=ClusterSpec(name="one A100", instances=(InstancesSpec(device="A100"),)),
        workload=SyntheticWorkload(
            name="azure conversations",
            models=(model,),
            mix=(MixSpec(model=model.name, slo_class="batch-1"),),
            num_requests=num_requests,
            arrivals=PoissonArrivals(load=load),
            lengths=EmpiricalLengths(table="azure_conv"),
        ),
    )


class _Run(NamedTuple):
    seconds: float
    steps: int


def _median(run: Callable[[], _Run], repeats: int) -> _Run:
    return statistics.median_low(run() for _ in range(repeats))


def _serve_compiled(scenario: ScenarioSpec, requests: RequestTable) -> _Run:
    fleet = make_cluster(scenario.cluster, scenario.workload.models)
    reset_state(requests)
    start = time.perf_counter()
    serve(fleet, requests, 0, np.inf)
    return _Run(time.perf_counter() - start, int(fleet.engine["tick"][0]))


def _serve_by_steps(scenario: ScenarioSpec, requests: RequestTable) -> _Run:
    fleet = make_cluster(scenario.cluster, scenario.workload.models)
    placement = fleet.placement[0, 0]
    engine = StepEngine(
        coefficients=tuple(float(placement[name]) for name in COEFFICIENTS),
        num_blocks=int(placement["num_blocks"]),
        max_num_seqs=fleet.max_num_seqs,
        max_num_batched_tokens=fleet.max_num_batched_tokens,
        block_size=fleet.block_size,
    )
    columns = (requests[name].tolist() for name in ("arrival_s", "prompt_tokens", "output_tokens"))
    arriving = [StepRequest(row, *values) for row, values in enumerate(zip(*columns, strict=True))]
    start = time.perf_counter()
    serve_by_steps(engine, arriving)
    return _Run(time.perf_counter() - start, engine.steps)
