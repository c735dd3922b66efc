"""Both engines against vLLM's own V1 scheduler, step by step, on random engines and workloads.

``make fidelity`` sets QLM_FIDELITY_CASES to more than a thousand; a plain run takes a few of each kind.
"""

from __future__ import annotations

import collections
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlm_env.backends.emulator.reference import StepRequest
from tests.fidelity.cases import EngineSettings, random_case
from tests.fidelity.conftest import COUNTS
from tests.fidelity.emulated import run_by_steps, run_compiled, ticks
from tests.fidelity.trace import Run

CASES = int(os.environ.get("QLM_FIDELITY_CASES", "48"))
CHUNK = 16


def counts(settings: EngineSettings, requests: list[StepRequest], run: Run) -> collections.Counter[str]:
    """What a case has to show for the table."""
    chunks = collections.Counter(
        row for step in run.steps for row, tokens, cached in step.scheduled if cached + tokens < requests[row].prompt
    )
    preempted = {row for step in run.steps for row in step.preempted}
    admitted: set[int] = set()
    hits = 0
    for step in run.steps:
        admitted -= set(step.preempted)
        for row, _, cached in step.scheduled:
            if row not in admitted:
                hits += cached > 0
                admitted.add(row)
    return collections.Counter(
        {
            "cases": 1,
            "steps": len(run.steps),
            "requests": len(requests),
            "preemptions": bool(preempted),
            "chunks": bool(chunks),
            "aborts": bool(run.aborted),
            "aborts after preemption": bool(run.aborted & preempted),
            "prefix hits": hits > 0,
            "ties": len({r.arrival_s for r in requests}) < len(requests),
        }
    )


def first_difference(vllm: Run, ours: Run) -> str:
    """Where two runs part, for a person to read."""
    for number, (theirs, own) in enumerate(zip(vllm.steps, ours.steps, strict=False)):
        if theirs != own:
            return f"step {number}:\nvLLM     {theirs}\nemulator {own}"
    if len(vllm.steps) != len(ours.steps):
        return f"vLLM took {len(vllm.steps)} steps, the emulator {len(ours.steps)}"
    names = ("first_token_s", "finish_s", "aborted", "final_free_blocks")
    return ", ".join(name for name in names if getattr(vllm, name) != getattr(ours, name))


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_every_step_agrees_with_vllm(first: int, vllm_core: Any, model_folder: Path, record_property: Any) -> None:
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for number in range(first, min(first + CHUNK, CASES)):
        settings, requests = random_case(number)
        case = f"case {number}, {settings}"
        expected = vllm_core.VirtualCore(model_folder, settings, requests).run()
        ours = run_by_steps(settings, requests)
        assert ours == expected, f"{case}\n{first_difference(expected, ours)}"
        assert ours.finish_s.keys() | ours.aborted == {r.row for r in requests}, case
        seen[settings.options] += counts(settings, requests, ours)

        # In the emulator clients do not go away: the compiled engine serves the same requests without.
        _, patient = random_case(number)
        for request in patient:
            request.abort_s = math.inf
        if ours.aborted:
            expected = vllm_core.VirtualCore(model_folder, settings, patient).run()
        compiled, table = run_compiled(settings, patient)
        for tick, (theirs, own) in enumerate(zip(ticks(expected), compiled, strict=True)):
            assert own == theirs, f"{case}\ncompiled engine, tick {tick}"
        for name in ("first_token_s", "finish_s"):
            times_s = [getattr(expected, name)[row] for row in range(len(patient))]
            np.testing.assert_allclose(table[name], times_s, rtol=1e-9, err_msg=f"{case} {name}")
        seen[settings.options] += collections.Counter({"compiled steps": len(compiled)})
    record_property(COUNTS, {options: dict(counted) for options, counted in seen.items()})


def test_cases_cover_what_can_go_on() -> None:
    """The random cases reach the branches they are there for, whatever the options."""
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for number in range(160):
        settings, requests = random_case(number)
        seen[settings.options] += counts(settings, requests, run_by_steps(settings, requests))
    assert len(seen) == 16
    for options, counted in seen.items():
        assert counted["preemptions"] >= 1, options
        assert counted["aborts"] >= 1, options
        assert (counted["chunks"] > 0) == ("chunked" in options), options
        assert (counted["prefix hits"] > 0) == ("prefix" in options), options
    assert sum(seen.values(), collections.Counter())["aborts after preemption"] >= 8
