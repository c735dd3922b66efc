"""The least a request costs, whatever the policy: instance time and latency, from the step-time formula.

**Time.** A step with ``n`` new tokens and ``B`` decodes takes at least ``F + t*n + c3*sum(kv) + c4*sum(q*(k + q/2))
+ c5*B``, where ``F + t*n`` is a line below the token part of the formula (:func:`token_lines`). The fixed ``F`` is
shared by what runs in the step. At most ``max_num_seqs`` requests do, so each may be charged ``F/max_num_seqs``;
or, as together they hold at most the KV memory ``C``, ``F*held/C``; or, as the step computes at most
``max_num_batched_tokens`` tokens, ``F*tokens/max_num_batched_tokens``. Under any one of these rules, kept for all
requests, the charges of a step never add up to more than it took. Of lines and rules the one that charges the whole
workload most is used.

**What a request needs.** By the step in which its last token appears, each of its ``P`` prompt tokens has been
computed once, the first output token has appeared at the end of a prefill, and each of the ``O - 1`` others in a
step of its own, normally a decode. After a preemption such a step can be the end of a recomputation instead, which
computes the ``P`` prompt tokens and more; ``c3`` and ``c5`` are capped so that a decode is never charged more than
that. Anything else a policy may cause (recomputed tokens, copies of KV cache, swaps, idling) comes on top.

**Moving between instances.** A request may do part of its work on one kind of instance and part on another. Its
work falls into *parts* (prompt tokens, their attention, the first token, decodes, the growth of their KV cache),
each spread over the request's tokens in a way that is the same on all instances. Let ``W[i]`` be the work on kind
``i`` and ``a[i, f]`` the share of part ``f`` in it. If tokens in the amount ``x[i, f]`` of each part are done on
``i``, these take

``sum_f x[i, f]*a[i, f]*W[i] >= W[i]*sum_f x[i, f]*min_i a[i, f] = W[i]*s*y[i]``,

with ``s = sum_f min_i a[i, f]`` and ``y[i] = sum_f x[i, f]*min_i a[i, f]/s``, and ``sum_i y[i] = 1``. So the
request is a job of work ``s*W[i]`` that may be split at will; ``s`` is 1 where all kinds are alike. The same holds
for any division of the work over time.

With prefix caching, prompt tokens may never be computed, a recomputation may be short, and requests may share KV
blocks: then only one prompt token is charged, ``c3``, ``c4`` and ``c5`` are not, and KV memory bounds nothing.

Service noise scales a step by the mean factor of its batch: times are those of the smallest factor in the workload.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_env.cluster import make_placements
from qlm_env.profiles.token_curve import Knots
from qlm_env.requests import RequestTable
from qlm_env.spec import EngineSpec, ScenarioSpec

Float = NDArray[np.float64]


class LeastWork(NamedTuple):
    """T kinds of instances (entries of ``cluster.instances``), N requests."""

    work_s: Float
    """(T, N) instance-seconds of a request done wholly on that kind of instance, scaled so that it may be split; inf
    where its model does not fit"""
    latency_s: Float
    """(N,) of a request's own steps, each on the kind of instance that is fastest for it; inf for what can never run"""


class _Line(NamedTuple):
    """``fixed_s + token_s * n`` seconds, below the token part of a step's time."""

    fixed_s: float
    token_s: float


def token_knots(placement: Any, max_tokens: int) -> tuple[Float, Float]:
    """Points ``(n, seconds)`` between which the token part of a step's time is linear, from 0 to ``max_tokens`` tokens.

    The only place that reads the token coefficients of a PLACEMENT_DTYPE record.
    """
    knots = int(placement["num_knots"])
    if knots:
        curve = Knots(placement["knot_tokens"][:knots], placement["knot_s"][:knots])
        inside = curve.tokens[curve.tokens < max_tokens]
        tokens = np.unique([0.0, *inside, float(max_tokens)])
        return tokens, curve.at(tokens, float(placement["c2"]))
    bend = min(float(placement["n0"]), float(max_tokens))
    tokens = np.unique([0.0, bend, float(max_tokens)])
    seconds = (
        placement["c0"]
        + placement["c1"] * np.minimum(tokens, placement["n0"])
        + placement["c2"] * np.maximum(0.0, tokens - placement["n0"])
    )
    return tokens, np.asarray(seconds, np.float64)


