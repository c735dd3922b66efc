"""The emulated cluster behind the backend contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from qlm_env.backends.base import Backend, BackendError, BackendEvent, EventKind
from qlm_env.backends.emulator import commands
from qlm_env.backends.emulator.state import EVICT_DROP, EVICT_KEEP, Fleet, size_prefix_cache
from qlm_env.requests import NOWHERE, RequestTable, reset_state


class EmulatorBackend(Backend):
    """Emulated instances: vLLM's scheduler on measured step times, in emulated time.

    Args:
        new_fleet: makes the cluster's engines with their initial models loaded, anew for every episode:
            ``lambda: make_cluster(spec.cluster, spec.workload.models)`` with
            :func:`qlm_env.cluster.make_cluster`.
    """

    def __init__(self, new_fleet: Callable[[], Fleet]) -> None:
        self._new_fleet = new_fleet

    def reset(self, requests: RequestTable) -> None:
        reset_state(requests)
        self.requests = requests
        self.fleet = size_prefix_cache(self._new_fleet(), requests)
        self._run = commands.make_run(self.fleet, requests)
        # Events of commands, which the next `advance` returns.
        self._told: list[BackendEvent] = []

    @property
    def now_s(self) -> float:
        return float(self._run.clock[0].now_s)

    def has_room(self, instance: int, request: int) -> bool:
        self._check_instance(instance)
        self._check_request(request)
        return bool(commands.has_room(self._run, instance, request))

    def pull(self, instance: int, request: int) -> None:
        self._check_request(request)
        self._command(f"pull request {request}", commands.PULL, instance, request)

    def evict(self, instance: int, requests: Iterable[int], keep_kv: bool) -> None:
        self._check_instance(instance)
        leaving = list(requests)
        for request in leaving:
            self._check_request(request)
            if self.requests["instance"][request] != instance:
                raise BackendError(f"cannot evict request {request}: it is not at instance {instance}")
        for request in leaving:
            option = EVICT_KEEP if keep_kv else EVICT_DROP
            self._command(f"evict request {request}", commands.EVICT, instance, request, option)

    def drop_kv(self, request: int) -> None:
        self._check_request(request)
        self._command(f"drop the KV of request {request}", commands.DROP_KV, 0, request)

    def swap_model(self, instance: int, model: int) -> None:
        self._check_model(model)
        self._command(f"swap to model {model}", commands.SWAP_MODEL, instance, model)

    def warm_start(self, instance: int, model: int) -> None:
        self._check_model(model)
        self._command(f"warm-start model {model}", commands.WARM_START, instance, model)

    def fail(self, instance: int) -> None:
        self._command("fail", commands.FAIL, instance)

    def recover(self, instance: int) -> None:
        self._command("recover", commands.RECOVER, instance)

    def advance(self, until_s: float) -> list[BackendEvent]:
        if not math.isfinite(until_s):
            raise BackendError(f"until_s must be finite, not {until_s}")
        # What was told before is news of this instant: nothing later may happen before it is heard.
        commands.advance(self._run, min(until_s, self.now_s) if self._told else until_s)
        self._take_events()
        events, self._told = self._told, []
        return events

    def close(self) -> None:
        """There is nothing to stop."""

    def _command(self, what: str, verb: int, instance: int, subject: int = NOWHERE, option: int = 0) -> None:
        self._check_instance(instance)
        if not commands.command(self._run, verb, instance, subject, option):
            raise BackendError(f"cannot {what}: not in the present state of instance {instance} (t={self.now_s:.3f} s)")
        self._take_events()

    def _take_events(self) -> None:
        clock = self._run.clock[0]
        for time_s, kind, instance, subject in self._run.event[: clock.events].tolist():
            self._told.append(BackendEvent(EventKind(kind), time_s, instance, subject))
        clock.events = 0
