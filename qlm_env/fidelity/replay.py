"""A recorded run on the emulated engine: the same requests at the same times, on the same settings.

Output lengths are taken from the record, prompts are taken to share no prefix (the record does not hold their tokens;
with prefix caching a preempted request still finds its own blocks again), and the step times come from a profile
alone. Nothing of the run's own timing enters.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.backends.emulator.residency import place_initially
from qlm_env.backends.emulator.serve import serve
from qlm_env.backends.emulator.state import GPU, PLACEMENT_DTYPE, Fleet, size_prefix_cache
from qlm_env.cluster import fill_placement, make_engines
from qlm_env.fidelity.recorded import RecordedRun, check_requests_fit
from qlm_env.fidelity.recorded_requests import RecordedRequests
from qlm_env.fidelity.run_error import RunError
from qlm_env.profiles import Profile, usable_kv_blocks
from qlm_env.requests import FINISHED, RUNNING, RequestTable, make_request_table, reset_state
from qlm_env.spec import EngineSpec

Float = NDArray[np.float64]
Int = NDArray[np.int64]


class ReplayedRun(NamedTuple):
    """When the emulated engine served each request, shape (N,), in the record's order and on its clock."""

    scheduled_s: Float
    first_token_s: Float
    last_token_s: Float
    preemptions: int
    recomputed_tokens: int
    engine_steps: int


class EngineCounts(NamedTuple):
    """Requests in the batch, and waiting for a place in it, over time; shape (T,)."""

    time_s: Float
    running: Int
    waiting: Int


def replay(run: RecordedRun, profile: Profile, class_names: tuple[str, ...]) -> ReplayedRun:
    """Serve the requests of ``run`` on one emulated engine that has the run's settings and the profile's step times.

    Args:
        profile: of one instance; its tp is not compared with the run's.
        class_names: SLO classes, the most urgent first: the order of the engine's priorities, should it schedule by
            priority.

    Raises:
        ConfigError: a request is longer than the KV cache, names an SLO class that is not among ``class_names``, or
            could never be admitted.
    """
    requests = make_requests(run, profile, class_names)
    fleet = make_engine(profile, run.engine.settings, requests)
    serve(fleet, requests, 0, np.inf)
    _check_all_finished(run, requests)
    return ReplayedRun(
        scheduled_s=requests["first_scheduled_s"].copy(),
        first_token_s=requests["first_token_s"].copy(),
        last_token_s=requests["finish_s"].copy(),
        preemptions=int(requests["preemptions"].sum()),
        recomputed_tokens=int(requests["recomputed_tokens"].sum()),
        engine_steps=int(fleet.engine["tick"][0]),
    )


def sample_counts(run: RecordedRun, profile: Profile, class_names: tuple[str, ...], num_samples: int) -> EngineCounts:
    """The emulated engine at ``num_samples`` equally spaced times of the run, the last at the record's end.

    The run is served anew up to each of these times: the engine leaps, so it has no history to be read afterwards.

    Raises:
        ConfigError: as :func:`replay`.
    """
    requests = make_requests(run, profile, class_names)
    time_s = np.linspace(0.0, run.requests.last_token_s.max(), num_samples + 1)[1:]
    running, waiting = np.zeros((2, num_samples), np.int64)
    for sample, until_s in enumerate(time_s):
        reset_state(requests)
        serve(make_engine(profile, run.engine.settings, requests), requests, 0, until_s)
        in_batch, finished = (int((requests["state"] == state).sum()) for state in (RUNNING, FINISHED))
        running[sample] = in_batch
        waiting[sample] = (run.requests.arrival_s <= until_s).sum() - in_batch - finished
    return EngineCounts(time_s, running, waiting)


def make_requests(run: RecordedRun, profile: Profile, class_names: tuple[str, ...]) -> RequestTable:
    """The run's requests, all of one model, pending.

    Raises:
        ConfigError: as :func:`replay`.
    """
    path = run.folder / "requests.jsonl"
    engine = run.engine.settings
    check_requests_fit(run.requests, path, usable_kv_blocks(profile, engine) * engine.block_size)
    return make_request_table(
        run.requests.arrival_s,
        run.requests.prompt_tokens,
        run.requests.output_tokens,
        model=np.zeros(len(run.requests.line), np.int64),
        slo_class=class_indices(run.requests, class_names, path),
    )


def make_engine(profile: Profile, engine: EngineSpec, requests: RequestTable) -> Fleet:
    """A fleet of one engine with the step times and the memory of ``profile``, its model on the GPU."""
    placement = np.zeros((1, 1), PLACEMENT_DTYPE).view(np.recarray)
    fill_placement(placement[0, 0], profile, engine)
    fleet = make_engines(placement, engine, np.zeros(1), np.zeros(1))
    place_initially(fleet, 0, 0, GPU)
    return size_prefix_cache(fleet, requests)


def _check_all_finished(run: RecordedRun, requests: RequestTable) -> None:
    """Without chunked prefill an input beyond the token budget of a step is never admitted."""
    engine = run.engine.settings
    for row in (requests["state"] != FINISHED).nonzero()[0][:1]:
        tokens = int(requests["prompt_tokens"][row] + requests["generated_tokens"][row])
        raise RunError(
            run.folder / "requests.jsonl",
            f"an input of {tokens:,} tokens is never admitted without chunked prefill and with "
            f"max_num_batched_tokens={engine.max_num_batched_tokens}",
            int(run.requests.line[row]),
        )


def class_indices(requests: RecordedRequests, class_names: tuple[str, ...], path: Path) -> Int:
    """Each request's place among ``class_names``, shape (N,); 0 without a class.

    Raises:
        ConfigError: a request names another class; one line with the line of ``path``.
    """
    for name, line in zip(requests.slo_class, requests.line, strict=True):
        if name is not None and name not in class_names:
            raise RunError(path, f"'{name}' is no SLO class; allowed: {', '.join(class_names)}", int(line), "slo_class")
    return np.array([0 if name is None else class_names.index(name) for name in requests.slo_class])
