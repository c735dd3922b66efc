"""vLLM V1's scheduling loop, one step and one request at a time, in plain Python.

What :mod:`.engine` must agree with, and what its speed is measured against: no leaps, no lazy counters, no code
shared with it. Every step schedules from scratch, as ``vllm.v1.core.sched.scheduler.Scheduler.schedule`` does.
``tests/fidelity`` holds it against that class, step by step; the vLLM version is 0.32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qlm_env.backends.emulator.reference_blocks import BlockContent, BlockPool


@dataclass(eq=False)
class StepRequest:
    """A request and its progress; ``priority`` is its SLO class, ``factor`` its service-time factor."""

    row: int
    arrival_s: float
    prompt: int
    output: int
    priority: int = 0
    factor: float = 1.0
    prefix: tuple[int, ...] = ()
    """Contents of its first full blocks, where other requests may have the same. An id stands for a block and
    all before it, as the hash ids of the Mooncake traces do. Blocks beyond are like no other request's."""
    abort_s: float = math.inf
    """When its client goes away."""
    computed: int = 0
    """Tokens whose KV is cached, or will be when the step in progress ends."""
    generated: int = 0
    """Output tokens received."""
    in_flight: int = 0
    """Output tokens that the step in progress will yield: 0 or 1."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks it holds, in the order of its tokens."""
    entered_blocks: int = 0
    """How many of them can be found by their content."""
    prefilling: bool = True
    aborted: bool = False
    first_token_s: float = math.nan
    finish_s: float = math.nan
    scheduled_s: float = math.nan
    preemptions: int = 0
    lost: int = 0
    """Cached tokens at its last preemption."""
    recomputed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens known so far; those not yet computed are to be computed next."""
        return self.prompt + self.generated

    def content(self, index: int) -> BlockContent:
        """What its block number ``index`` holds once it is full."""
        return self.prefix[index] if index < len(self.prefix) else (self.row, index)


@dataclass(frozen=True)
class Chunk:
    """A request's part of a step."""

    request: StepRequest
    tokens: int
    """New tokens."""
    cached: int
    """Tokens computed before this step."""
    decode: bool
    """One token after all others, rather than a part of a prompt or of what a preemption lost."""
    samples: bool
    """It computes all there is, so that an output token follows."""


