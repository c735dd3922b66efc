"""The emulator's two engines, recorded the way vLLM's scheduler is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from qlm_env.backends.emulator.prefix_cache import PromptPrefixes
from qlm_env.backends.emulator.reference import Step, StepEngine, StepRequest, serve_by_steps
from qlm_env.backends.emulator.serve import PREEMPTED, SCHEDULE_DTYPE, serve_logged
from qlm_env.backends.emulator.state import FCFS, PLACEMENT_DTYPE, PRIORITY, Fleet, make_fleet, size_prefix_cache
from qlm_env.requests import RequestTable, make_request_table
from tests.fidelity.cases import STEP_S, TOKEN_S, EngineSettings
from tests.fidelity.trace import WRITTEN_OUT_BLOCKS, Run, ScheduledStep


@dataclass
class _RecordingEngine(StepEngine):
    recorded: Run = field(default_factory=Run)

    def schedule(self, now_s: float) -> Step:
        step = super().schedule(now_s)
        if step.chunks or step.preempted:
            scheduled = tuple((chunk.request.row, chunk.tokens, chunk.cached) for chunk in step.chunks)
            preempted = tuple(request.row for request in step.preempted)
            num_free = len(self.pool.free)
            free = tuple(self.pool.free) if num_free <= WRITTEN_OUT_BLOCKS else (-num_free,)
            self.recorded.steps.append(ScheduledStep(now_s, scheduled, preempted, free))
        return step


def run_by_steps(settings: EngineSettings, requests: list[StepRequest]) -> Run:
    """Serve ``requests``, which are changed."""
    engine = _RecordingEngine(
        coefficients=(STEP_S, TOKEN_S, math.inf, 0.0, 0.0, 0.0, 0.0, 0.0),
        num_blocks=settings.num_blocks,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        chunked_prefill=settings.chunked_prefill,
        priority=settings.priority,
        async_scheduling=settings.async_scheduling,
        enable_prefix_caching=settings.enable_prefix_caching,
    )
    serve_by_steps(engine, requests)
    recorded = engine.recorded
    recorded.first_token_s = {r.row: r.first_token_s for r in requests if not math.isnan(r.first_token_s)}
    recorded.finish_s = {r.row: r.finish_s for r in requests if not math.isnan(r.finish_s)}
    recorded.aborted = {r.row for r in requests if r.aborted}
    recorded.final_free_blocks = list(engine.pool.free)
    return recorded


Tick = tuple[list[tuple[int, int]], list[int]]
"""What a step ran, as (row, new tokens) in order, and the rows that were preempted for it, sorted."""


def ticks(run: Run) -> list[Tick]:
    """The steps of a run as the compiled engine counts them: attempts that only preempted belong to the next step."""
    found: list[Tick] = []
    preempted: list[int] = []
    for step in run.steps:
        preempted += step.preempted
        if step.scheduled:
            found.append(([(row, tokens) for row, tokens, _ in step.scheduled], sorted(preempted)))
            preempted = []
    return found


def run_compiled(settings: EngineSettings, requests: list[StepRequest]) -> tuple[list[Tick], RequestTable]:
    """Serve ``requests``, none of which may be aborted, with the compiled engine."""
    table = make_request_table(
        np.array([r.arrival_s for r in requests]),
        np.array([r.prompt for r in requests]),
        np.array([r.output for r in requests]),
        np.zeros(len(requests), int),
        np.array([r.priority for r in requests]),
        np.ones(len(requests)),
    )
    first = np.cumsum([0, *(len(r.prefix) for r in requests)])
    ids = np.array([content for r in requests for content in r.prefix], np.int64)
    fleet = size_prefix_cache(_compiled_engine(settings), table, PromptPrefixes(first, ids, settings.block_size))
    # Every request of every step, one entry each at most, and every preemption.
    log = np.zeros(4 * int((table.prompt_tokens + table.output_tokens).sum()) + 1000, SCHEDULE_DTYPE).view(np.recarray)
    entries = serve_logged(fleet, table, 0, np.inf, log)
    assert entries < len(log)
    found: list[Tick] = [([], []) for _ in range(int(fleet.engine[0].tick))]
    for step, steps, row, tokens in log[:entries].tolist():
        if tokens == PREEMPTED:
            found[step][1].append(row)
        else:
            for tick in range(step, step + steps):
                found[tick][0].append((row, tokens))
    return [(scheduled, sorted(preempted)) for scheduled, preempted in found], table


def _compiled_engine(settings: EngineSettings) -> Fleet:
    placement = np.zeros((1, 1), PLACEMENT_DTYPE).view(np.recarray)
    placement["c0"], placement["c1"], placement["n0"] = STEP_S, TOKEN_S, 1 << 30
    placement["num_blocks"] = settings.num_blocks
    fleet = make_fleet(
        placement,
        host_memory_bytes=np.zeros(1),
        host_kv_bytes=np.zeros(1),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        chunked_prefill=settings.chunked_prefill,
        scheduling_policy=PRIORITY if settings.priority else FCFS,
        async_scheduling=settings.async_scheduling,
        prefix_caching=settings.enable_prefix_caching,
    )
    fleet.engine["active_model"] = 0
    fleet.engine["free_blocks"] = settings.num_blocks
    return fleet
