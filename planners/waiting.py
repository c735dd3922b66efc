"""Request waiting time (RWT) as a distribution, for every request of an instance's virtual queue.

The queue is worked off in runs of groups of one model. Within a run, places in the batch become free as
:mod:`planners.renewal` has it: the resident batch by what is left of each request given the tokens it has produced,
then one length after another. Decode steps become seconds by the step time of :mod:`qlm_env.backends.emulator.latency`
with the expected batch and KV cache at that point, and every admission adds the prefill of its prompt. Between two
runs the batch drains, which is the longest of what is left, and the model is swapped.

A waiting time has two sources of variance. *Own*: the lengths and prompts that happen to come; the number of admissions
by a time is a sum over many places and requests, so waiting is close to normal. *Common*: the true mean length is known
only as well as the posterior says, and all requests share that error, so it does not shrink with the queue: it is the
shift of all waiting times when a mean moves by one standard deviation.

KV that was kept for evicted requests would shorten their prefill and add a copy; the view does not tell of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from planners.renewal import Resident, Turnover, held_tokens, left_when_settled, turnover
from planners.rwt import full_batch
from planners.step_times import StepTimes
from planners.token_posterior import TokenPosterior, mix
from qlm_env.view import ClusterView, GroupView, InstanceView, RunningRequest

Float = NDArray[np.float64]
Int = NDArray[np.int64]

DRAIN_POINTS = 160

PREEMPTION_OVERHEAD = 1.14
"""Actual over expected waiting where memory bounds the batch, for what is preempted and computed again. Fit to
llama-2-7b on an A10 with the requests of W_A, seeds 7000 to 7011; accuracy is told for others."""

Lengths = Callable[[int, int], TokenPosterior]
"""The posterior of a (model, SLO class)."""


@dataclass(frozen=True, slots=True)
class WaitingTimes:
    """Of the waiting requests of one instance in order of admission; infinite where the model does not fit."""

    group: Int
    """(Q,) id of each request's group"""
    mean_s: Float
    """(Q,) until it is first scheduled"""
    own_variance_s2: Float
    """(Q,) from the lengths that happen to come"""
    common_variance_s2: Float
    """(Q,) from what is not known of their mean; shared by all"""
    latency_mean_s: Float
    """(Q,) from there to its last token"""
    latency_variance_s2: Float
    """(Q,)"""

    @property
    def variance_s2(self) -> Float:
        """(Q,) of the waiting time."""
        return self.own_variance_s2 + self.common_variance_s2

    def quantile_s(self, probability: float) -> Float:
        """(Q,) quantiles of the waiting time, at least 0."""
        return _quantile(self.mean_s, self.variance_s2, probability)

    def completion_quantile_s(self, probability: float) -> Float:
        """(Q,) quantiles of the time to the last token, at least 0."""
        return _quantile(self.mean_s + self.latency_mean_s, self.variance_s2 + self.latency_variance_s2, probability)

    def of_group(self, group: int) -> WaitingTimes:
        """The requests of one group."""
        rows = self.group == group
        return WaitingTimes(
            self.group[rows],
            self.mean_s[rows],
            self.own_variance_s2[rows],
            self.common_variance_s2[rows],
            self.latency_mean_s[rows],
            self.latency_variance_s2[rows],
        )


