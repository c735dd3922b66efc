"""Queues over any backend: the cluster in time where its engines are elsewhere.

On the emulator queues and engines meet in compiled code (:mod:`.dynamics`), inside every engine step. A real engine
schedules its steps alone; what can be done from outside is to hand it requests while it has room, to take them back,
and to hear what became of them. :class:`BackendDynamics` follows the same rules on the same arrays through the
contract of :class:`~qlm_env.backends.base.Backend`, so that everything that reads a world (legality, observation, mask,
metrics, timeline, planners) is the same.

Where that differs from the compiled dynamics: a request that finds room is in the engine, and its group closed, from
the moment at which the room appears, up to :data:`STEPS_AHEAD` steps before the one that admits it; what the engine
preempted is not counted as blocked, and finishes before a swap rather than going back to its group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from qlm_env.backends.base import Backend, BackendError, BackendEvent, EventKind
from qlm_env.backends.emulator.backend import EmulatorBackend
from qlm_env.backends.emulator.state import EVICT_DROP, EVICT_KEEP, NEVER, NO_EVICTION
from qlm_env.cluster import make_cluster, make_world
from qlm_env.dynamics import (
    EVICT,
    GROUP_FORMED,
    HEAD_EMPTIED,
    INSTANCE_CHANGED,
    LOG_FULL,
    MODEL_READY,
    PREEMPT,
    RECOVER,
    SWAP_BEGIN,
    SWAP_END,
    WARM_BEGIN,
    WARM_END,
    find_unservable,
)
from qlm_env.epoch import ILLEGAL, present
from qlm_env.lso import (
    ADVANCE,
    BALANCE,
    PULL,
    SWAP_MODEL,
    WARM_START,
    Advance,
    Balance,
    Evict,
    Lso,
    SwapModel,
    apply_lso,
    is_legal,
)
from qlm_env.lso import EVICT as EVICT_LSO
from qlm_env.observation import Panel
from qlm_env.queue_events import (
    instance_failed,
    note,
    request_arrives,
    request_finished,
    request_is_pulled,
    request_returned,
    settle_outcomes,
    uncomputed_tokens,
    watch_blocking,
)
from qlm_env.requests import NOWHERE, RequestTable, make_request_table
from qlm_env.spec import ScenarioSpec
from qlm_env.view import plain

STEPS_AHEAD = 2
"""Steps of prompt tokens that an engine is given at once: the one in progress, and one that is ready when it ends.
What it was given can no longer move or be overtaken, so the rest of a long queue waits in its groups."""

LOOK_AGAIN_S = 0.02
"""How soon an engine that has been given so much is looked at again; no event tells that a prompt has been computed."""


class BackendDynamics:
    """One episode of ``scenario`` on ``backend``, which is reset; its time 0 is when this returns.

    Args:
        requests: (N,) the workload; its state is reset.
        logging: keep the event log that timelines are drawn from.

    ``world`` is what an emulated episode has, with the backend's arrays for requests, slots and placements. Its engines
    are a copy, made anew after every call of the backend, that also shows the operations which are asked for and not
    yet carried out: an eviction until time next passes, a swap until the batch is empty.
    """

    def __init__(self, backend: Backend, scenario: ScenarioSpec, requests: RequestTable, *, logging: bool) -> None:
        self.backend = backend
        # All that takes long comes before the backend's clock starts.
        world = make_world(scenario, requests, logging=logging)
        backend.reset(requests)
        self.world = world._replace(fleet=backend.fleet._replace(engine=backend.fleet.engine.copy()))
        find_unservable(self.world)
        num_instances = len(self.world.fleet.engine)
        self._instances = range(num_instances)
        self._pending_eviction = np.full(num_instances, NO_EVICTION, np.int8)
        self._pending_swap = np.full(num_instances, NOWHERE, np.int32)
        self._filling: set[int] = set()
        """Instances whose engines would have room for more, once they have computed the prompts they were given."""
        self._refusals: list[tuple[int, BackendError]] = []
        """Commands that the backend has refused since it last told anything, by instance."""
        self._evicted: set[int] = set()
        """Requests that were told to leave their engine, and are still there as far as we know."""
        self._requests = plain(self.world.requests)
        self._engine = plain(self.world.fleet.engine)
        self._group = plain(self.world.queues.group)
        self._queue = plain(self.world.queues.queue)
        self._clock = plain(self.world.clock)[0]

    @property
    def now_s(self) -> float:
        """The backend's time, at or after that of ``world.clock``, up to which everything has been heard of."""
        return self.backend.now_s

    # ----------------------------------------------------------------- the interface of the compiled dynamics
    def decide(
        self,
        panel: Panel,
        verb: int,
        i: int,
        subject: int,
        option: int,
        until_s: float,
        stop_at_epoch: bool,
        horizon_s: float,
        only_advance: bool,
    ) -> int:
        """As :func:`qlm_env.epoch.decide`."""
        outcome = 0
        if verb == ADVANCE:
            outcome = self.advance(min(until_s, horizon_s), stop_at_epoch)
        elif not self.apply_lso(verb, i, subject, option):
            outcome = ILLEGAL
        present(self.world, panel, horizon_s, only_advance)
        return outcome

    def apply_lso(self, verb: int, i: int, subject: int, option: int) -> bool:
        """As :func:`qlm_env.lso.apply_lso`."""
        world = self.world
        if not is_legal(world, verb, i, subject, option):
            return False
        if verb == BALANCE:
            if self._group["queue"][subject] != i:
                self._drop_kept_kv(subject)
            apply_lso(world, verb, i, subject, option)
        elif verb == PULL:
            self._queue["pull_requested"][i] = 1
        elif verb == EVICT_LSO:
            self._pending_eviction[i] = EVICT_KEEP if option else EVICT_DROP
        elif verb == SWAP_MODEL:
            self._pending_swap[i] = subject
        elif verb == WARM_START:
            if not self._command(i, partial(self.backend.warm_start, i, subject)):
                return False
            note(world, WARM_BEGIN, i, subject, 0)
        self._refresh_all()
        return True

    def advance(self, until_s: float, stop_at_epoch: bool) -> int:
        """As :func:`qlm_env.dynamics.advance`; where time passes by itself, it waits.

        What happened since the last call is heard of first, however long ago ``until_s`` is.

        Raises:
            BackendError: the backend refused a command for no reason that it tells of.
        """
        epoch = 0
        self._refresh_all()
        for i in self._instances:
            # What this pulls is the effect of the decision just taken, not news that calls for another.
            self._act(i)
        while not self._over:
            epoch |= self._scheduled_until(self.backend.now_s)
            if self._log_is_full:
                epoch = epoch | LOG_FULL if stop_at_epoch else LOG_FULL
                break
            decision_due = bool(epoch and stop_at_epoch)
            now_s = self.backend.now_s
            wait_s = now_s if decision_due else max(now_s, min(until_s, self._next_scheduled_s))
            if self._filling:
                wait_s = min(wait_s, now_s + LOOK_AGAIN_S)
            events = self.backend.advance(wait_s)
            self._explain_refusals(events)
            self._refresh_all()
            epoch |= self._hear(events)
            if not events:
                # Everything up to here is known, so that what is late by now can be settled.
                self._pass_to(wait_s)
                for i in sorted(self._filling):
                    epoch |= self._act(i)
                if self._next_scheduled_s > wait_s and (decision_due or wait_s >= until_s):
                    break
        settle_outcomes(self.world)
        return epoch

    # ----------------------------------------------------------------- news
    @property
    def _over(self) -> bool:
        return int(self._clock["finished"] + self._clock["rejected"]) == len(self._requests)

    @property
    def _log_is_full(self) -> bool:
        log = self.world.log
        return self.world.logging and int(self._clock["events"]) + 4 * self.world.fleet.max_num_seqs > len(log)

    @property
    def _next_arrival_s(self) -> float:
        r = int(self._clock["next_arrival"])
        return float(self._requests["arrival_s"][r]) if r < len(self._requests) else NEVER

    @property
    def _next_failure_s(self) -> float:
        k = int(self._clock["next_failure"])
        return float(self.world.failures["time_s"][k]) if k < len(self.world.failures) else NEVER

    @property
    def _next_scheduled_s(self) -> float:
        return min(self._next_arrival_s, self._next_failure_s)

    def _scheduled_until(self, now_s: float) -> int:
        """Arrivals and injected failures up to ``now_s``, in order of time; returns epoch bits."""
        epoch = 0
        while self._next_scheduled_s <= now_s:
            self._pass_to(self._next_scheduled_s)
            if self._next_failure_s <= self._next_arrival_s:
                self._inject_failure()
            else:
                epoch |= self._arrive()
        return epoch

    def _pass_to(self, time_s: float) -> None:
        self._clock["now_s"] = max(float(self._clock["now_s"]), time_s)

    def _inject_failure(self) -> None:
        """The configured end or beginning of an outage; the backend tells of it, and it may be so already."""
        failure = self.world.failures[int(self._clock["next_failure"])]
        self._clock["next_failure"] += 1
        i = int(failure.instance)
        if failure.up and not self.backend.fleet.engine["up"][i]:
            self._command(i, partial(self.backend.recover, i))
        elif not failure.up and self.backend.fleet.engine["up"][i]:
            self._command(i, partial(self.backend.fail, i))
        self._refresh(i)

    def _arrive(self) -> int:
        r = int(self._clock["next_arrival"])
        if request_arrives(self.world):
            return GROUP_FORMED
        g = int(self._requests["group"][r])
        if g == NOWHERE or not self._group["queued"][g] or self._group["previous"][g] != NOWHERE:
            return 0
        return self._act(int(self._group["queue"][g]))

    def _hear(self, events: Iterable[BackendEvent]) -> int:
        """Take in what the backend tells, and act on it where it happened; returns epoch bits."""
        world = self.world
        epoch = 0
        heard: dict[int, int] = {}
        """Requests evicted, by the instance of every event."""
        for kind, time_s, i, subject in events:
            self._pass_to(time_s)
            heard.setdefault(i, 0)
            if kind == EventKind.FINISHED:
                request_finished(world, subject)
            elif kind == EventKind.RETURNED:
                request_returned(world, subject)
                heard[i] += subject in self._evicted
            elif kind == EventKind.MODEL_READY:
                note(world, SWAP_END, i, subject, 0)
                epoch |= MODEL_READY
            elif kind == EventKind.WARM_READY:
                note(world, WARM_END, i, subject, 0)
                epoch |= MODEL_READY
            elif kind == EventKind.DOWN:
                instance_failed(world, i)
                self._pending_eviction[i] = NO_EVICTION
                self._pending_swap[i] = NOWHERE
                heard[i] = 0
                epoch |= INSTANCE_CHANGED
            else:
                note(world, RECOVER, i, NOWHERE, 0)
                epoch |= INSTANCE_CHANGED
            if kind in (EventKind.FINISHED, EventKind.RETURNED):
                self._evicted.discard(subject)
        for i, evicted in heard.items():
            if evicted:
                note(world, EVICT, i, NOWHERE, evicted)
            self._refresh(i)
            epoch |= self._act(i)
        return epoch

    # ----------------------------------------------------------------- what an instance does
    def _act(self, i: int) -> int:
        """Evict, swap or pull, as operations and queue ask for and the engine allows; returns epoch bits."""
        self._filling.discard(i)
        if not self._engine["up"][i]:
            return 0
        if self._pending_eviction[i] != NO_EVICTION:
            self._evict(i)
        if self._pending_swap[i] != NOWHERE:
            self._swap_when_empty(i)
            return 0
        epoch, blocked = self._pull(i)
        if blocked != NOWHERE or self._queue["blocked_since_s"][i] != NEVER:
            watch_blocking(self.world, i, blocked)
        return epoch

    def _pull(self, i: int) -> tuple[int, int]:
        """Hand over requests of head groups while there is room; returns epoch bits, and who waits for room."""
        epoch = 0
        blocked = NOWHERE
        queue = self._queue[i]
        while queue["head"] != NOWHERE and (self.world.auto_pull or queue["pull_requested"]):
            head = self._group[queue["head"]]
            if head["model"] != self._engine["active_model"][i]:
                break
            r = int(head["head"])
            if not self.backend.has_room(i, r):
                blocked = r
                break
            if uncomputed_tokens(self.world, i) >= STEPS_AHEAD * self.world.fleet.max_num_batched_tokens:
                self._filling.add(i)
                blocked = r
                break
            # First out of the group's list, because the engine links it into its own.
            if request_is_pulled(self.world, i):
                epoch |= HEAD_EMPTIED
            if not self._command(i, partial(self.backend.pull, i, r)):
                request_returned(self.world, r)
                break
            self._refresh(i)
        engine = self._engine[i]
        if engine["num_running"] + engine["queue_length"] < self.world.fleet.max_num_seqs:
            # A requested pull is one for the next step, for which only a full batch makes it wait.
            queue["pull_requested"] = 0
        return epoch, blocked

    def _evict(self, i: int) -> None:
        """What is not of the head group is told to leave."""
        keep_kv = self._pending_eviction[i] == EVICT_KEEP
        self._pending_eviction[i] = NO_EVICTION
        inside = np.flatnonzero(self._requests["instance"] == i)
        foreign = self._requests["group"][inside] != self._queue["head"][i]
        leaving: list[int] = inside[foreign].tolist()
        if leaving and self._command(i, partial(self.backend.evict, i, leaving, keep_kv)):
            self._evicted.update(leaving)
        self._refresh(i)

    def _swap_when_empty(self, i: int) -> None:
        """Begin the pending swap if nothing is in the engine any more."""
        model = int(self._pending_swap[i])
        engine = self._engine[i]
        if engine["num_running"] or engine["queue_length"]:
            return
        self._pending_swap[i] = NOWHERE
        if self._command(i, partial(self.backend.swap_model, i, model)):
            note(self.world, SWAP_BEGIN, i, model, 0)
        self._refresh(i)

    def _command(self, i: int, command: Callable[[], None]) -> bool:
        """Carry out a command; False if it was refused, because the instance has just failed or come back.

        Of that the backend tells next (:meth:`_explain_refusals`).
        """
        try:
            command()
        except BackendError as error:
            self._refusals.append((i, error))
            return False
        return True

    def _explain_refusals(self, events: list[BackendEvent]) -> None:
        """Raise the error of a refused command at whose instance nothing has happened."""
        changed = {event.instance for event in events if event.kind in (EventKind.DOWN, EventKind.UP)}
        refusals, self._refusals = self._refusals, []
        for i, error in refusals:
            if i not in changed:
                raise error

    def _drop_kept_kv(self, g: int) -> None:
        """The group goes to another instance: what host memory keeps of its waiting requests is of no use there."""
        r = int(self._group["head"][g])
        while r != NOWHERE:
            following = int(self._requests["next"][r])
            if self._requests["kv_host"][r] != NOWHERE:
                self.backend.drop_kv(r)
            r = following

    # ----------------------------------------------------------------- the engines as the world shows them
    def _refresh_all(self) -> None:
        """Copy the backend's engines, and log what they preempted meanwhile."""
        preempted = self.backend.fleet.engine["preemptions"] - self._engine["preemptions"]
        for i in np.flatnonzero(preempted):
            note(self.world, PREEMPT, int(i), NOWHERE, int(preempted[i]))
        self._engine[:] = self.backend.fleet.engine
        self._show_pending(slice(None))

    def _refresh(self, i: int) -> None:
        self._engine[i] = self.backend.fleet.engine[i]
        self._show_pending(slice(i, i + 1))

    def _show_pending(self, rows: slice) -> None:
        engine = self._engine[rows]
        for name, pending, nothing in (
            ("pending_eviction", self._pending_eviction[rows], NO_EVICTION),
            ("pending_swap", self._pending_swap[rows], NOWHERE),
        ):
            engine[name] = np.where(pending == nothing, engine[name], pending)