def token_lines(tokens: Float, seconds: Float) -> list[_Line]:
    """Lines below a piecewise linear function, one along each edge of its lower convex hull.

    Args:
        tokens: (K,) increasing from 0.
        seconds: (K,) non-negative values there.

    Returns:
        only lines with a non-negative fixed part, at least one.
    """
    hull: list[int] = []
    for k in range(len(tokens)):
        while len(hull) >= 2 and _slope(tokens, seconds, hull[-2], hull[-1]) >= _slope(tokens, seconds, hull[-1], k):
            hull.pop()
        hull.append(k)
    lines = []
    for left, right in itertools.pairwise(hull):
        slope = _slope(tokens, seconds, left, right)
        lines.append(_Line(float(seconds[left] - slope * tokens[left]), slope))
    # The first edge starts at n = 0, so its fixed part is the function's value there.
    return [line for line in lines if line.fixed_s >= 0.0]


def _slope(tokens: Float, seconds: Float, left: int, right: int) -> float:
    return float((seconds[right] - seconds[left]) / (tokens[right] - tokens[left]))


def least_work(scenario: ScenarioSpec, requests: RequestTable) -> LeastWork:
    """Bounds for every request of a workload on a cluster; see the module's docstring.

    Raises:
        ConfigError: a profile is malformed.
    """
    cluster = scenario.cluster
    engine = cluster.engine
    first_of_kind = np.cumsum([0, *(group.count for group in cluster.instances)])[:-1]
    placements = make_placements(cluster, scenario.workload.models).view(np.ndarray)[first_of_kind]
    num_kinds, num_requests = len(first_of_kind), len(requests)
    parts = np.zeros((num_kinds, 5, num_requests))
    latency_parts_s = np.full((num_kinds, 4, num_requests), np.inf)
    for kind in range(num_kinds):
        for model in range(len(scenario.workload.models)):
            placement = placements[kind, model]
            of_model = np.flatnonzero(requests["model"] == model)
            if placement["num_blocks"] <= 0 or not len(of_model):
                continue
            needs = _Needs(scenario, requests[of_model], placement)
            parts[kind][:, of_model] = needs.parts_s()
            latency_parts_s[kind][:, of_model] = needs.latency_parts_s()
    factor = float(requests["service_factor"].min(initial=1.0))
    work_s = factor * parts.sum(axis=1)
    fits = placements["num_blocks"][:, requests["model"]] > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(fits[:, None, :], parts / parts.sum(axis=1, keepdims=True), np.inf)
    divisible = np.where(np.isfinite(shares).any(axis=0), shares.min(axis=0), 0.0).sum(axis=0)
    can_run = _can_run(engine, placements, requests).any(axis=0)
    return LeastWork(
        work_s=np.where(fits, work_s * divisible, np.inf),
        latency_s=np.where(can_run, factor * latency_parts_s.min(axis=0).sum(axis=0), np.inf),
    )


def _can_run(engine: EngineSpec, placements: Any, requests: RequestTable) -> NDArray[np.bool_]:
    """(T, N) whether an instance of the kind can take the request from first to last token."""
    at = placements[:, requests["model"]]
    cached = requests["prompt_tokens"].astype(np.int64) + requests["output_tokens"] - 1
    fits: NDArray[np.bool_] = (
        (at["num_blocks"] > 0)
        & (cached + 1 <= at["context_tokens"])
        & (cached <= at["num_blocks"] * engine.block_size)
        & (engine.enable_chunked_prefill | (cached <= engine.max_num_batched_tokens))
    )
    return fits


