"""Real vLLM servers behind the backend contract.

An instance is one server per model of which one is awake. Residency is where a model's server is: on the GPU it
is awake, in host memory asleep, in storage there is none.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from qlm_env.backends.base import Backend, BackendError, BackendEvent
from qlm_env.backends.emulator import commands
from qlm_env.backends.emulator.state import GPU, HOST, PRIORITY, STORAGE, Fleet
from qlm_env.backends.vllm import books
from qlm_env.backends.vllm.client import CompletionRequest
from qlm_env.backends.vllm.errors import ServerError
from qlm_env.backends.vllm.event_loop import LoopThread
from qlm_env.backends.vllm.facts import read_facts
from qlm_env.backends.vllm.instance import Instance, InstanceLimits, Patience
from qlm_env.backends.vllm.kv_store import remove
from qlm_env.backends.vllm.live_request import LiveRequest
from qlm_env.backends.vllm.mirror import NEWS, Effect, Mirror, rehearse
from qlm_env.backends.vllm.provider import RunningServer, ServerProvider
from qlm_env.backends.vllm.server_pool import PooledServer, ServerPool
from qlm_env.backends.vllm.step_times import draw_prompt
from qlm_env.requests import NOWHERE, RequestTable, reset_state, workload_hash

WARM_UP_SALT = "warm-up"

_LOOK_S = 1.0
"""How often a waiting caller sees whether something went wrong."""


class VllmBackend(Backend):
    """Servers of a provider, on wall-clock time.

    They are started by the first :meth:`reset`, which may take minutes; a later one keeps what runs where it is
    wanted. Prompts are random tokens, made from the workload's hash and the request's index.

    Args:
        provider: starts and stops the servers; it is closed with the backend.
        new_fleet: makes the cluster's engines with their initial models loaded, anew for every episode, as for
            :class:`~qlm_env.backends.emulator.backend.EmulatorBackend`. Memory, KV blocks and the expected times of
            swaps are the profile's, everything else comes from the servers.
        patience: when an instance counts as failed, and when it is tried again.
    """

    def __init__(
        self, provider: ServerProvider, new_fleet: Callable[[], Fleet], patience: Patience | None = None
    ) -> None:
        self._provider = provider
        self._new_fleet = new_fleet
        self._patience = Patience() if patience is None else patience
        self._loop: LoopThread | None = None
        self._instances: list[Instance] = []
        self._live: list[LiveRequest] = []
        self._effects: deque[Effect] = deque()
        self._news = threading.Event()
        self._error: ServerError | None = None
        # What runs on servers that outlive this backend must be new to them as well.
        self._salt = secrets.token_hex(4)
        self._episodes = 0
        self._start_s = time.monotonic()

    # ------------------------------------------------------------------- an episode
    def reset(self, requests: RequestTable) -> None:
        """As :meth:`.base.Backend.reset`; returns when the initial models are up.

        Raises:
            ServerError: a server does not start, or has less room than the profile says.
        """
        reset_state(requests)
        self.requests = requests
        self.fleet = self._new_fleet()
        for i, m in self._pairs():
            if not self._provider.serves(i, m):
                self.fleet.placement["num_blocks"][i, m] = 0
        if self._loop is None:
            if len(requests):
                rehearse(self._new_fleet(), requests.copy())
            self._loop = LoopThread("vllm-backend")
            self._instances = [
                Instance(i, self._new_pool(i), self._patience, self._take_effect, self._take_error)
                for i in range(len(self.fleet.engine))
            ]
        self._loop.run(self._to_initial_residency())
        for old in self._live:
            old.drop_kv()
        self._live = list(self._live_requests(requests))
        self._episodes += 1
        self._effects.clear()
        self._told: list[BackendEvent] = []
        self._error = None
        self._start_s = time.monotonic()
        self._mirror = Mirror(self.fleet, requests, self._start_s)
        self._loop.call(self._begin)

    async def _to_initial_residency(self) -> None:
        """Everything stopped, and each model's server where it is at time 0."""
        await asyncio.gather(*(instance.end() for instance in self._instances))

        async def bring(instance: Instance) -> None:
            residency = self.fleet.placement["residency"][instance.index]
            # What leaves memory makes room for what comes.
            for m in np.flatnonzero(residency == STORAGE):
                await instance.pool.put_away(int(m))
            for m in np.flatnonzero(residency == HOST):
                await instance.pool.put_to_sleep(int(m))
            for m in np.flatnonzero(residency == GPU):
                await instance.pool.wake(int(m))

        results = await asyncio.gather(*map(bring, self._instances), return_exceptions=True)
        for error in results:
            if error is not None:
                raise error

    def _begin(self) -> None:
        engine, placement = self.fleet.engine, self.fleet.placement
        for instance in self._instances:
            i = instance.index
            limits = InstanceLimits(
                max_num_seqs=self.fleet.max_num_seqs,
                block_size=self.fleet.block_size,
                num_blocks=tuple(placement["num_blocks"][i].tolist()),
                kv_bytes_per_token=tuple(placement["kv_bytes_per_token"][i].tolist()),
                host_kv_bytes=float(engine["host_kv_bytes"][i]),
                by_priority=self.fleet.scheduling_policy == PRIORITY,
            )
            active = int(engine["active_model"][i])
            asleep = {int(m) for m in np.flatnonzero(placement["residency"][i] == HOST)}
            salt = f"{self._salt}-{self._episodes}"
            instance.begin(limits, self._live, salt, None if active == NOWHERE else active, asleep)

    def _live_requests(self, requests: RequestTable) -> Iterator[LiveRequest]:
        seed = int(workload_hash(requests), 16)
        for r, request in enumerate(requests):
            rng = np.random.default_rng([seed, r])
            yield LiveRequest(
                index=r,
                model=int(request.model),
                prompt=draw_prompt(rng, int(request.prompt_tokens)),
                output_tokens=int(request.output_tokens),
                priority=int(request.slo_class),
                order=(float(request.slo_class), float(request.arrival_s), float(r)),
            )

    def _new_pool(self, i: int) -> ServerPool:
        async def check(model: int, server: PooledServer) -> None:
            await self._check_room(i, model, server)
            await self._warm_up(server)

        return ServerPool(i, self._provider, check, self._patience.hang_s, self.fleet.block_size)

    async def _check_room(self, i: int, model: int, server: PooledServer) -> None:
        """Refuse a server that does not have the room that the fleet's arrays promise."""
        facts = await read_facts(server.client, server.running.model_name)
        placement = self.fleet.placement[i, model]
        for name, has, needed in (
            ("block_size", facts.engine.block_size, self.fleet.block_size),
            ("num_gpu_blocks", facts.num_gpu_blocks - 1, int(placement.num_blocks)),
            ("max_model_len", facts.max_model_len, int(placement.context_tokens)),
            ("max_num_seqs", facts.engine.max_num_seqs, self.fleet.max_num_seqs),
        ):
            if has < needed or (name == "block_size" and has != needed):
                raise ServerError(
                    f"{server.running.url} serves {server.running.model_name} with {name} {has}; "
                    f"the cluster's configuration needs {needed}"
                )

    async def _warm_up(self, server: PooledServer) -> None:
        """Let a server answer once: the first request of a process takes seconds longer than any other."""
        # More than a block, as a KV store has an entry in common for all that is shorter.
        prompt = [1] * (self.fleet.block_size + 2)
        request = CompletionRequest(prompt, max_tokens=4, cache_salt=WARM_UP_SALT)
        await server.client.complete(server.running.model_name, request)
        if server.kv_store is not None:
            remove(server.kv_store.entry(prompt))

    # ------------------------------------------------------------------- time
    @property
    def now_s(self) -> float:
        return time.monotonic() - self._start_s

    def advance(self, until_s: float) -> list[BackendEvent]:
        """As :meth:`.base.Backend.advance`.

        Raises:
            ServerError: a server refuses a request for good, as one with another model or key would.
        """
        if not math.isfinite(until_s):
            raise BackendError(f"until_s must be finite, not {until_s}")
        while True:
            self._news.clear()
            self._take_effects()
            wait_s = until_s - self.now_s
            if self._told or wait_s <= 0:
                break
            self._news.wait(min(wait_s, _LOOK_S))
        self._mirror.pass_time(self.now_s)
        events, self._told = sorted(self._told, key=lambda event: event.time_s), []
        return events

    def _take_effects(self) -> None:
        if self._error is not None:
            raise self._error
        while self._effects:
            event = self._mirror.apply(self._effects.popleft())
            if event is not None:
                self._told.append(event)

    # ------------------------------------------------------------------- commands
    def has_room(self, instance: int, request: int) -> bool:
        self._check_instance(instance)
        self._check_request(request)
        return bool(commands.has_room(self._mirror.run, instance, request))

    def pull(self, instance: int, request: int) -> None:
        self._check_instance(instance)
        self._check_request(request)

        def act(live: Instance) -> None:
            self._book(f"pull request {request}", commands.PULL, instance, request)
            live.pull(self._live[request])

        self._command(f"pull request {request}", instance, act)

    def evict(self, instance: int, requests: Iterable[int], keep_kv: bool) -> None:
        self._check_instance(instance)
        leaving = list(requests)
        for request in leaving:
            self._check_request(request)
            if self.requests["instance"][request] != instance:
                raise BackendError(f"cannot evict request {request}: it is not at instance {instance}")
        self._command("evict", instance, lambda live: live.evict(leaving, keep_kv))

    def drop_kv(self, request: int) -> None:
        self._check_request(request)
        kept = bool(self.requests["kv_host"][request] != NOWHERE)
        self._book(f"drop the KV of request {request}", commands.DROP_KV, 0, request)
        if kept:
            self._call(self._live[request].drop_kv)

    def swap_model(self, instance: int, model: int) -> None:
        self._check_instance(instance)
        self._check_model(model)

        def act(live: Instance) -> None:
            engine = self.fleet.engine[instance]
            if engine.num_running or engine.queue_length or not books.can_swap(self.fleet, instance, model):
                raise self._refused(f"swap to model {model}", instance)
            old = int(engine.active_model)
            before = self._mirror.residency(instance)
            self._mirror.swap(instance, model, self.now_s)
            sleeps = old != NOWHERE and self._mirror.residency(instance)[old] == HOST
            put_away = [m for m in self._put_away(instance, before) if m != model]
            self._drop_kept(live, put_away if sleeps and live.keeps_kv_asleep else [*put_away, old])
            live.swap(model, sleeps, put_away)

        self._command(f"swap to model {model}", instance, act)

    def warm_start(self, instance: int, model: int) -> None:
        self._check_instance(instance)
        self._check_model(model)

        def act(live: Instance) -> None:
            before = self._mirror.residency(instance)
            self._book(f"warm-start model {model}", commands.WARM_START, instance, model)
            put_away = self._put_away(instance, before)
            self._drop_kept(live, put_away)
            live.warm(model, put_away)

        self._command(f"warm-start model {model}", instance, act)

    def fail(self, instance: int) -> None:
        self._check_instance(instance)
        self._command("fail", instance, lambda live: live.fail())
        self._take_effects()

    def recover(self, instance: int) -> None:
        self._check_instance(instance)
        if self.fleet.engine["up"][instance]:
            raise self._refused("recover", instance)
        self._call(self._instances[instance].recover)
        self._take_effects()

    def _drop_kept(self, live: Instance, models: list[int]) -> None:
        """KV that is kept stays with its model's server and ends with it, or with its prefix cache."""
        self._mirror.discard_kept(live.index, models)
        live.drop_kept(models)

    def _put_away(self, instance: int, before: list[int]) -> list[int]:
        """The models that have just been booked out of host memory."""
        after = self._mirror.residency(instance)
        return [m for m in range(len(after)) if (before[m], after[m]) == (HOST, STORAGE)]

    def close(self) -> None:
        """As :meth:`.base.Backend.close`; servers that the provider was given keep running."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        try:
            loop.run(self._end())
        finally:
            loop.stop()

    def servers(self) -> dict[tuple[int, int], RunningServer]:
        """The running servers by (instance, model), awake or asleep."""
        assert self._loop is not None
        return self._loop.call(
            lambda: {
                (instance.index, model): server
                for instance in self._instances
                for model, server in instance.pool.running().items()
            }
        )

    def transcript(self, request: int) -> tuple[list[int], list[int]]:
        """The token ids of a request's prompt and of its answer so far."""
        self._check_request(request)
        live = self._live[request]
        return list(live.prompt), list(live.generated)

    async def _end(self) -> None:
        await asyncio.gather(*(instance.end() for instance in self._instances))
        await asyncio.gather(*(instance.pool.close() for instance in self._instances))
        await self._provider.close()

    # ------------------------------------------------------------------- between the threads
    def _take_effect(self, effect: Effect) -> None:
        self._effects.append(effect)
        if effect.kind in NEWS:
            self._news.set()

    def _take_error(self, error: ServerError) -> None:
        self._error = self._error or error
        self._news.set()

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call(function)

    def _command(self, what: str, instance: int, act: Callable[[Instance], None]) -> None:
        """Carry out a command between two tasks of the loop, so that nothing happens in its midst.

        Raises:
            BackendError: the instance is down, which the caller may have yet to hear of.
        """
        live = self._instances[instance]

        def act_if_up() -> None:
            if not live.up or live.failures_told != self._mirror.failures_heard[instance]:
                raise BackendError(f"cannot {what}: instance {instance} is down (t={self.now_s:.3f} s)")
            act(live)

        self._call(act_if_up)

    def _book(self, what: str, verb: int, instance: int, subject: int) -> None:
        """Write a command into the arrays.

        Raises:
            BackendError: their state forbids it.
        """
        if not self._mirror.command(verb, instance, subject, self.now_s):
            raise self._refused(what, instance)

    # ------------------------------------------------------------------- checks
    def _refused(self, what: str, instance: int) -> BackendError:
        return BackendError(f"cannot {what}: not in the present state of instance {instance} (t={self.now_s:.3f} s)")

    def _pairs(self) -> Iterator[tuple[int, int]]:
        return iter(np.ndindex(*self.fleet.placement.shape))