@dataclass
class Step:
    """One step: what is computed in it, in vLLM's order, and who was preempted for it."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[StepRequest] = field(default_factory=list)
    duration_s: float = 0.0
    end_s: float = math.nan


@dataclass
class StepEngine:
    """One engine: its settings, as vLLM names them, and its two queues."""

    coefficients: tuple[float, ...]
    """c0, c1, n0, c2, c3, c4, c5, c6 of the step time (:mod:`.latency`)."""
    num_blocks: int
    """Usable KV blocks: one less than vLLM's ``num_gpu_blocks``."""
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    chunked_prefill: bool = True
    priority: bool = False
    async_scheduling: bool = False
    """Schedule the next step while one is in progress (:func:`serve_by_steps`)."""
    enable_prefix_caching: bool = False
    token_curve: Sequence[tuple[float, float]] = ()
    """New tokens and seconds of each knot of the curve that takes the place of c0, c1, n0 and c2, if there is one."""
    chunk_s: float = 0.0
    """What a step with a prefill chunk takes in addition, with a curve."""
    waiting: list[StepRequest] = field(default_factory=list)
    running: list[StepRequest] = field(default_factory=list)
    steps: int = 0
    preemption_log: list[int] = field(default_factory=list)
    """Rows of the preempted requests, in order."""
    log: list[Step] = field(default_factory=list)
    """Every step taken, and the attempts at one that only preempted."""

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks)

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold ``tokens``."""
        return math.ceil(tokens / self.block_size)

    def add(self, request: StepRequest) -> None:
        """A request arrives."""
        self.waiting.append(request)
        self.sort_waiting()

    def sort_waiting(self) -> None:
        """The ``priority`` policy keeps the queue in order; FCFS leaves it as it is."""
        if self.priority:
            self.waiting.sort(key=lambda r: (r.priority, r.arrival_s, r.row))

    def abort(self, request: StepRequest) -> None:
        """A request is taken out, running or waiting; what the step in progress computes for it is dropped."""
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self.release(request)
        request.aborted = True

    # ------------------------------------------------------------------ blocks
    def release(self, request: StepRequest) -> None:
        """A request gives its blocks back."""
        self.pool.give_back(request.blocks)
        request.blocks = []
        request.entered_blocks = 0

    def grow(self, request: StepRequest, tokens: int) -> bool:
        """Blocks for the first ``tokens`` of a running request, if there are enough."""
        missing = self.blocks_for(tokens) - len(request.blocks)
        if missing > len(self.pool.free):
            return False
        request.blocks += self.pool.take(missing)
        self.enter_full_blocks(request, min(tokens, request.num_tokens))
        return True

    def enter_full_blocks(self, request: StepRequest, tokens: int) -> None:
        """Make the full blocks of its first ``tokens`` findable. vLLM does so before they are computed."""
        if self.enable_prefix_caching:
            for index in range(request.entered_blocks, tokens // self.block_size):
                self.pool.enter(request.blocks[index], request.content(index))
                request.entered_blocks = index + 1

    def find_prefix(self, request: StepRequest) -> list[int]:
        """Blocks that already hold the beginning of a request; at least its last token is left to compute."""
        if not self.enable_prefix_caching:
            return []
        full_blocks = (request.num_tokens - 1) // self.block_size
        return self.pool.find(request.content(index) for index in range(full_blocks))

    # ------------------------------------------------------------------ one step
    def schedule(self, now_s: float) -> Step:
        """Decide the next step: running requests first, then, unless one was preempted, waiting requests.

        The step may be empty. A request's computed tokens count as computed from now on.
        """
        step = Step()
        budget = self.schedule_running(step)
        if not step.preempted:
            self.admit(step, budget, now_s)
        if step.chunks:
            step.duration_s = self.step_time_s(step.chunks)
            self.steps += 1
        for chunk in step.chunks:
            chunk.request.computed += chunk.tokens
            if chunk.samples:
                chunk.request.in_flight += 1
                chunk.request.prefilling = False
        self.preemption_log += [request.row for request in step.preempted]
        if step.chunks or step.preempted:
            self.log.append(step)
        return step

    def schedule_running(self, step: Step) -> int:
        """Give every running request its next tokens, preempting where blocks run out; returns the budget left."""
        budget = self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            if request.in_flight and request.generated + request.in_flight == request.output:
                # The step in progress yields its last token. It keeps its place until then.
                index += 1
                continue
            tokens = min(request.num_tokens + request.in_flight - request.computed, budget)
            while not self.grow(request, request.computed + tokens):
                if self.priority:
                    victim = max(self.running, key=lambda r: (r.priority, r.arrival_s))
                else:
                    victim = self.running[-1]
                if self.running.index(victim) < index:
                    index -= 1
                for chunk in [chunk for chunk in step.chunks if chunk.request is victim]:
                    step.chunks.remove(chunk)
                    budget += chunk.tokens
                self.preempt(victim)
                step.preempted.append(victim)
                if victim is request:
                    return budget
            step.chunks.append(self.chunk(request, tokens))
            budget -= tokens
            index += 1
        return budget

    def preempt(self, request: StepRequest) -> None:
        """Back to the head of the queue, everything computed lost.

        If it is part of the step in progress, its output token still arrives; if that is its last, nothing
        has to be computed again.
        """
        self.running.remove(request)
        self.release(request)
        finishing = request.generated + request.in_flight == request.output
        request.lost = 0 if finishing else request.computed
        request.recomputed += request.lost
        request.computed = 0
        request.in_flight = 0
        request.preemptions += 1
        self.waiting.insert(0, request)
        self.sort_waiting()

    def admit(self, step: Step, budget: int, now_s: float) -> None:
        """Admit waiting requests in order, until one finds no room.

        vLLM passes over a request whose output from before its preemption is still to come. With one step in
        progress that cannot be: its output is here before the next step is scheduled.
        """
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            found = self.find_prefix(request)
            computed = len(found) * self.block_size
            left = request.num_tokens - computed
            if not self.chunked_prefill and left > budget:
                break
            needed = self.blocks_for(request.num_tokens) - len(found)
            if needed + self.pool.num_free_among(found) > len(self.pool.free):
                break
            tokens = min(left, budget)
            self.waiting.pop(0)
            self.running.append(request)
            self.pool.share(found)
            request.blocks = found
            request.entered_blocks = len(found)
            self.grow(request, computed + tokens)
            request.computed = computed
            request.recomputed -= min(computed, request.lost)
            request.prefilling = request.generated == 0 or left > 1
            if math.isnan(request.scheduled_s):
                request.scheduled_s = now_s
            step.chunks.append(self.chunk(request, tokens))
            budget -= tokens

    def chunk(self, request: StepRequest, tokens: int) -> Chunk:
        """The next ``tokens`` of a request, as part of a step."""
        complete = request.computed + tokens == request.num_tokens + request.in_flight
        return Chunk(request, tokens, request.computed, not request.prefilling, complete)

    def step_time_s(self, chunks: list[Chunk]) -> float:
        """Seconds a step takes, by the formula of :mod:`.latency`, term by term."""
        c0, c1, n0, c2, c3, c4, c5, c6 = self.coefficients
        mixed = any(not chunk.decode for chunk in chunks)
        new_tokens = sum(chunk.tokens for chunk in chunks)
        time_s = c0 + c1 * min(new_tokens, n0) + c2 * max(0, new_tokens - n0)
        if self.token_curve:
            tokens, seconds = zip(*self.token_curve, strict=True)
            time_s = float(np.interp(new_tokens, tokens, seconds)) + c2 * max(0.0, new_tokens - tokens[-1])
            time_s += self.chunk_s if mixed else 0.0
        for chunk in chunks:
            if chunk.decode:
                time_s += c3 * chunk.cached + c5 + (c6 * chunk.cached if mixed else 0.0)
            else:
                time_s += c4 * chunk.tokens * (chunk.cached + chunk.tokens / 2)
        batch = [r.factor for r in self.running if r.generated + r.in_flight < r.output]
        return time_s * (sum(batch) / len(batch))

    def finish(self, step: Step) -> None:
        """A step has ended: output tokens arrive, and requests that have all of them leave."""
        for chunk in step.chunks:
            request = chunk.request
            if request.aborted or not chunk.samples:
                continue
            request.generated += 1
            if math.isnan(request.first_token_s):
                request.first_token_s = step.end_s
            # A request preempted meanwhile holds no blocks, starts over and expects no token.
            running = bool(request.blocks)
            if running:
                request.in_flight -= 1
                self.enter_full_blocks(request, request.computed - request.in_flight)
            if request.generated == request.output:
                request.finish_s = step.end_s
                (self.running if running else self.waiting).remove(request)
                self.release(request)


def serve_by_steps(engine: StepEngine, requests: list[StepRequest]) -> None:
    """Serve ``requests`` (in order of arrival) until each is finished or aborted.

    Without ``async_scheduling`` a step is scheduled when the one before has ended. With it, a step is scheduled
    when the one before starts, knowing the arrivals until then but not what that one will yield; if there is
    nothing to schedule then, again when that one has ended. So vLLM's ``EngineCore.step`` and
    ``step_with_batch_queue``, without the time they take themselves.
    """
    pending = list(requests)
    leaving = sorted((r for r in requests if r.abort_s < math.inf), key=lambda r: r.abort_s)
    now_s = 0.0
    ahead: Step | None = None
    while pending or engine.waiting or engine.running or ahead:
        if not engine.waiting and not engine.running and not ahead:
            now_s = max(now_s, pending[0].arrival_s)
        while pending and pending[0].arrival_s <= now_s:
            engine.add(pending.pop(0))
        _abort_until(engine, leaving, now_s)
        step = engine.schedule(now_s)
        step.end_s = (ahead.end_s if ahead else now_s) + step.duration_s
        if engine.async_scheduling and step.chunks and not ahead:
            ahead = step
            continue
        ended = ahead or step
        now_s = ended.end_s
        # Clients that went away during the step are seen first, new requests after its output.
        _abort_until(engine, leaving, now_s)
        engine.finish(ended)
        ahead = step if ahead and step.chunks else None


def _abort_until(engine: StepEngine, leaving: list[StepRequest], now_s: float) -> None:
    """Abort the requests in the engine whose client has gone by ``now_s``."""
    for request in [r for r in leaving if r.abort_s <= now_s]:
        if request in engine.running or request in engine.waiting:
            engine.abort(request)
            leaving.remove(request)
        elif not math.isnan(request.finish_s):
            leaving.remove(request)
