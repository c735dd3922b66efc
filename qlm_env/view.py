"""The cluster as a planner reads it: thin, read-only objects over the arrays.

Everything here is known to the operator of a real cluster. A request's output length is not, so no
attribute leads to it; expected lengths come from finished requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.backends.emulator.engine import slot_generated_tokens
from qlm_env.backends.emulator.state import HOST, NO_FINISH, STORAGE
from qlm_env.cluster import InstanceName
from qlm_env.dynamics import World
from qlm_env.lso import Lso, is_legal
from qlm_env.observation import PRIOR_OUTPUT_TOKENS, PRIOR_REQUESTS
from qlm_env.requests import NOWHERE, Records
from qlm_env.spec import ScenarioSpec
from qlm_env.worlds import copy_world


def plain(records: Records) -> NDArray[np.void]:
    """The same array without attribute access, whose fields and rows are several times faster to read in Python."""
    return records.view(np.ndarray).view(np.dtype((np.void, records.dtype)))


@dataclass(frozen=True, slots=True)
class OutputStatistics:
    """Output lengths of a (model, SLO class): finished requests, shrunk towards the prior."""

    finished: int
    mean_tokens: float
    variance_tokens2: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Requests of an episode."""

    total: int
    waiting: int
    """In groups, in a virtual queue or not."""
    finished: int


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """One request in a batch."""

    group: int
    model: int
    slo_class: int
    prompt_tokens: int
    generated_tokens: int
    deadline_s: float


class Batch(NamedTuple):
    """A running batch, request by request in order of admission, each (B,)."""

    slo_class: NDArray[np.int64]
    prompt_tokens: NDArray[np.float64]
    generated_tokens: NDArray[np.float64]
    deadline_s: NDArray[np.float64]


class GroupView:
    """A live request group."""

    __slots__ = ("_record", "_world", "id")

    def __init__(self, world: World, g: int) -> None:
        self._world = world
        self._record = plain(world.queues.group)[g]
        self.id = g

    @property
    def model(self) -> int:
        return int(self._record["model"])

    @property
    def slo_class(self) -> int:
        return int(self._record["slo_class"])

    @property
    def cluster(self) -> int:
        """Its length cluster, numbered within model and class by ascending prompt length."""
        return int(self._record["cluster"])

    @property
    def waiting(self) -> int:
        """Requests waiting in the group."""
        return int(self._record["waiting"])

    @property
    def in_engine(self) -> int:
        """Requests of the group inside an engine."""
        return int(self._record["in_engine"])

    @property
    def instance(self) -> int | None:
        """Instance whose virtual queue the group is in, or was in when its last request was pulled."""
        return None if self._record["queue"] == NOWHERE else int(self._record["queue"])

    @property
    def queued(self) -> bool:
        """Whether it is in a virtual queue."""
        return bool(self._record["queued"])

    @property
    def movable(self) -> bool:
        """Whether it may go to another instance: nothing of it is in an engine."""
        return self.in_engine == 0

    @property
    def mean_prompt_tokens(self) -> float:
        """Of the waiting requests."""
        return float(self._record["prompt_tokens"]) / max(1, self.waiting)

    @property
    def arrival_s(self) -> float:
        """Arrival of the first waiting request."""
        return float(plain(self._world.requests)["arrival_s"][self._record["head"]])

    @property
    def target_s(self) -> float:
        """Latency target of the group's SLO class."""
        return float(plain(self._world.slo)["target_s"][self._record["slo_class"]])

    @property
    def deadline_s(self) -> float:
        """Deadline of the first waiting request, the earliest in the group."""
        return self.arrival_s + self.target_s

    @property
    def last_deadline_s(self) -> float:
        """Deadline of the last waiting request."""
        return float(plain(self._world.requests)["arrival_s"][self._record["tail"]]) + self.target_s


