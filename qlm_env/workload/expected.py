"""Mean lengths of a workload's requests, from which a cluster's capacity follows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.spec import SyntheticWorkload, TraceWorkload
from qlm_env.workload.build import total_token_limits
from qlm_env.workload.lengths import lengths_at, truncate_lengths, uniform_tokens
from qlm_env.workload.trace_rows import Trace
from qlm_env.workload.traces import load_trace

NUM_POINTS = 2**17
"""Points of the quadrature; the means are then within 0.1 % (log-normal of cv 3: 1 %)."""


class ExpectedLengths(NamedTuple):
    """Mean tokens of the requests of one mix entry."""

    prompt_tokens: float
    output_tokens: float
    resident_tokens: float
    """KV tokens of a running request averaged over time: ``E[O*(P + O/2)] / E[O]``, as long ones stay longer."""


def expected_lengths(
    workload: SyntheticWorkload | TraceWorkload, *, trace: Trace | None = None
) -> tuple[ExpectedLengths, ...]:
    """Mean prompt and output tokens per entry of ``workload.mix``, in its order.

    Mega prompts and the cut to the model's context (in a trace, to ``max_total_tokens``) are included.
    A trace deals its requests to all entries alike, so only what is cut can differ between them.

    Args:
        trace: what ``load_trace(workload)`` returns, to save reading the file again.

    Raises:
        ConfigError: the trace cannot be read or selects nothing.
    """
    if isinstance(workload, SyntheticWorkload):
        prompt, output = lengths_at(workload.lengths, *_points(NUM_POINTS)[:2])
    else:
        trace = load_trace(workload) if trace is None else trace
        prompt, output = trace.prompt_tokens, trace.output_tokens
    mega = workload.mega_prompts
    mega_prompt = uniform_tokens(mega.min_tokens, mega.max_tokens, _points(len(prompt))[2])

    limits = total_token_limits(workload)
    expected = []
    for entry in range(len(workload.mix)):
        limit = None if limits is None else int(limits[entry])
        plain = _mean_lengths(prompt, output, limit)
        with_mega = _mean_lengths(mega_prompt, output, limit)
        means = (1 - mega.share) * plain + mega.share * with_mega
        expected.append(ExpectedLengths(float(means[0]), float(means[1]), float(means[2] / means[1])))
    return tuple(expected)


def _mean_lengths(prompt: NDArray[np.int32], output: NDArray[np.int32], limit: int | None) -> NDArray[np.float64]:
    """Means of prompt, output and output * (prompt + output/2), shape (3,)."""
    if limit is not None:
        prompt, output = prompt.copy(), output.copy()
        truncate_lengths(prompt, output, limit)
    token_steps = output * (prompt + 0.5 * output)
    return np.array([prompt.mean(), output.mean(), token_steps.mean()])


def _points(num_points: int) -> NDArray[np.float64]:
    """An additive low-discrepancy sequence in the unit cube, shape (3, num_points).

    Steps are the powers of ``1 / g`` with ``g**4 = g + 1`` (M. Roberts, "The unreasonable effectiveness
    of quasirandom sequences", 2018).
    """
    g = 1.2207440846057596
    steps = g ** -np.arange(1.0, 4.0)
    return (0.5 + steps[:, None] * np.arange(1, num_points + 1)) % 1.0
