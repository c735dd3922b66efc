"""The cluster as a planner reads it: thin, read-only objects over the arrays.

Everything here is known to the operator of a real cluster. A request's output length is not, so no
attribute leads to it; expected lengths come from finished requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlm_env.backends.emulator.engine import slot_generated_tokens
from qlm_env.backends.emulator.state import HOST
from qlm_env.cluster import InstanceName
from qlm_env.dynamics import World
from qlm_env.lso import Lso, is_legal
from qlm_env.observation import PRIOR_OUTPUT_TOKENS, PRIOR_REQUESTS
from qlm_env.requests import NOWHERE, Records
from qlm_env.spec import ScenarioSpec


@dataclass(frozen=True, slots=True)
class OutputStatistics:
    """Output lengths of a (model, SLO class): finished requests, shrunk towards the prior."""

    finished: int
    mean_tokens: float
    variance_tokens2: float


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """One request in a batch."""

    group: int
    model: int
    slo_class: int
    prompt_tokens: int
    generated_tokens: int
    deadline_s: float


class GroupView:
    """A live request group."""

    __slots__ = ("_record", "_world", "id")

    def __init__(self, world: World, g: int) -> None:
        self._world = world
        self._record: Any = world.queues.group[g]
        self.id = g

    @property
    def model(self) -> int:
        return int(self._record.model)

    @property
    def slo_class(self) -> int:
        return int(self._record.slo_class)

    @property
    def waiting(self) -> int:
        """Requests waiting in the group."""
        return int(self._record.waiting)

    @property
    def in_engine(self) -> int:
        """Requests of the group inside an engine."""
        return int(self._record.in_engine)

    @property
    def instance(self) -> int | None:
        """Instance whose virtual queue the group is in, or was in when its last request was pulled."""
        return None if self._record.queue == NOWHERE else int(self._record.queue)

    @property
    def queued(self) -> bool:
        """Whether it is in a virtual queue."""
        return bool(self._record.queued)

    @property
    def movable(self) -> bool:
        """Whether it may go to another instance: nothing of it is in an engine."""
        return self.in_engine == 0

    @property
    def mean_prompt_tokens(self) -> float:
        """Of the waiting requests."""
        return float(self._record.prompt_tokens) / max(1, self.waiting)

    @property
    def arrival_s(self) -> float:
        """Arrival of the first waiting request."""
        return float(self._world.requests[self._record.head].arrival_s)

    @property
    def target_s(self) -> float:
        """Latency target of the group's SLO class."""
        return float(self._world.slo[self._record.slo_class].target_s)

    @property
    def deadline_s(self) -> float:
        """Deadline of the first waiting request, the earliest in the group."""
        return self.arrival_s + self.target_s

    @property
    def last_deadline_s(self) -> float:
        """Deadline of the last waiting request."""
        return float(self._world.requests[self._record.tail].arrival_s) + self.target_s


