"""What happened when: the events of an episode and samples of its state, for Perfetto and for pictures.

The Chrome trace format (a JSON object with ``traceEvents``) opens in https://ui.perfetto.dev and chrome://tracing.
There, every instance is a process with a track for the model on its GPU, one for warm starts, one for each
kind of operation, and counters of its requests and KV cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlm_env.cluster import InstanceName
from qlm_env.dynamics import (
    BALANCE,
    EVENT_NAMES,
    EVICT,
    FAIL,
    PREEMPT,
    PULL,
    RECOVER,
    SWAP_BEGIN,
    SWAP_END,
    WARM_BEGIN,
    WARM_END,
    World,
)
from qlm_env.requests import NOWHERE
from qlm_env.workload.atomic import atomic_path

TIMELINE_EVENT_DTYPE = np.dtype(
    [
        ("time_s", "f8"),
        ("kind", "i4"),  # an index into EVENT_NAMES
        ("instance", "i4"),
        ("group", "i4"),  # of a pull or balance, else NOWHERE
        ("model", "i4"),  # of the group, or swapped or staged; NOWHERE for evictions, preemptions, failures
        ("count", "i4"),  # requests
    ]
)

MAX_SAMPLES = 4096
MAX_COUNTED = 100_000
"""States of an instance that the counters of a trace show; of more, they show every second or k-th sample."""

TRACKS = ("model", "warm start", "balance", "pull", "evict", "preempt")
MODEL_TID, WARM_START_TID = 1, 2
MARK_TIDS = {kind: 1 + TRACKS.index(EVENT_NAMES[kind]) for kind in (BALANCE, PULL, EVICT, PREEMPT)}

CLUSTER_PID = 100
FIRST_INSTANCE_PID = 101
"""Larger than every thread id: Perfetto takes a thread with the id of its process for the main thread, and
process 0 for the idle process of an operating system."""

TraceEvent = dict[str, Any]


def sample_dtype(num_instances: int) -> np.dtype[np.void]:
    """The record of a sample, with I = ``num_instances`` entries where it says (I,)."""
    return np.dtype(
        [
            ("time_s", "f8"),
            ("settled", "i4"),  # requests whose outcome is certain
            ("met", "i4"),  # of those, with their SLO met
            ("unqueued", "i4"),  # requests waiting in groups without a virtual queue
            ("running", "i4", (num_instances,)),  # requests in the batch
            ("waiting", "i4", (num_instances,)),  # requests in the virtual queue and the engine's own queue
            ("kv_used", "f4", (num_instances,)),  # share of the KV blocks of the active model
            ("active_model", "i4", (num_instances,)),  # on the GPU, or NOWHERE
            ("loading_model", "i4", (num_instances,)),  # being loaded onto the GPU, or NOWHERE
            ("up", "?", (num_instances,)),
        ]
    )


class _Table:
    """Records of one type that grow at the end, in amortised constant time."""

    def __init__(self, dtype: np.dtype[np.void]) -> None:
        self._space = np.zeros(64, dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def filled(self) -> NDArray[np.void]:
        """A view of the records there are."""
        return self._space[: self._length]

    def extend(self, count: int) -> NDArray[np.void]:
        """Add ``count`` records and return a view of them to fill."""
        if self._length + count > len(self._space):
            grown = np.zeros(2 * (self._length + count), self._space.dtype)
            grown[: self._length] = self.filled
            self._space = grown
        self._length += count
        return self._space[self._length - count : self._length]

    def drop_every_second(self) -> None:
        kept = self.filled[::2].copy()
        self._length = len(kept)
        self._space[: self._length] = kept


class Timeline:
    """Events and samples of one episode.

    Samples lie at least ``sample_interval_s`` apart, but for the last, which is always the state when
    :meth:`sample` was last called. When there are ``max_samples`` of them, every second is dropped and the
    interval doubles, so that memory and files stay bounded however long an episode lasts.

    Args:
        instances: as given by :func:`qlm_env.cluster.instance_names`.
        models: names, by index.
    """

    def __init__(
        self,
        instances: list[InstanceName],
        models: list[str],
        sample_interval_s: float = 1.0,
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        self.instances = instances
        self.models = models
        self.sample_interval_s = sample_interval_s
        self.max_samples = max_samples
        self._events = _Table(TIMELINE_EVENT_DTYPE)
        self._samples = _Table(sample_dtype(len(instances)))

    @property
    def events(self) -> NDArray[np.void]:
        """(E,) TIMELINE_EVENT_DTYPE, in order of time."""
        return self._events.filled

    @property
    def samples(self) -> NDArray[np.void]:
        """(T,) records of :func:`sample_dtype`, in order of time; the last is the present."""
        return self._samples.filled

    # ----------------------------------------------------------------- recording
    def take_log(self, world: World) -> None:
        """Move the world's log entries here."""
        count = int(world.clock[0].events)
        if count == 0:
            return
        entries = world.log[:count]
        rows = self._events.extend(count)
        for name in ("time_s", "kind", "instance", "count"):
            rows[name] = entries[name]
        subject = entries["subject"]
        of_group = np.isin(entries["kind"], (PULL, BALANCE))
        rows["group"] = np.where(of_group, subject, NOWHERE)
        rows["model"] = subject
        rows["model"][of_group] = world.queues.group["model"][subject[of_group]]
        world.clock[0].events = 0

    def sample(self, world: World) -> None:
        """Note the present state of every instance."""
        time_s = self.samples["time_s"]
        if len(time_s) >= 2 and time_s[-1] < time_s[-2] + self.sample_interval_s:
            row = self.samples[-1]
        else:
            if len(time_s) >= self.max_samples:
                self._samples.drop_every_second()
                self.sample_interval_s *= 2
            row = self._samples.extend(1)[0]
        clock = world.clock[0]
        engine = world.fleet.engine
        queues = world.queues
        live = queues.live[: queues.tally[0].live]
        active = engine["active_model"]
        blocks = world.fleet.placement["num_blocks"][np.arange(len(active)), active]
        row["time_s"] = clock.now_s
        row["settled"] = clock.settled
        row["met"] = clock.met
        row["unqueued"] = queues.group["waiting"][live] @ (queues.group["queued"][live] == 0)
        row["running"] = engine["num_running"]
        row["waiting"] = queues.queue["waiting"] + engine["queue_length"]
        row["kv_used"] = np.where(active == NOWHERE, 0.0, 1.0 - engine["free_blocks"] / np.maximum(1, blocks))
        row["active_model"] = active
        row["loading_model"] = engine["swap_target"]
        row["up"] = engine["up"]

    # ----------------------------------------------------------------- export
    def to_chrome_trace(self) -> dict[str, Any]:
        """The timeline as a JSON object in the Chrome trace format.

        Times are whole microseconds of emulated time. Complete events (``X``) are models on GPUs, model
        loading, failures and warm starts; instants (``i``) are the other operations, with their number of
        requests; counters (``C``) are given where they change.
        """
        trace = self._metadata()
        trace += self._model_slices()
        trace += self._warm_start_slices()
        trace += self._marks()
        trace += self._counters()
        return {"traceEvents": trace, "displayTimeUnit": "ms"}

    def write(self, path: Path) -> None:
        """Write the Chrome trace to ``path``, atomically."""
        # dumps uses the compiled encoder, dump does not.
        text = json.dumps(self.to_chrome_trace(), separators=(",", ":"), allow_nan=False)
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _metadata(self) -> list[TraceEvent]:
        names = ["cluster", *(f"instance {instance.name}" for instance in self.instances)]
        trace: list[TraceEvent] = []
        for pid, name in enumerate(names, start=CLUSTER_PID):
            process = {"ph": "M", "pid": pid}
            trace.append(process | {"name": "process_name", "args": {"name": name}})
            trace.append(process | {"name": "process_sort_index", "args": {"sort_index": pid}})
            for tid, track in enumerate(TRACKS if pid >= FIRST_INSTANCE_PID else (), start=1):
                thread = process | {"tid": tid}
                trace.append(thread | {"name": "thread_name", "args": {"name": track}})
                trace.append(thread | {"name": "thread_sort_index", "args": {"sort_index": tid}})
        return trace

    def _of_kinds(self, *kinds: int) -> list[tuple[int, int, int, int]]:
        """(time in microseconds, kind, instance, model) of the events of some kinds, in order."""
        events = self.events[np.isin(self.events["kind"], kinds)]
        times = _microseconds(events["time_s"])
        columns = [events[name].tolist() for name in ("kind", "instance", "model")]
        return list(zip(times, *columns, strict=True))

    def _end(self) -> int:
        last = [table["time_s"][-1] for table in (self.events, self.samples) if len(table)]
        return max(_microseconds(np.array(last)), default=0)

    def _model_slices(self) -> list[TraceEvent]:
        """What each GPU held or loaded, without gaps but while it is empty."""
        changes = self._of_kinds(SWAP_BEGIN, SWAP_END, FAIL, RECOVER)
        slices: list[TraceEvent] = []
        held = self._initial_models(changes)
        for time, kind, i, model in changes:
            if i in held:
                name, start = held.pop(i)
                slices.append(_slice(name, i, MODEL_TID, start, time))
            if kind == SWAP_BEGIN:
                held[i] = f"loading {self.models[model]}", time
            elif kind == SWAP_END:
                held[i] = self.models[model], time
            elif kind == FAIL:
                held[i] = "down", time
        end = self._end()
        return slices + [_slice(name, i, MODEL_TID, start, end) for i, (name, start) in held.items()]

    def _initial_models(self, changes: list[tuple[int, int, int, int]]) -> dict[int, tuple[str, int]]:
        """The models on the GPUs since time 0, by instance, as far as the first sample still shows them."""
        if not len(self.samples):
            return {}
        sampled = _microseconds(self.samples["time_s"][:1])[0]
        changed = {i for time, _, i, _ in changes if time <= sampled}
        models = self.samples["active_model"][0].tolist()
        return {i: (self.models[model], 0) for i, model in enumerate(models) if model != NOWHERE and i not in changed}

    def _warm_start_slices(self) -> list[TraceEvent]:
        """Weights on their way to host memory: until they are there, a swap takes them over, or a failure."""
        slices: list[TraceEvent] = []
        staging: dict[int, tuple[int, int]] = {}
        for time, kind, i, model in self._of_kinds(WARM_BEGIN, WARM_END, SWAP_BEGIN, FAIL):
            if kind == WARM_BEGIN:
                staging[i] = model, time
            elif i in staging and (kind == FAIL or staging[i][0] == model):
                staged, start = staging.pop(i)
                slices.append(_slice(f"staging {self.models[staged]}", i, WARM_START_TID, start, time))
        end = self._end()
        return slices + [
            _slice(f"staging {self.models[model]}", i, WARM_START_TID, start, end)
            for i, (model, start) in staging.items()
        ]

    def _marks(self) -> list[TraceEvent]:
        events = self.events[np.isin(self.events["kind"], list(MARK_TIDS))]
        marks: list[TraceEvent] = []
        for time, (_, kind, i, group, model, count) in zip(
            _microseconds(events["time_s"]), events.tolist(), strict=True
        ):
            args: dict[str, Any] = {"requests": count}
            if group != NOWHERE:
                args |= {"group": group, "model": self.models[model]}
            marks.append(
                {
                    "ph": "i",
                    "s": "t",
                    "name": EVENT_NAMES[kind],
                    "pid": FIRST_INSTANCE_PID + i,
                    "tid": MARK_TIDS[kind],
                    "ts": time,
                    "args": args,
                }
            )
        return marks

    def _counters(self) -> list[TraceEvent]:
        samples = self.samples[:: 1 + len(self.samples) * len(self.instances) // MAX_COUNTED]
        times = np.array(_microseconds(samples["time_s"]), dtype=np.int64)
        settled = np.maximum(1, samples["settled"])
        cluster = {
            "running": samples["running"].sum(axis=1),
            "waiting": samples["waiting"].sum(axis=1),
            "in no queue": samples["unqueued"],
        }
        counters = _counter(CLUSTER_PID, "requests", times, cluster)
        attainment = {"percent": 100 * samples["met"] // settled}
        counters += _counter(CLUSTER_PID, "SLO attainment", times, attainment)
        kv_percent = np.round(100 * samples["kv_used"]).astype(np.int64)
        for i in range(len(self.instances)):
            pid = FIRST_INSTANCE_PID + i
            requests = {"running": samples["running"][:, i], "waiting": samples["waiting"][:, i]}
            counters += _counter(pid, "requests", times, requests)
            counters += _counter(pid, "KV cache", times, {"percent": kv_percent[:, i]})
        return counters


def _microseconds(time_s: NDArray[np.float64]) -> list[int]:
    """Whole numbers, so that a slice ends exactly where the next begins: Perfetto refuses an overlap."""
    microseconds: list[int] = np.round(time_s * 1e6).astype(np.int64).tolist()
    return microseconds


def _slice(name: str, i: int, tid: int, start: int, stop: int) -> TraceEvent:
    pid = FIRST_INSTANCE_PID + i
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start, "dur": stop - start}


def _counter(
    pid: int, name: str, times: NDArray[np.int64], series: dict[str, NDArray[np.integer[Any]]]
) -> list[TraceEvent]:
    """A counter's values where one of its series changes."""
    values = np.stack(list(series.values()), axis=1)
    changed = np.ones(len(values), bool)
    changed[1:] = (values[1:] != values[:-1]).any(axis=1)
    return [
        {"ph": "C", "name": name, "pid": pid, "ts": time, "args": dict(zip(series, row, strict=True))}
        for time, row in zip(times[changed].tolist(), values[changed].tolist(), strict=True)
    ]
