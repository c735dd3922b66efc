"""One instance as it lives: an engine's queue, the batch on its server, and its comings and goings.

Everything here runs in the backend's event loop. Methods without ``async`` take effect at once; what needs time goes
on in tasks, and everything that happens is told by an :class:`~.mirror.Effect`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qlm_env.backends.vllm.client import Completion, CompletionRequest
from qlm_env.backends.vllm.errors import RequestRefused, ServerError
from qlm_env.backends.vllm.facts import PREEMPTIONS, WAITING, metric_sum, parse_metrics
from qlm_env.backends.vllm.kv_store import Keeping, remove
from qlm_env.backends.vllm.live_request import LiveRequest
from qlm_env.backends.vllm.mirror import Effect, EffectKind
from qlm_env.backends.vllm.server_pool import PooledServer, ServerPool
from qlm_env.requests import NOWHERE

_log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 1.0
_SERVER_FAULT = 500


@dataclass(frozen=True)
class InstanceLimits:
    """What one instance's engine holds."""

    max_num_seqs: int
    block_size: int
    num_blocks: tuple[int, ...]
    """(M,) KV blocks with each model active."""
    kv_bytes_per_token: tuple[float, ...]
    """(M,)"""
    host_kv_bytes: float
    by_priority: bool


@dataclass(frozen=True)
class Patience:
    """How failures are met."""

    hang_s: float = 120.0
    """An instance fails if its server answers nothing, or a batch gets no token, for so long."""
    first_retry_s: float = 1.0
    """Between a failure and the next try; it doubles with every failure that follows before a model was ready."""
    longest_retry_s: float = 60.0