def waiting_times(
    view: ClusterView,
    instance: InstanceView,
    queue: Sequence[int],
    lengths: Lengths,
    coefficient_factor: float = 1.0,
) -> WaitingTimes:
    """When each waiting request of the groups ``queue``, run in this order by ``instance``, will be scheduled first.

    Args:
        lengths: such as ``TokenPosteriors(view).of``.
        coefficient_factor: multiplies the profile's step times; other than 1 to study a profile that is wrong.

    Raises:
        ValueError: the instance is down.
    """
    if not instance.up:
        raise ValueError(f"instance {instance.index} is down: nothing waits for a time that can be told")
    groups = [view.group(g) for g in queue]
    running = list(instance.running())
    expected = _walk(view, instance, running, groups, lengths, coefficient_factor, None)
    finite = np.isfinite(expected.wait_s)
    from_prior, from_data = np.zeros_like(expected.wait_s), np.zeros_like(expected.wait_s)
    for kind in _kinds(running, groups):
        moved = _walk(view, instance, running, groups, lengths, coefficient_factor, kind)
        shift_s = moved.wait_s[finite] - expected.wait_s[finite]
        of_kind = lengths(*kind)
        share = of_kind.shared_variance_tokens2 / max(of_kind.mean_variance_tokens2, 1e-300)
        # Kinds have the error of their prior in common; what each has seen errs by itself.
        from_prior[finite] += math.sqrt(share) * shift_s
        from_data[finite] += (1.0 - share) * shift_s**2
    common = from_prior**2 + from_data
    counts = [group.waiting for group in groups]
    return WaitingTimes(
        np.repeat(np.array(queue, np.int64), counts),
        expected.wait_s,
        expected.variance_s2,
        common,
        expected.latency_s,
        expected.latency_variance_s2,
    )


def _kinds(running: Sequence[RunningRequest], groups: Sequence[GroupView]) -> list[tuple[int, int]]:
    """(model, SLO class) of all that runs or waits."""
    kinds = {(request.model, request.slo_class) for request in running}
    return sorted(kinds | {(group.model, group.slo_class) for group in groups})


class _Walk(NamedTuple):
    """Of each request along a queue, (Q,)."""

    wait_s: Float
    variance_s2: Float
    latency_s: Float
    latency_variance_s2: Float


class _Served(NamedTuple):
    """A run of groups of one model, from the time it can start."""

    walk: _Walk
    drained_s: float
    """Expected time until the batch has drained after the last request."""
    drained_variance_s2: float


def _walk(
    view: ClusterView,
    instance: InstanceView,
    running: Sequence[RunningRequest],
    groups: Sequence[GroupView],
    lengths: Lengths,
    coefficient_factor: float,
    moved: tuple[int, int] | None,
) -> _Walk:
    """The waiting times along a queue, were the mean length of the kind ``moved`` a standard deviation longer."""

    def shifted(model: int, slo_class: int) -> TokenPosterior:
        kind = lengths(model, slo_class)
        if (model, slo_class) != moved:
            return kind
        return kind.scaled(1.0 + math.sqrt(kind.mean_variance_tokens2) / kind.mean_tokens)

    def step_times(model: int) -> StepTimes:
        return StepTimes(view.scenario.cluster.engine, instance.placement(model), coefficient_factor)

    start_s, start_variance_s2 = 0.0, 0.0
    active, coming = instance.active_model, instance.coming_model
    residents = _residents(running, shifted)
    slept: set[int] = set()
    served = _Served(_never(0), 0.0, 0.0)
    if coming is not None:
        start_s = instance.loading_left_s
        if start_s == 0.0:
            # The swap was asked for and waits for the batch to drain.
            served = _serve(step_times(coming if active is None else active), [], residents, shifted, instance, True)
            start_s = served.drained_s + _swap_s(instance, active, coming, slept)
            start_variance_s2 = served.drained_variance_s2
        active, residents, served = coming, [], _Served(_never(0), 0.0, 0.0)
    walks = [_never(0)]
    waiting, served_requests = sum(group.waiting for group in groups), 0
    for model, run in itertools.groupby((group for group in groups if group.waiting), key=lambda group: group.model):
        run_groups = list(run)
        served_requests += sum(group.waiting for group in run_groups)
        if not instance.fits(model) or math.isinf(start_s):
            start_s = math.inf
            walks.append(_never(sum(group.waiting for group in run_groups)))
            continue
        if model != active:
            if residents and len(walks) == 1 and active is not None:
                served = _serve(step_times(active), [], residents, shifted, instance, True)
            start_s += served.drained_s + _swap_s(instance, active, model, slept)
            start_variance_s2 += served.drained_variance_s2
            active, residents = model, []
        served = _serve(step_times(model), run_groups, residents, shifted, instance, served_requests < waiting)
        walks.append(
            served.walk._replace(
                wait_s=start_s + served.walk.wait_s, variance_s2=start_variance_s2 + served.walk.variance_s2
            )
        )
    return _Walk(*(np.concatenate(columns) for columns in zip(*walks, strict=True)))


