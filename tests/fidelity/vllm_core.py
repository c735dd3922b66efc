"""vLLM's own scheduler on a virtual clock.

The loop around it follows ``vllm.v1.engine.core.EngineCoreProc``: ``run_busy_loop`` takes in what clients sent and
calls ``step`` or, with async scheduling, ``step_with_batch_queue``. The device runs one batch after another, and
neither scheduling nor passing messages takes time. A stand-in samples a token wherever the model would.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from qlm_env.backends.emulator.reference import StepRequest
from tests.fidelity.cases import STEP_S, TOKEN_S, EngineSettings
from tests.fidelity.trace import WRITTEN_OUT_BLOCKS, Run, ScheduledStep

MAX_MODEL_LEN = 65536
MAX_CALLS = 200_000
"""Calls of the scheduler after which a run counts as stuck."""


def make_model_folder(folder: Path) -> Path:
    """The smallest description of a model that vLLM accepts; there are no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 128,
        "max_position_embeddings": MAX_MODEL_LEN,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class _NoStructuredOutput:
    """The scheduler asks it about every token; plain requests have no grammar."""

    def accept_tokens(self, request: Request, token_ids: list[int]) -> bool:
        return True


class _Recording:
    """Notes the order of preemptions, which the scheduler's output does not tell."""

    preempted_rows: list[int]

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.preempted_rows.append(int(request.request_id))
        super()._preempt_request(request, *args, **kwargs)


class _RecordingScheduler(_Recording, Scheduler):
    pass


class _RecordingAsyncScheduler(_Recording, AsyncScheduler):
    pass


def make_scheduler(model_folder: Path, settings: EngineSettings) -> _RecordingScheduler | _RecordingAsyncScheduler:
    """vLLM's scheduler with a KV cache of one full-attention group."""
    num_gpu_blocks = settings.num_blocks + 1
    model = ModelConfig(
        model=str(model_folder),
        tokenizer=str(model_folder),
        skip_tokenizer_init=True,
        dtype="float32",
        seed=0,
        max_model_len=settings.max_model_len,
    )
    scheduler = SchedulerConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        enable_chunked_prefill=settings.chunked_prefill,
        is_encoder_decoder=False,
        async_scheduling=settings.async_scheduling,
        policy="priority" if settings.priority else "fcfs",
    )
    cache = CacheConfig(block_size=settings.block_size, enable_prefix_caching=settings.enable_prefix_caching)
    cache.num_gpu_blocks = num_gpu_blocks
    config = VllmConfig(
        model_config=model,
        cache_config=cache,
        scheduler_config=scheduler,
        device_config=DeviceConfig(device="cpu"),
    )
    # The CPU platform turns it off; the scheduler itself does not depend on the platform.
    config.scheduler_config.async_scheduling = settings.async_scheduling
    assert config.max_concurrent_batches == 1 + settings.async_scheduling
    attention = FullAttentionSpec(block_size=settings.block_size, num_kv_heads=1, head_size=64, dtype=torch.float32)
    made = (_RecordingAsyncScheduler if settings.async_scheduling else _RecordingScheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_gpu_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], attention)],
        ),
        structured_output_manager=_NoStructuredOutput(),
        block_size=settings.block_size,
        log_stats=False,
    )
    made.preempted_rows = []
    return made


def prompt_tokens(request: StepRequest, block_size: int) -> list[int]:
    """Token ids such that two blocks are equal exactly where the requests' block contents are."""
    shared = [2 * (content * block_size + offset) for content in request.prefix for offset in range(block_size)]
    return shared + [own_token(request.row, position) for position in range(len(shared), request.prompt)]


def own_token(row: int, position: int) -> int:
    """A token that no other request has anywhere."""
    return 2 * (row * MAX_MODEL_LEN + position) + 1