class Instance:
    """An instance's live side.

    Args:
        tell: takes every effect.
        give_up: takes an error that no retry can mend.
    """

    def __init__(
        self,
        index: int,
        pool: ServerPool,
        patience: Patience,
        tell: Callable[[Effect], None],
        give_up: Callable[[ServerError], None],
    ) -> None:
        self.index = index
        self.pool = pool
        self._patience = patience
        self._tell_effect = tell
        self._give_up = give_up
        self._tasks: set[asyncio.Task[None]] = set()
        self._killing: set[asyncio.Task[None]] = set()
        """What is never cut short, so that no server outlives its failure."""
        self._retry: asyncio.Task[None] | None = None
        self._failures = 0
        self.up = True
        self.model: int | None = None
        self._server: PooledServer | None = None

    # ------------------------------------------------------------------- an episode
    def begin(
        self, limits: InstanceLimits, requests: Sequence[LiveRequest], salt: str, model: int | None, asleep: set[int]
    ) -> None:
        """Start an episode: empty, with ``model`` awake on its server and those ``asleep`` asleep.

        Args:
            requests: (N,) of the episode.
            salt: begins the cache salts of the episode.
        """
        self._limits = limits
        self._requests = requests
        self._salt = salt
        self.up = True
        self.failures_told = 0
        self.model = model
        self._server = None if model is None else self.pool.get(model)
        self._asleep = asleep
        self._staging: int | None = None
        self._batch: dict[int, LiveRequest] = {}
        self._queue: list[LiveRequest] = []
        self._heard_s = time.monotonic()
        self._preemptions: float | None = None
        self._waiting_before = self._waiting = 0.0
        self._spawn(self._watch())

    async def end(self) -> None:
        """Stop whatever is going on; servers stay as they are."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._killing, return_exceptions=True)

    # ------------------------------------------------------------------- requests
    def pull(self, request: LiveRequest) -> None:
        """Let a request of the active model join the engine's queue."""
        if request.kept_at not in (NOWHERE, self.index):
            request.drop_kv()
        self._queue.append(request)
        if self._limits.by_priority:
            self._queue.sort(key=lambda waiting: waiting.order)
        self._admit()

    def evict(self, leaving: Iterable[int], keep_kv: bool) -> None:
        """Let requests go; those that have finished meanwhile are passed over."""
        for index in leaving:
            if index in self._batch:
                self._evict(self._batch[index], keep_kv)
            elif any(waiting.index == index for waiting in self._queue):
                self._queue = [waiting for waiting in self._queue if waiting.index != index]
                self._tell(EffectKind.LEFT, index)
        self._admit()

    def _evict(self, request: LiveRequest, keep_kv: bool) -> None:
        if request.leaving:
            return
        assert request.stream is not None
        assert self._server is not None
        # Closing the stream makes the server drop the request.
        request.stream.cancel()
        if request.restored_tokens:
            # The server says only at the end how much it found; it can have been no more than whole blocks.
            self._count_recomputed(request, request.restored_tokens)
        keep_kv = keep_kv and self._has_host_room(request)
        if self._server.kv_store is None or not keep_kv:
            self._let_go(request, keep_kv)
        elif (keeping := self._server.kv_store.keeping(request.input_ids)) is None or not request.has_new_tokens:
            self._let_go(request, keep=False)
        else:
            request.leaving = True
            self._spawn(self._store_and_let_go(request, request.stream, self._server, keeping))

    def _has_host_room(self, request: LiveRequest) -> bool:
        """Whether host memory holds the request's KV beside what it keeps."""
        per_token = self._limits.kv_bytes_per_token
        kept = [(other.kept_tokens, other.model) for other in self._requests if other.kept_at == self.index]
        kept.append((request.computed_tokens, request.model))
        return request.computed_tokens > 0 and (
            sum(tokens * per_token[model] for tokens, model in kept) <= self._limits.host_kv_bytes
        )

    def _let_go(self, request: LiveRequest, keep: bool) -> None:
        del self._batch[request.index]
        if keep:
            request.kept_at, request.kept_tokens = self.index, request.computed_tokens
        else:
            request.drop_kv()
        self._tell(EffectKind.EVICTED, request.index, request.kept_tokens)

    async def _store_and_let_go(
        self, request: LiveRequest, stream: asyncio.Task[None], server: PooledServer, keeping: Keeping
    ) -> None:
        """Send the request's input for one token, upon which its server stores it, and let it go then."""
        await asyncio.gather(stream, return_exceptions=True)
        keeping.remove()
        try:
            answer = await server.client.complete(
                server.running.model_name, self._completion(request, request.input_ids, 1)
            )
        except ServerError as error:
            self._fail(str(error), by_itself=True)
            return
        request.leaving = False
        # What the prefix cache did not have was computed for this, perhaps in chunks, and is not to be trusted.
        trusted = (answer.cached_prompt_tokens or 0) >= keeping.num_tokens
        keep = trusted and keeping.complete() and self._has_host_room(request)
        self._let_go(request, keep)
        if keep:
            request.kept = keeping
            # From now on the store alone has it.
            request.salt_number += 1
        else:
            keeping.remove()
        self._admit()

    def _admit(self) -> None:
        """Send what the batch has room for, in order."""
        while self._queue and self._server is not None and self._has_room(self._queue[0]):
            request = self._queue.pop(0)
            request.restoring = request.kept
            request.restored_tokens = request.take_kept()
            request.has_new_tokens = False
            if not self._batch:
                self._heard_s = time.monotonic()
            self._batch[request.index] = request
            self._tell(EffectKind.ADMITTED, request.index)
            request.stream = self._spawn(self._serve(request, self._server))

    def _has_room(self, request: LiveRequest) -> bool:
        if len(self._batch) >= self._limits.max_num_seqs:
            return False
        # A server that lets requests wait, and not just for its next step, has less room than its limits say.
        if min(self._waiting, self._waiting_before) > 0 and self._batch:
            return False
        assert self.model is not None
        used = sum(self._blocks(other) for other in self._batch.values())
        return used + self._blocks(request) <= self._limits.num_blocks[self.model]

    def _blocks(self, request: LiveRequest) -> int:
        return -(-(len(request.prompt) + len(request.generated)) // self._limits.block_size)

    async def _serve(self, request: LiveRequest, server: PooledServer) -> None:
        """Stream one answer until it is complete."""
        sent = self._completion(request, request.input_ids, request.left_tokens)
        unasked = None
        if server.kv_store is not None and request.restoring is None:
            unasked = server.kv_store.entry(sent.prompt_token_ids)
            remove(unasked)
        completion = Completion(sent_s=time.monotonic())
        last_s = completion.sent_s
        try:
            async with server.client.stream(server.running.model_name, sent, completion) as chunks:
                async for chunk in chunks:
                    self._heard_s = last_s = chunk.received_s
                    request.generated.extend(chunk.token_ids)
                    if not request.has_new_tokens:
                        remove(unasked)
                    if request.restoring is not None:
                        request.restoring.remove()
                        request.restoring = None
                    request.has_new_tokens = True
                    self._tell(EffectKind.TOKENS, request.index, len(request.generated), last_s)
                    # Of a request with KV to find the end of the stream tells how much was found.
                    if not request.left_tokens and not request.restored_tokens:
                        self._finish(request, last_s)
        except ServerError as error:
            if request.index not in self._batch:
                return
            if isinstance(error, RequestRefused) and error.status < _SERVER_FAULT:
                self._give_up(error)
            else:
                self._fail(str(error), by_itself=True)
            return
        if request.left_tokens:
            self._fail(f"{server.running.url} ended an answer early", by_itself=True)
        elif request.restored_tokens:
            self._count_recomputed(request, completion.cached_prompt_tokens or 0)
            self._finish(request, last_s)

    def _finish(self, request: LiveRequest, time_s: float) -> None:
        del self._batch[request.index]
        self._tell(EffectKind.FINISHED, request.index, time_s=time_s)
        self._admit()

    def _completion(self, request: LiveRequest, token_ids: Sequence[int], max_tokens: int) -> CompletionRequest:
        priority = request.priority if self._limits.by_priority else 0
        return CompletionRequest(token_ids, max_tokens, priority, f"{self._salt}-{request.index}-{request.salt_number}")

    def _count_recomputed(self, request: LiveRequest, found_tokens: int) -> None:
        """Tell what was computed again of what should have been found; only whole blocks can be."""
        block_size = self._limits.block_size
        found_tokens = min(found_tokens, request.restored_tokens) // block_size * block_size
        if found_tokens < request.restored_tokens:
            self._tell(EffectKind.RECOMPUTED, request.index, request.restored_tokens - found_tokens)

    # ------------------------------------------------------------------- models
    def swap(self, model: int, sleeps: bool, put_away: Sequence[int]) -> None:
        """Exchange the active model of an empty engine.

        Args:
            sleeps: the old one goes to host memory, else to storage.
            put_away: models that make room in host memory.
        """
        old, self.model, self._server = self.model, None, None
        if self._staging == model:
            self._staging = None
        self._asleep -= {*put_away, model}
        self._spawn(self._swap(old, model, sleeps, put_away))

    async def _swap(self, old: int | None, model: int, sleeps: bool, put_away: Sequence[int]) -> None:
        try:
            for leaving in put_away:
                await self.pool.put_away(leaving)
            if old is not None and sleeps:
                await self.pool.put_to_sleep(old)
                self._asleep.add(old)
            elif old is not None:
                await self.pool.put_away(old)
            self._server = await self.pool.wake(model)
        except ServerError as error:
            self._fail(f"model {model} cannot be loaded: {error}", by_itself=True)
            return
        self.model = model
        self._heard_s = time.monotonic()
        self._preemptions, self._waiting_before, self._waiting = None, 0.0, 0.0
        self._failures = 0
        self._tell(EffectKind.MODEL_READY, model)
        self._admit()

    def warm(self, model: int, put_away: Sequence[int]) -> None:
        """Start a model's server in the background and let it sleep."""
        self._asleep -= set(put_away)
        self._staging = model
        self._spawn(self._stage(model, put_away))

    async def _stage(self, model: int, put_away: Sequence[int]) -> None:
        try:
            for leaving in put_away:
                await self.pool.put_away(leaving)
            await self.pool.put_to_sleep(model)
        except ServerError as error:
            _log.warning("instance %d: model %d cannot be started warm: %s", self.index, model, error)
            if self._staging == model:
                self._staging = None
                self._tell(EffectKind.WARM_FAILED, model)
            return
        if self._staging == model:
            self._staging = None
            self._asleep.add(model)
            self._tell(EffectKind.WARM_READY, model)

    # ------------------------------------------------------------------- failures
    def fail(self) -> None:
        """Let the instance fail: its servers are killed, and it stays down until it is told to recover."""
        self._fail("it was told to fail", by_itself=False)

    def recover(self) -> None:
        """Be up again, if it is not."""
        if not self.up:
            self.up = True
            if self._retry is not None:
                self._retry.cancel()
            self._tell(EffectKind.UP, NOWHERE)
            self._spawn(self._watch())

    def _fail(self, reason: str, by_itself: bool) -> None:
        if not self.up:
            return
        _log.warning("instance %d is down: %s", self.index, reason)
        self.up = False
        self.failures_told += 1
        this = asyncio.current_task()
        for task in self._tasks:
            if task is not this:
                task.cancel()
        for request in self._batch.values():
            request.leaving = False
            request.drop_kv()
            self._tell(EffectKind.LOST, request.index)
        for request in self._queue:
            self._tell(EffectKind.LEFT, request.index)
        self._batch, self._queue = {}, []
        self.drop_kept()
        self.model, self._server, self._staging, self._asleep = None, None, None, set()
        self._tell(EffectKind.DOWN, NOWHERE)
        killing = asyncio.create_task(self.pool.kill())
        self._killing.add(killing)
        killing.add_done_callback(self._killing.discard)
        self._retry = None
        if by_itself:
            retry_s = min(self._patience.first_retry_s * 2**self._failures, self._patience.longest_retry_s)
            self._failures += 1
            self._retry = self._spawn(self._try_again(killing, retry_s))

    async def _try_again(self, killing: asyncio.Task[None], retry_s: float) -> None:
        await asyncio.shield(killing)
        await asyncio.sleep(retry_s)
        self._retry = None
        self.recover()

    @property
    def keeps_kv_asleep(self) -> bool:
        """Whether kept KV of the active model is still there when its server has slept: a prefix cache is emptied."""
        return self._server is not None and self._server.kv_store is not None

    def drop_kept(self, models: Collection[int] | None = None) -> None:
        """Drop the KV that is kept of requests of these models, or of all."""
        for request in self._requests:
            if request.kept_at == self.index and (models is None or request.model in models):
                request.drop_kv()

    async def _watch(self) -> None:
        """Notice what nobody tells: dead and hung servers, preemptions, requests that wait on the server."""
        while self.up:
            await asyncio.sleep(WATCH_INTERVAL_S)
            # In use is the active model's server and those asleep; what is being loaded tells of itself.
            for model, reason in (await self.pool.take_dead()).items():
                if model == self.model:
                    self._fail(reason, by_itself=True)
                    return
                if model in self._asleep:
                    _log.warning("instance %d: model %d is warm no more: %s", self.index, model, reason)
                    self._asleep.remove(model)
                    self._tell(EffectKind.WARM_LOST, model)
            if self._server is not None:
                await self._look(self._server)

    async def _look(self, server: PooledServer) -> None:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(self._patience.hang_s):
                samples = parse_metrics(await server.client.get_text("/metrics"))
        except (TimeoutError, ServerError) as error:
            if server is self._server:
                reason = str(error) or f"{server.running.url} has not answered for {self._patience.hang_s:g} s"
                self._fail(reason, by_itself=True)
            return
        if server is not self._server:
            return
        self._waiting_before, self._waiting = self._waiting, metric_sum(samples, WAITING)
        preemptions = metric_sum(samples, PREEMPTIONS)
        if self._preemptions is not None and preemptions > self._preemptions:
            self._tell(EffectKind.PREEMPTED, NOWHERE, round(preemptions - self._preemptions))
        self._preemptions = preemptions
        if self._batch and began_s - self._heard_s > self._patience.hang_s:
            self._fail(f"{server.running.url} has sent no token for {self._patience.hang_s:g} s", by_itself=True)
        self._admit()

    # ------------------------------------------------------------------- helpers
    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._give_up(error if isinstance(error, ServerError) else ServerError(f"instance {self.index}: {error!r}"))

    def _tell(self, kind: EffectKind, subject: int, value: int = 0, time_s: float | None = None) -> None:
        self._tell_effect(Effect(kind, time.monotonic() if time_s is None else time_s, self.index, subject, value))