def _never(count: int) -> _Walk:
    return _Walk(np.full(count, np.inf), np.zeros(count), np.full(count, np.inf), np.zeros(count))


def _swap_s(instance: InstanceView, active: int | None, model: int, slept: set[int]) -> float:
    """Seconds of a swap; what was swapped out before, and is added to ``slept``, is found in host memory."""
    load_s = float(instance.placement(model)["wake_s"]) if model in slept else instance.load_s(model)
    if active is None:
        return load_s
    slept.add(active)
    return float(instance.placement(active)["sleep_s"]) + load_s


def _residents(running: Sequence[RunningRequest], lengths: Lengths) -> list[Resident]:
    by_class = sorted(running, key=lambda request: request.slo_class)
    residents = []
    for slo_class, of_class in itertools.groupby(by_class, key=lambda request: request.slo_class):
        requests = list(of_class)
        residents.append(
            Resident(
                lengths(requests[0].model, slo_class),
                np.array([request.generated_tokens for request in requests], np.float64),
                np.array([request.prompt_tokens for request in requests], np.float64),
            )
        )
    return residents


# --------------------------------------------------------------------------- one run
def _serve(
    times: StepTimes,
    groups: Sequence[GroupView],
    residents: list[Resident],
    lengths: Lengths,
    instance: InstanceView,
    drains: bool,
) -> _Served:
    """Work off ``groups`` of one model behind ``residents``; whether the batch ``drains`` then, or nobody asks."""
    if not groups:
        kinds = [resident.lengths for resident in residents]
        if not kinds:
            return _Served(_never(0), 0.0, 0.0)
        mixed = mix(kinds, np.array([float(len(resident.generated_tokens)) for resident in residents]))
        batch = turnover(residents, mixed, 0.0, 0.0, 0.0, 0.0)
        return _Served(_never(0), *_drain(times, batch, residents, mixed, 0.0, 0.0, 0.0))
    counts = np.array([group.waiting for group in groups])
    kinds = [lengths(group.model, group.slo_class) for group in groups]
    mixed = mix_groups(groups, kinds, counts)
    prompts = np.array([group.mean_prompt_tokens for group in groups])
    prompt_tokens = float(prompts @ counts / counts.sum())
    num_resident = sum(len(resident.generated_tokens) for resident in residents)
    most = float(full_batch(times.engine, times.placement, prompt_tokens, mixed.mean_tokens, mixed.variance_tokens2))
    free, refill = _places(times, instance, groups[0], most, num_resident)
    places = free + refill * num_resident
    preempted = instance.engine_queue_length if residents else 0
    total = preempted + int(counts.sum())
    batch = turnover(residents, mixed, prompt_tokens, free, refill, total + 1.0)

    # The q-th admission is expected where the count passes q - 1/2.
    position = np.arange(preempted, total) + 0.5
    steps = np.interp(position, batch.admissions, batch.steps)
    after = np.interp(position + 0.5, batch.admissions, batch.steps)
    steps_each = after - np.interp(np.maximum(position - 0.5, 0.0), batch.admissions, batch.steps)
    step_s = times.decode_s(batch.sequences, batch.kv_tokens)
    at_step_s = np.append(0.0, np.cumsum(np.diff(batch.steps) * (step_s[1:] + step_s[:-1]) / 2.0))
    prefill_s = np.array([times.prefill_s(tokens, places, batch.kv_tokens[-1]) for tokens in prompts])
    each_prefill_s = np.repeat(prefill_s, counts)
    before_s = preempted * prefill_s[0] + np.cumsum(each_prefill_s) - each_prefill_s
    wait_s = np.interp(steps, batch.steps, at_step_s) + before_s
    variance_s2 = (
        np.interp(steps, batch.steps, batch.variance) * (steps_each * np.interp(steps, batch.steps, step_s)) ** 2
    )
    prompt_variance = _prompt_variance(residents, prompt_tokens)
    if most < times.engine.max_num_seqs:
        wait_s *= PREEMPTION_OVERHEAD
        variance_s2 *= PREEMPTION_OVERHEAD**2 * memory_spread(mixed, prompt_tokens, prompt_variance)
    variance_s2 += prompt_variance * _prompt_seconds2(times, counts, num_resident, mixed, places, steps)

    together = min(places, num_resident + total)
    step_while_served_s = float(times.decode_s(together, together * held_tokens(mixed, prompt_tokens)))
    if num_resident + total > places:
        # Others are admitted meanwhile.
        step_while_served_s += places / mixed.mean_tokens * float(prefill_s.mean())
    walk = _Walk(
        wait_s,
        variance_s2,
        each_prefill_s + np.repeat([kind.mean_tokens for kind in kinds], counts) * step_while_served_s,
        np.repeat([kind.predictive_variance_tokens2 for kind in kinds], counts) * step_while_served_s**2,
    )
    if not drains:
        return _Served(walk, 0.0, 0.0)
    drained_s, drained_variance_s2 = _drain(times, batch, residents, mixed, prompt_tokens, float(steps[-1]), total)
    served_s = float(wait_s[-1]) + float(prefill_s[-1])
    return _Served(walk, served_s + drained_s, float(variance_s2[-1]) + drained_variance_s2)