def rehearse(scenario: ScenarioSpec, panel: Panel) -> None:
    """Let the emulator serve a request in the place of a backend whose time is real, where nothing may be compiled.

    Args:
        panel: of the scenario's shapes; its content is lost.
    """
    engine = scenario.cluster.engine.model_copy(update={"enable_prefix_caching": False})
    cluster = scenario.cluster.model_copy(update={"engine": engine, "failures": ()})
    backend = EmulatorBackend(lambda: make_cluster(cluster, scenario.workload.models))
    one = make_request_table(np.zeros(1), np.array([4]), np.array([40]), np.zeros(1, int), np.zeros(1, int))
    rehearsed = scenario.model_copy(update={"cluster": cluster})
    dynamics = BackendDynamics(backend, rehearsed, one, logging=True)
    i = int(np.flatnonzero(dynamics.world.fleet.placement["num_blocks"][:, 0])[0])

    def decide(lso: Lso, seconds: float = 0.0) -> None:
        dynamics.decide(panel, *lso.code(), dynamics.now_s + seconds, False, np.inf, False)

    decide(Advance())
    for lso in (Balance(0, i), SwapModel(i, 0)):
        decide(lso)
        decide(Advance(), 1000.0 if backend.fleet.engine["active_model"][i] != 0 else 0.0)
    watch_blocking(dynamics.world, i, NOWHERE)
    decide(Evict(i, keep_kv=False))
    decide(Advance(), 1.0)
    backend.fail(i)
    decide(Advance(), 1.0)