class InstanceView:
    """An instance: its engine, residency and virtual queue."""

    __slots__ = ("_engine", "_queue", "_world", "index")

    def __init__(self, world: World, i: int) -> None:
        self._world = world
        self._engine: Any = world.fleet.engine[i]
        self._queue: Any = world.queues.queue[i]
        self.index = i

    @property
    def up(self) -> bool:
        return bool(self._engine.up)

    @property
    def active_model(self) -> int | None:
        """Model on the GPU."""
        return None if self._engine.active_model == NOWHERE else int(self._engine.active_model)

    @property
    def coming_model(self) -> int | None:
        """Model being loaded, or waiting for the batch to drain."""
        if self._engine.swap_target != NOWHERE:
            return int(self._engine.swap_target)
        return None if self._engine.pending_swap == NOWHERE else int(self._engine.pending_swap)

    @property
    def serving_model(self) -> int | None:
        """The coming model, else the active one: what new work will find."""
        return self.active_model if self.coming_model is None else self.coming_model

    @property
    def loading_left_s(self) -> float:
        """Seconds until a model being loaded is ready."""
        if self._engine.swap_target == NOWHERE:
            return 0.0
        return float(self._engine.next_event_s - self._world.clock[0].now_s)

    @property
    def num_running(self) -> int:
        return int(self._engine.num_running)

    @property
    def engine_queue_length(self) -> int:
        """Preempted requests in the engine's own queue."""
        return int(self._engine.queue_length)

    @property
    def free_blocks(self) -> int:
        return int(self._engine.free_blocks)

    @property
    def waiting(self) -> int:
        """Requests waiting in the virtual queue."""
        return int(self._queue.waiting)

    @property
    def staging(self) -> bool:
        """Whether a warm start is under way."""
        return bool(self._engine.stage_target != NOWHERE)

    def fits(self, model: int) -> bool:
        """Whether the instance can serve a model."""
        return bool(self._world.fleet.placement[self.index, model].num_blocks > 0)

    def warm(self, model: int) -> bool:
        """Whether a model is in host memory."""
        return bool(self._world.fleet.placement[self.index, model].residency == HOST)

    def placement(self, model: int) -> Any:
        """The profile of a model on this instance: a PLACEMENT_DTYPE record (do not write to it)."""
        return self._world.fleet.placement[self.index, model]

    def swap_s(self, model: int) -> float:
        """Seconds a swap to ``model`` takes once the batch is empty."""
        if model == self.serving_model:
            return 0.0
        target = self.placement(model)
        load_s = target.wake_s if self.warm(model) else target.cold_start_s
        serving = self.serving_model
        return float(load_s + (self.placement(serving).sleep_s if serving is not None else 0.0))

    @property
    def queue(self) -> list[int]:
        """Ids of the groups in the virtual queue, in order of execution."""
        groups = []
        g = int(self._queue.head)
        while g != NOWHERE:
            groups.append(g)
            g = int(self._world.queues.group[g].next)
        return groups

    def running(self) -> Iterator[RunningRequest]:
        """The batch, in order of admission."""
        for slot in range(self.num_running):
            r = int(self._world.fleet.slot[self.index, slot].request)
            request = self._world.requests[r]
            target_s = self._world.slo[request.slo_class].target_s
            yield RunningRequest(
                group=int(request.group),
                model=int(request.model),
                slo_class=int(request.slo_class),
                prompt_tokens=int(request.prompt_tokens),
                generated_tokens=int(slot_generated_tokens(self._world.fleet, self._world.requests, self.index, slot)),
                deadline_s=float(request.arrival_s + target_s),
            )


class ClusterView:
    """The whole cluster at a decision epoch."""

    def __init__(self, world: World, scenario: ScenarioSpec, names: list[InstanceName]) -> None:
        self._world = world
        self.scenario = scenario
        self.instance_names = names
        self.instances = [InstanceView(world, i) for i in range(len(names))]

    @property
    def now_s(self) -> float:
        return float(self._world.clock[0].now_s)

    @property
    def models(self) -> range:
        """Indices of the models."""
        return range(self._world.fleet.placement.shape[1])

    @property
    def groups(self) -> list[GroupView]:
        """Groups with waiting requests, by id (in order of creation)."""
        queues = self._world.queues
        live = queues.live[: queues.tally[0].live]
        waiting = live[queues.group["waiting"][live] > 0]
        return [GroupView(self._world, int(g)) for g in np.sort(waiting)]

    def group(self, g: int) -> GroupView:
        """The group of an id."""
        return GroupView(self._world, g)

    def output_statistics(self, model: int, slo_class: int) -> OutputStatistics:
        """Mean and variance of output lengths, from finished requests and the prior (an exponential of mean 256)."""
        kind: Records = self._world.queues.kind[model, slo_class]
        weight = PRIOR_REQUESTS + kind.finished
        mean = (PRIOR_REQUESTS * PRIOR_OUTPUT_TOKENS + kind.output_tokens) / weight
        square = (PRIOR_REQUESTS * 2 * PRIOR_OUTPUT_TOKENS**2 + kind.output_tokens_squared) / weight
        return OutputStatistics(int(kind.finished), float(mean), float(max(0.0, square - mean * mean)))

    def is_legal(self, lso: Lso) -> bool:
        """Whether an operation is allowed now."""
        return bool(is_legal(self._world, *lso.code()))