def _prompt_variance(residents: list[Resident], prompt_tokens: float) -> float:
    """Of one prompt, from the batch; where there is none, that of an exponential length."""
    known = np.concatenate([np.empty(0), *(resident.prompt_tokens for resident in residents)])
    return float(known.var(ddof=1)) if len(known) > 1 else prompt_tokens**2


def _prompt_seconds2(
    times: StepTimes, counts: Int, num_resident: int, lengths: TokenPosterior, places: float, steps: Float
) -> Float:
    """(Q,) variance of waiting per variance of a prompt: a group's mean is known, not which request has which.

    After ``k`` of a group's ``n`` requests the sum of their prompts has variance ``k (1 - k/n) sigma_P^2``; each token
    is computed once and then read by every step. Over whole groups the sum is known, but not which prompts stay long:
    the sum of ``P*L`` over ``j`` requests has variance ``j sigma_P^2 sigma_L^2``.
    """
    inside = np.concatenate([np.arange(count) for count in counts])
    size = np.repeat(counts, counts)
    resident_steps = np.minimum(inside * lengths.mean_tokens / (2.0 * places), lengths.mean_tokens)
    order = inside * (1.0 - inside / size) * (times.prompt_token_s + times.kv_token_s * resident_steps) ** 2
    turned = np.minimum(1.0, steps / lengths.mean_tokens)
    served = np.arange(len(steps)) + num_resident
    stay: Float = served * lengths.predictive_variance_tokens2 * (times.kv_token_s * turned) ** 2
    return order + stay


def memory_spread(lengths: TokenPosterior, prompt_tokens: float, prompt_variance: float) -> float:
    """How much more admissions vary when memory bounds the batch: by the tokens held over time, not the time alone.

    A request holds ``W = P*L + L^2/2`` tokens times steps; the ratio of the squared coefficients of variation of ``W``
    and ``L``, with ``L`` Gamma and ``P`` independent of it.
    """
    k, scale = lengths.shape, lengths.scale_tokens
    second = scale**2 * k * (k + 1.0)
    third = second * scale * (k + 2.0)
    fourth = third * scale * (k + 3.0)
    mean = prompt_tokens * lengths.mean_tokens + second / 2.0
    variance = (
        (fourth - second**2) / 4.0
        + prompt_tokens**2 * lengths.variance_tokens2
        + prompt_tokens * (third - second * lengths.mean_tokens)
        + prompt_variance * second
    )
    return max(1.0, variance / mean**2 * k)