class _Needs:
    """What requests of one model need on one kind of instance, up to the event their SLO is measured on."""

    def __init__(self, scenario: ScenarioSpec, requests: NDArray[np.void], placement: Any) -> None:
        engine = scenario.cluster.engine
        self._engine = engine
        self._placement = placement
        self._lines = token_lines(*token_knots(placement, engine.max_num_batched_tokens))
        prompt = requests["prompt_tokens"].astype(np.float64)
        self._cached = engine.enable_prefix_caching
        self._prompt = prompt
        self._computed = np.ones_like(prompt) if self._cached else prompt
        to_first_token = scenario.slo.metric == "ttft"
        self._decodes = np.zeros_like(prompt) if to_first_token else requests["output_tokens"] - 1.0
        self._growth = self._decodes * (self._decodes - 1.0) / 2.0

    def parts_s(self) -> Float:
        """(5, n) seconds of each part: prompt tokens, their attention, first token, decodes, their cache's growth."""
        options = [self._parts_of(line, *share) for line in self._lines for share in self._shares_of_a_step()]
        return max(options, key=lambda parts: float(parts.sum()))

    def _shares_of_a_step(self) -> list[tuple[Float, Float, Float, Float]]:
        """Ways to share out what is fixed in a step: fractions of a step for all prompt tokens, the first token, all
        decodes, and the growth of their cache; each (n,)."""
        none = np.zeros_like(self._prompt)
        by_slot = (none, none + 1.0 / self._engine.max_num_seqs, self._decodes / self._engine.max_num_seqs, none)
        budget_tokens = float(self._engine.max_num_batched_tokens)
        by_token = (self._computed / budget_tokens, none, self._decodes / budget_tokens, none)
        if self._cached:
            return [by_slot, by_token]
        memory_tokens = float(self._placement["num_blocks"]) * self._engine.block_size
        by_memory = (
            none,
            self._prompt / memory_tokens,
            # Decode m of O - 1 holds P + m tokens.
            self._decodes * (self._prompt + 1.0) / memory_tokens,
            self._growth / memory_tokens,
        )
        return [by_slot, by_token, by_memory]

    def _parts_of(
        self, line: _Line, on_prompt: Float, on_first_token: Float, on_decodes: Float, on_growth: Float
    ) -> Float:
        p = self._placement
        c3, c5 = self._decode_costs(line)
        attention = 0.0 if self._cached else float(p["c4"])
        return np.stack(
            [
                line.token_s * self._computed + line.fixed_s * on_prompt,
                attention * self._prompt**2 / 2.0,
                line.fixed_s * on_first_token,
                self._decodes * (line.token_s + c5 + c3 * self._prompt) + line.fixed_s * on_decodes,
                c3 * self._growth + line.fixed_s * on_growth,
            ]
        )

    def _decode_costs(self, line: _Line) -> tuple[float, Float]:
        """``c3`` and (n,) ``c5``, capped so that a decode costs no more than the recomputation that can replace it.

        That computes ``P + m`` tokens where decode ``m`` reads ``P + m - 1`` of them.
        """
        if self._cached:
            return 0.0, np.zeros_like(self._prompt)
        c3 = min(float(self._placement["c3"]), line.token_s)
        return c3, np.minimum(float(self._placement["c5"]), (line.token_s - c3) * self._prompt)

    def latency_parts_s(self) -> Float:
        """(4, n) seconds of the request's own steps, alone in them: prompt tokens, their attention, decodes, growth."""
        c3, c5 = self._decode_costs(self._lines[0])
        attention = 0.0 if self._cached else float(self._placement["c4"])
        chunks = np.ceil(self._computed / self._engine.max_num_batched_tokens)
        prefill = np.max([line.fixed_s * chunks + line.token_s * self._computed for line in self._lines], axis=0)
        decode_s = max(line.fixed_s + line.token_s for line in self._lines)
        return np.stack(
            [
                prefill,
                attention * self._prompt**2 / 2.0,
                self._decodes * (decode_s + c5 + c3 * self._prompt),
                c3 * self._growth,
            ]
        )
