"""vLLM V1's scheduling loop, one step and one request at a time, in plain Python.

What :mod:`.engine` must agree with, and what its speed is measured against: no leaps, no lazy counters, no code
shared with it. Every step schedules from scratch, as ``vllm.v1.core.sched.scheduler.Scheduler.schedule`` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(eq=False)
class StepRequest:
    """A request and its progress; ``priority`` is its SLO class, ``factor`` its service-time factor."""

    row: int
    arrival_s: float
    prompt: int
    output: int
    priority: int = 0
    factor: float = 1.0
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    """KV blocks it holds."""
    prefilling: bool = True
    first_token_s: float = math.nan
    finish_s: float = math.nan
    scheduled_s: float = math.nan
    preemptions: int = 0
    recomputed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens known so far; those not yet computed are to be computed next."""
        return self.prompt + self.generated


@dataclass
class StepEngine:
    """One engine: its settings, as vLLM names them, and its two queues."""

    coefficients: tuple[float, ...]
    """c0, c1, n0, c2, c3, c4, c5 of the step time (:mod:`.latency`)."""
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    chunked_prefill: bool = True
    priority: bool = False
    waiting: list[StepRequest] = field(default_factory=list)
    running: list[StepRequest] = field(default_factory=list)
    steps: int = 0
    preemption_log: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_blocks = self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold ``tokens``."""
        return math.ceil(tokens / self.block_size)

    def hold(self, request: StepRequest, tokens: int) -> None:
        """Give a request the blocks for ``tokens``; 0 frees what it has."""
        self.free_blocks += request.blocks
        request.blocks = self.blocks_for(tokens)
        self.free_blocks -= request.blocks

    def add(self, request: StepRequest) -> None:
        """A request arrives."""
        self.waiting.append(request)
        if self.priority:
            self.waiting.sort(key=lambda r: (r.priority, r.arrival_s, r.row))

    def preempt(self, request: StepRequest) -> None:
        """Back to the head of the queue, everything computed lost."""
        self.running.remove(request)
        self.hold(request, 0)
        request.recomputed += request.computed
        request.computed = 0
        request.prefilling = True
        request.preemptions += 1
        self.preemption_log.append(request.row)
        self.waiting.insert(0, request)
        if self.priority:
            self.waiting.sort(key=lambda r: (r.priority, r.arrival_s, r.row))

    def schedule(self, now_s: float) -> list[tuple[StepRequest, int]]:
        """The requests of the next step with their new tokens."""
        scheduled: list[tuple[StepRequest, int]] = []
        budget = self.max_num_batched_tokens
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            tokens = min(request.num_tokens - request.computed, budget)
            while True:
                needed = self.blocks_for(request.computed + tokens) - request.blocks
                if needed <= self.free_blocks:
                    break
                if self.priority:
                    victim = max(self.running, key=lambda r: (r.priority, r.arrival_s))
                else:
                    victim = self.running[-1]
                if self.running.index(victim) < index:
                    index -= 1
                for entry in [entry for entry in scheduled if entry[0] is victim]:
                    scheduled.remove(entry)
                    budget += entry[1]
                self.preempt(victim)
                preempted = True
                if victim is request:
                    break
            if request not in self.running:
                break
            self.hold(request, request.computed + tokens)
            scheduled.append((request, tokens))
            budget -= tokens
            index += 1
        while self.waiting and not preempted and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if self.blocks_for(request.num_tokens) > self.free_blocks:
                break
            tokens = request.num_tokens - request.computed
            if not self.chunked_prefill and tokens > budget:
                break
            tokens = min(tokens, budget)
            self.waiting.pop(0)
            self.running.append(request)
            self.hold(request, request.computed + tokens)
            if math.isnan(request.scheduled_s):
                request.scheduled_s = now_s
            scheduled.append((request, tokens))
            budget -= tokens
        return scheduled

    def step_time_s(self, scheduled: list[tuple[StepRequest, int]]) -> float:
        """Seconds the step takes, by the formula of :mod:`.latency`, term by term."""
        c0, c1, n0, c2, c3, c4, c5 = self.coefficients
        new_tokens = sum(tokens for _, tokens in scheduled)
        time_s = c0 + c1 * min(new_tokens, n0) + c2 * max(0, new_tokens - n0)
        for request, tokens in scheduled:
            if request.prefilling:
                time_s += c4 * tokens * (request.computed + tokens / 2)
            else:
                time_s += c3 * request.computed + c5
        return time_s * sum(r.factor for r in self.running) / len(self.running)

    def step(self, now_s: float) -> float:
        """Run one step from ``now_s``; returns when it ends."""
        scheduled = self.schedule(now_s)
        if not scheduled:
            return now_s
        end_s = now_s + self.step_time_s(scheduled)
        self.steps += 1
        for request, tokens in scheduled:
            request.computed += tokens
            if request.computed < request.num_tokens:
                continue
            request.prefilling = False
            request.generated += 1
            if math.isnan(request.first_token_s):
                request.first_token_s = end_s
            if request.generated == request.output:
                request.finish_s = end_s
                self.hold(request, 0)
                self.running.remove(request)
        return end_s


def serve_by_steps(engine: StepEngine, requests: list[StepRequest]) -> None:
    """Serve ``requests`` (in order of arrival) to completion."""
    pending = list(requests)
    now_s = 0.0
    while pending or engine.waiting or engine.running:
        if not engine.waiting and not engine.running:
            now_s = max(now_s, pending[0].arrival_s)
        while pending and pending[0].arrival_s <= now_s:
            engine.add(pending.pop(0))
        now_s = engine.step(now_s)