def mix_groups(groups: Sequence[GroupView], kinds: Sequence[TokenPosterior], counts: Int) -> TokenPosterior:
    """The length of a request of any of ``groups``; groups of one SLO class share what is not known of its mean."""
    weights: dict[int, float] = {}
    of_class: dict[int, TokenPosterior] = {}
    for group, kind, count in zip(groups, kinds, counts, strict=True):
        weights[group.slo_class] = weights.get(group.slo_class, 0.0) + float(count)
        of_class[group.slo_class] = kind
    return mix(list(of_class.values()), np.array(list(weights.values())))


def _places(
    times: StepTimes, instance: InstanceView, head: GroupView, most: float, num_resident: int
) -> tuple[float, float]:
    """Places free at once, and places filled again for each one a resident leaves; ``most`` is a full batch."""
    if not num_resident:
        return most, 1.0
    head_blocks = math.ceil(head.mean_prompt_tokens / times.engine.block_size)
    blocked = instance.free_blocks < head_blocks and num_resident < times.engine.max_num_seqs
    if blocked or num_resident > most:
        return 0.0, most / num_resident
    return most - num_resident, 1.0


def _drain(
    times: StepTimes,
    batch: Turnover,
    residents: list[Resident],
    lengths: TokenPosterior,
    prompt_tokens: float,
    from_step: float,
    num_admitted: float,
) -> tuple[float, float]:
    """Mean and variance of the seconds from ``from_step``, when nothing more is admitted, to an empty batch.

    With ``x`` of ``N`` requests expected to be there still, the batch is empty with probability ``(1 - x/N)^N``.
    """
    kinds = [*(resident.lengths for resident in residents), lengths]
    longest = max(kind.quantile_tokens(1.0 - 1e-4) for kind in kinds)
    oldest = max((float(resident.generated_tokens.max()) for resident in residents), default=0.0)
    ahead = np.linspace(0.0, longest + oldest, DRAIN_POINTS)
    grid = batch.steps[:-1]
    alive = np.zeros_like(ahead)
    if from_step <= grid[-1]:
        for resident in residents:
            alive += resident.lengths.left_survival(resident.generated_tokens, from_step + ahead).sum(axis=0)
        admitted = np.diff(np.minimum(batch.admissions[:-1], num_admitted), prepend=0.0)
        ages = np.maximum(0.0, from_step - grid)
        alive += (admitted[:, None] * lengths.survival(ages[:, None] + ahead[None, :])).sum(axis=0)
    else:
        alive += batch.sequences[-1] * left_when_settled(lengths, ahead)
    count = max(1.0, alive[0])
    some = 1.0 - (1.0 - np.minimum(1.0, alive / count)) ** count
    width = ahead[1]
    step_s = times.decode_s(np.maximum(1.0, alive), np.maximum(1.0, alive) * held_tokens(lengths, prompt_tokens))
    mean_s = float(np.trapezoid(some * step_s, dx=width))
    mean_steps = float(np.trapezoid(some, dx=width))
    variance_steps = max(0.0, 2.0 * float(np.trapezoid(ahead * some, dx=width)) - mean_steps**2)
    return mean_s, variance_steps * (mean_s / mean_steps) ** 2 if mean_steps > 0 else 0.0


def _quantile(mean: Float, variance: Float, probability: float) -> Float:
    quantile: Float = np.maximum(0.0, mean + np.sqrt(variance) * ndtri(probability))
    return quantile
