"""The backend contract: instances that run requests, whether emulated or real.

A backend knows requests, models and instances. What waits, in which order, and why is the queueing's
concern: it tells the backend which request to run where, and hears what became of it. Emulated and real
clusters pass one conformance suite (``tests/backends/conformance.py``), which is this contract as code.

**Time.** Commands (:meth:`~Backend.pull` to :meth:`~Backend.recover`) return at once and take no time;
their effects happen while :meth:`~Backend.advance` lets time pass, and are told by the events it returns.
On the emulator time passes only there; on a real cluster it passes by itself, so ``advance`` waits, and
whatever happened between two calls is told by the next one with the time at which it happened.

**Requests.** A request in an engine, waiting for room there or running, has ``requests.instance`` set; all
others have NOWHERE. The backend writes ``state`` (WAITING, RUNNING, FINISHED), ``instance``,
``first_scheduled_s``, ``first_token_s``, ``finish_s``, ``generated_tokens``, ``computed_tokens``,
``kv_host``, ``recomputed_tokens``, ``preemptions`` and ``evictions``, and ``next`` while the request is in
an engine; ``group``, ``settled`` and ``reject_reason`` belong to the queueing. A preempted request stays
in its engine, which runs it again: it is counted, and no event tells of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from qlm_env.backends.emulator.state import Fleet
from qlm_env.requests import RequestTable


class BackendError(RuntimeError):
    """A command that the backend's present state forbids; nothing was changed."""


class EventKind(IntEnum):
    """What a backend tells of."""

    FINISHED = 0
    """A request has all its output tokens."""
    RETURNED = 1
    """A request left its engine unfinished: evicted, or lost by a failure."""
    MODEL_READY = 2
    """A swap is done; the model runs requests."""
    WARM_READY = 3
    """A warm start is done; the model is in host memory."""
    DOWN = 4
    """The instance failed. Its requests have been returned."""
    UP = 5
    """The instance is back, with nothing on its GPU, in its host memory or in its engine."""


class BackendEvent(NamedTuple):
    """One thing that happened."""

    kind: EventKind
    time_s: float
    """When, at most ``now_s``."""
    instance: int
    subject: int
    """The request (FINISHED, RETURNED) or the model (MODEL_READY, WARM_READY), else NOWHERE."""


class Backend(ABC):
    """A cluster of instances, each an engine that runs one model at a time.

    An instance or request index out of range is a BackendError in every method that takes one.
    """

    requests: RequestTable
    """(N,) the table given to :meth:`reset`, kept up to date."""
    fleet: Fleet
    """The instances as arrays, up to date whenever a method has returned.

    Readers may rely on these fields. Of ``engine``: ``up``, ``active_model``, ``num_running``,
    ``free_blocks``, ``queue_length``, ``swap_target`` with ``next_event_s`` (when it will be ready: exact on
    the emulator, else expected), ``stage_target`` with ``stage_end_s``, ``pending_eviction``,
    ``pending_swap``, ``queue_head`` (the first request in the engine's own queue), ``first_prefill`` (the first slot
    that may be prefilling, at most ``num_running``), the host memory fields and the counters. Of ``slot``: ``request``
    of the first ``num_running``, in order of admission, ``prefill_left``, and what
    :func:`~qlm_env.backends.emulator.engine.slot_generated_tokens` reads. Of ``placement``: everything.
    """

    @abstractmethod
    def reset(self, requests: RequestTable) -> None:
        """Start at time 0 with every request pending, the initial models loaded and all else empty.

        Args:
            requests: (N,) the workload; its state is reset.
        """

    @property
    @abstractmethod
    def now_s(self) -> float:
        """Seconds since :meth:`reset`; never decreases."""

    @abstractmethod
    def has_room(self, instance: int, request: int) -> bool:
        """Whether the engine, as it stands now, would take the request into its batch without a wait.

        It would if the request's model is active and no swap is under way, fewer than ``max_num_seqs``
        requests are in the engine, and the KV blocks that these leave free hold the request's whole input.
        Never true for a request that is in an engine or finished, or can never run there.
        """

    @abstractmethod
    def pull(self, instance: int, request: int) -> None:
        """Hand a request to the engine, which runs it from its prompt and the tokens generated so far.

        It joins the batch when there is room, until then it waits in the engine's own queue. KV kept by this
        instance's host memory is restored; KV kept elsewhere is dropped, as if it had been evicted so.

        Raises:
            BackendError: the instance is down, its active model is not the request's or is about to be
                swapped, or the request is in an engine, finished, or too long for the instance.
        """

    @abstractmethod
    def evict(self, instance: int, requests: Iterable[int], keep_kv: bool) -> None:
        """Let requests leave the engine at the end of the step in progress; a RETURNED event tells of each.

        A request that finishes with that step is FINISHED instead. Generated tokens are kept. With
        ``keep_kv`` the KV of running requests moves to host memory, as far as its ``host_kv_bytes`` have
        room, and the engine pauses while it is copied; ``kv_host`` and ``computed_tokens`` then say where
        and how much. Otherwise it is dropped and counted in ``recomputed_tokens``.

        Raises:
            BackendError: the instance is down, or one of the requests is not in its engine.
        """

    @abstractmethod
    def drop_kv(self, request: int) -> None:
        """Drop the KV that host memory keeps of a request, if any, as if it had been evicted so.

        Raises:
            BackendError: the request is in an engine.
        """

    @abstractmethod
    def swap_model(self, instance: int, model: int) -> None:
        """Replace the active model; a MODEL_READY event tells when it runs.

        The old one goes to host memory if that can hold it, where the least recently used make room, else
        to storage. The new one comes from host memory (counted as a warm hit), from there as soon as a warm
        start under way has brought it if that is sooner, or from storage (a cold start).

        Raises:
            BackendError: the instance is down or already swapping, requests are in its engine, or the model
                is active or does not fit.
        """

    @abstractmethod
    def warm_start(self, instance: int, model: int) -> None:
        """Stage weights from storage into host memory in the background; a WARM_READY event tells when.

        The least recently used models in host memory make room. Requests run meanwhile.

        Raises:
            BackendError: the instance is down or staging another model, or the model is not in storage, does
                not fit the instance, or is larger than its host memory.
        """

    @abstractmethod
    def fail(self, instance: int) -> None:
        """Let an instance fail, as it may also do by itself on a real cluster.

        The step in progress, GPU and host memory are lost, kept KV included. RETURNED events tell of every
        request in its engine, which keeps its generated tokens, and DOWN of the instance.

        Raises:
            BackendError: it is down.
        """

    @abstractmethod
    def recover(self, instance: int) -> None:
        """Bring a failed instance back, empty; an UP event tells when it takes commands.

        Raises:
            BackendError: it is up.
        """

    @abstractmethod
    def advance(self, until_s: float) -> list[BackendEvent]:
        """Let time pass until something happened, at most to ``until_s``.

        Returns:
            what happened, in order of time: all events of the instant that ended the wait, or nothing when
            ``until_s`` was reached (at once if it has passed).

        Raises:
            BackendError: ``until_s`` is not finite.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop what the backend started. It may be called twice; no other method may follow."""

    # What every backend checks first.
    def _check_instance(self, instance: int) -> None:
        self._check("instance", instance, len(self.fleet.engine))

    def _check_request(self, request: int) -> None:
        self._check("request", request, len(self.requests))

    def _check_model(self, model: int) -> None:
        self._check("model", model, self.fleet.placement.shape[1])

    def _check(self, what: str, index: int, count: int) -> None:
        if not 0 <= index < count:
            raise BackendError(f"there is no {what} {index}; there are 0..{count - 1}")