class InstanceView:
    """An instance: its engine, residency and virtual queue."""

    __slots__ = ("_engine", "_queue", "_world", "index")

    def __init__(self, world: World, i: int) -> None:
        self._world = world
        self._engine = plain(world.fleet.engine)[i]
        self._queue = plain(world.queues.queue)[i]
        self.index = i

    @property
    def up(self) -> bool:
        return bool(self._engine["up"])

    @property
    def active_model(self) -> int | None:
        """Model on the GPU."""
        return None if self._engine["active_model"] == NOWHERE else int(self._engine["active_model"])

    @property
    def coming_model(self) -> int | None:
        """Model being loaded, or waiting for the batch to drain."""
        if self._engine["swap_target"] != NOWHERE:
            return int(self._engine["swap_target"])
        return None if self._engine["pending_swap"] == NOWHERE else int(self._engine["pending_swap"])

    @property
    def serving_model(self) -> int | None:
        """The coming model, else the active one: what new work will find."""
        return self.active_model if self.coming_model is None else self.coming_model

    @property
    def loading_left_s(self) -> float:
        """Seconds until a model being loaded is ready."""
        if self._engine["swap_target"] == NOWHERE:
            return 0.0
        return float(self._engine["next_event_s"] - plain(self._world.clock)["now_s"][0])

    @property
    def num_running(self) -> int:
        return int(self._engine["num_running"])

    @property
    def engine_queue_length(self) -> int:
        """Preempted requests in the engine's own queue."""
        return int(self._engine["queue_length"])

    @property
    def free_blocks(self) -> int:
        return int(self._engine["free_blocks"])

    @property
    def waiting(self) -> int:
        """Requests waiting in the virtual queue."""
        return int(self._queue["waiting"])

    @property
    def staging(self) -> bool:
        """Whether a warm start is under way."""
        return bool(self._engine["stage_target"] != NOWHERE)

    def fits(self, model: int) -> bool:
        """Whether the instance can serve a model."""
        return bool(self.placement(model)["num_blocks"] > 0)

    def warm(self, model: int) -> bool:
        """Whether a model is in host memory."""
        return bool(self.placement(model)["residency"] == HOST)

    def cold(self, model: int) -> bool:
        """Whether a model's weights are only in storage."""
        return bool(self.placement(model)["residency"] == STORAGE)

    def has_host_memory_for(self, model: int) -> bool:
        """Whether a model's weights fit into free host memory, beside those of the active model once it sleeps."""
        needed = self.placement(model)["weight_bytes"]
        if self.active_model is not None:
            needed = needed + self.placement(self.active_model)["weight_bytes"]
        return bool(self._engine["host_used_bytes"] + needed <= self._engine["host_memory_bytes"])

    def placement(self, model: int) -> Any:
        """The profile of a model on this instance: a PLACEMENT_DTYPE record (do not write to it)."""
        return plain(self._world.fleet.placement)[self.index, model]

    def load_s(self, model: int) -> float:
        """Seconds to bring a model onto the GPU: from host memory, or from storage.

        The active one is asked about for coming back after another; by then it sleeps in host memory, if that can
        hold it.
        """
        target = self.placement(model)
        sleeps = model == self.active_model and target["weight_bytes"] <= self._engine["host_memory_bytes"]
        if sleeps or self.warm(model):
            return float(target["wake_s"])
        if self._engine["stage_target"] == model:
            staged_s = float(self._engine["stage_end_s"] - plain(self._world.clock)["now_s"][0])
            return min(float(target["cold_start_s"]), staged_s + float(target["wake_s"]))
        return float(target["cold_start_s"])

    def swap_s(self, model: int) -> float:
        """Seconds a swap to ``model`` takes once the batch is empty."""
        if model == self.serving_model:
            return 0.0
        serving = self.serving_model
        return self.load_s(model) + (float(self.placement(serving)["sleep_s"]) if serving is not None else 0.0)

    @property
    def queue(self) -> list[int]:
        """Ids of the groups in the virtual queue, in order of execution."""
        groups = []
        links = plain(self._world.queues.group)["next"]
        g = int(self._queue["head"])
        while g != NOWHERE:
            groups.append(g)
            g = int(links[g])
        return groups

    def running_per_class(self) -> NDArray[np.int64]:
        """(C,) requests in the batch by SLO class."""
        rows = plain(self._world.fleet.slot)["request"][self.index, : self.num_running]
        return np.bincount(plain(self._world.requests)["slo_class"][rows], minlength=len(self._world.slo))

    def batch(self) -> Batch:
        """The running batch as arrays: what :meth:`running` tells, faster."""
        slot = plain(self._world.fleet.slot)[self.index, : self.num_running]
        request = plain(self._world.requests)[slot["request"]]
        left = slot["finish_tick"] - self._engine["tick"]
        generated = np.where(
            slot["finish_tick"] == NO_FINISH, request["generated_tokens"], request["output_tokens"] - left
        )
        target_s = plain(self._world.slo)["target_s"][request["slo_class"]]
        return Batch(
            slo_class=request["slo_class"].astype(np.int64),
            prompt_tokens=request["prompt_tokens"].astype(np.float64),
            generated_tokens=generated.astype(np.float64),
            deadline_s=request["arrival_s"] + target_s,
        )

    @property
    def used_blocks(self) -> int:
        """KV blocks in use."""
        model = self.active_model
        return 0 if model is None else int(self.placement(model)["num_blocks"]) - self.free_blocks

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