class VirtualCore:
    """One engine core serving ``requests``; :meth:`run` may be called once."""

    def __init__(self, model_folder: Path, settings: EngineSettings, requests: list[StepRequest]) -> None:
        self.settings = settings
        self.scheduler = make_scheduler(model_folder, settings)
        self.hasher = None
        if settings.enable_prefix_caching:
            init_none_hash(sha256)
            self.hasher = get_request_block_hasher(settings.block_size, sha256)
        arrivals = [(r.arrival_s, "add", r) for r in requests]
        aborts = [(r.abort_s, "abort", r) for r in requests if r.abort_s < math.inf]
        sent = sorted(arrivals + aborts, key=lambda message: message[0])
        self.input_queue = deque(sent)
        self.aborts_queue = deque(message for message in sent if message[1] == "abort")
        self.batch_queue: deque[tuple[SchedulerOutput, ModelRunnerOutput, float]] = deque()
        self.now_s = 0.0
        self.device_free_s = 0.0
        self.calls = 0
        self.recorded = Run()

    def run(self) -> Run:
        """Serve everything."""
        while self._process_input_queue():
            if self.settings.async_scheduling:
                self._step_with_batch_queue()
            else:
                self._step()
        self.recorded.final_free_blocks = self._free_queue()
        return self.recorded

    # ------------------------------------------------------------------ messages
    def _process_input_queue(self) -> bool:
        """Take in what has been sent by now; without work, wait for something. False when nothing will come."""
        while not (self.scheduler.has_requests() or self.batch_queue):
            if not self.input_queue:
                return False
            self.now_s = max(self.now_s, self.input_queue[0][0])
            self._handle(*self.input_queue.popleft())
        while self.input_queue and self.input_queue[0][0] <= self.now_s:
            self._handle(*self.input_queue.popleft())
        return True

    def _handle(self, sent_s: float, kind: str, request: StepRequest) -> None:
        if kind == "abort":
            self._abort(request)
            return
        self.scheduler.add_request(
            Request(
                request_id=f"{request.row:06}",
                prompt_token_ids=prompt_tokens(request, self.settings.block_size),
                sampling_params=SamplingParams(max_tokens=request.output, ignore_eos=True),
                pooling_params=None,
                arrival_time=request.arrival_s,
                priority=request.priority,
                block_hasher=self.hasher,
            )
        )

    def _process_aborts_queue(self) -> None:
        while self.aborts_queue and self.aborts_queue[0][0] <= self.now_s:
            self._abort(self.aborts_queue.popleft()[2])

    def _abort(self, request: StepRequest) -> None:
        """vLLM aborts those that come together in the order of a set of strings; here it is that of sending."""
        if self.scheduler.finish_requests([f"{request.row:06}"], RequestStatus.FINISHED_ABORTED):
            self.recorded.aborted.add(request.row)

    # ------------------------------------------------------------------ steps
    def _step(self) -> None:
        output, sampled, end_s = self._schedule()
        self._update(output, sampled, end_s)

    def _step_with_batch_queue(self) -> None:
        if self.scheduler.has_requests():
            self.batch_queue.appendleft(self._schedule())
            executed = self.batch_queue[0][0].total_num_scheduled_tokens > 0
            if len(self.batch_queue) < 2 and (executed or self.scheduler.has_requests()):
                return
        self._update(*self.batch_queue.pop())

    def _schedule(self) -> tuple[SchedulerOutput, ModelRunnerOutput, float]:
        """Schedule and start a batch: what was scheduled, what it will yield, when it ends."""
        self.calls += 1
        assert self.calls < MAX_CALLS, "the run does not come to an end"
        self.scheduler.preempted_rows = []
        output = self.scheduler.schedule()
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        running = output.scheduled_cached_reqs
        computed.update(zip(running.req_ids, running.num_computed_tokens, strict=True))
        scheduled = tuple((int(i), tokens, computed[i]) for i, tokens in output.num_scheduled_tokens.items())
        preempted = tuple(self.scheduler.preempted_rows)
        if scheduled or preempted:
            num_free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
            free = tuple(self._free_queue()) if num_free <= WRITTEN_OUT_BLOCKS else (-num_free,)
            self.recorded.steps.append(ScheduledStep(self.now_s, scheduled, preempted, free))
        if output.total_num_scheduled_tokens:
            start_s = max(self.now_s, self.device_free_s)
            self.device_free_s = start_s + (STEP_S + TOKEN_S * output.total_num_scheduled_tokens)
        samples = [not self.scheduler.requests[i].is_prefill_chunk for i in output.num_scheduled_tokens]
        tokens = [
            [own_token(row, cached + new)] if sample else []
            for (row, new, cached), sample in zip(scheduled, samples, strict=True)
        ]
        ids = list(output.num_scheduled_tokens)
        sampled = ModelRunnerOutput(ids, {name: index for index, name in enumerate(ids)}, tokens)
        # An empty batch is done at once.
        return output, sampled, self.device_free_s if ids else self.now_s

    def _update(self, output: SchedulerOutput, sampled: ModelRunnerOutput, end_s: float) -> None:
        """Wait for a batch and hand its tokens to the scheduler."""
        self.now_s = max(self.now_s, end_s)
        self._process_aborts_queue()
        for client in self.scheduler.update_from_output(output, sampled).values():
            for result in client.outputs:
                row = int(result.request_id)
                self.recorded.first_token_s.setdefault(row, self.now_s)
                if result.finish_reason is not None:
                    self.recorded.finish_s[row] = self.now_s

    def _free_queue(self) -> list[int]:
        pool = self.scheduler.kv_cache_manager.block_pool
        return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


def quiet() -> None:
    """Keep vLLM's notes on every configuration out of the tests' output."""
    logging.getLogger("vllm").setLevel(logging.ERROR)