def _output_statistics(kinds: NDArray[np.void]) -> OutputStatistics:
    """Of several length clusters together, shape (L,)."""
    finished = int(kinds["finished"].sum())
    weight = PRIOR_REQUESTS + finished
    mean = (PRIOR_REQUESTS * PRIOR_OUTPUT_TOKENS + float(kinds["output_tokens"].sum())) / weight
    square = (PRIOR_REQUESTS * 2 * PRIOR_OUTPUT_TOKENS**2 + float(kinds["output_tokens_squared"].sum())) / weight
    return OutputStatistics(finished, mean, max(0.0, square - mean * mean))


class ClusterView:
    """The whole cluster at a decision epoch."""

    def __init__(self, world: World, scenario: ScenarioSpec, names: list[InstanceName]) -> None:
        self._world = world
        self.scenario = scenario
        self.instance_names = names
        self.instances = [InstanceView(world, i) for i in range(len(names))]

    @property
    def now_s(self) -> float:
        return float(plain(self._world.clock)["now_s"][0])

    @property
    def num_requests(self) -> int:
        """Requests of the whole episode."""
        return len(self._world.requests)

    def copy_world(self) -> World:
        """A copy of the cluster's arrays."""
        return copy_world(self._world)

    @property
    def placements(self) -> NDArray[np.void]:
        """Profiles of every model on every instance, (I, M) PLACEMENT_DTYPE (do not write to it)."""
        return plain(self._world.fleet.placement)

    @property
    def models(self) -> range:
        """Indices of the models."""
        return range(self._world.fleet.placement.shape[1])

    @property
    def groups(self) -> list[GroupView]:
        """Groups with waiting requests, by id (in order of creation)."""
        queues = self._world.queues
        live = queues.live[: plain(queues.tally)["live"][0]]
        waiting = live[plain(queues.group)["waiting"][live] > 0]
        return [GroupView(self._world, int(g)) for g in np.sort(waiting)]

    def group(self, g: int) -> GroupView:
        """The group of an id."""
        return GroupView(self._world, g)

    def output_statistics(self, model: int, slo_class: int) -> OutputStatistics:
        """Mean and variance of output lengths, from finished requests and the prior (an exponential of mean 256)."""
        return _output_statistics(plain(self._world.queues.kind)[model, slo_class])

    def group_output(self, group: GroupView) -> OutputStatistics:
        """The same of the requests of a group's model, class and length cluster."""
        cluster = group.cluster
        return _output_statistics(plain(self._world.queues.kind)[group.model, group.slo_class, cluster : cluster + 1])

    def arrivals(self) -> NDArray[np.int64]:
        """(M, C) requests so far, by model and SLO class."""
        arrived: NDArray[np.int64] = plain(self._world.queues.kind)["arrived"].sum(axis=2)
        return arrived

    def arrivals_per_model(self) -> NDArray[np.int64]:
        """(M,) requests so far."""
        arrived: NDArray[np.int64] = plain(self._world.queues.kind)["arrived"].sum(axis=(1, 2))
        return arrived

    def progress(self) -> Progress:
        """How far the episode is."""
        queues = self._world.queues
        live = queues.live[: plain(queues.tally)["live"][0]]
        waiting = int(plain(queues.group)["waiting"][live].sum())
        return Progress(len(self._world.requests), waiting, int(plain(self._world.clock)["finished"][0]))

    def is_legal(self, lso: Lso) -> bool:
        """Whether an operation is allowed now."""
        return bool(is_legal(self._world, *lso.code()))
