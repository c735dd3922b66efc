"""Which models fit where, and how many requests per second instances and clusters can serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from qlm_env.profiles.load import find_profile, list_profiles, load_profile
from qlm_env.profiles.schema import BLOCK_TOKENS, Profile
from qlm_env.spec import ClusterSpec, ConfigError, EngineSpec, InstancesSpec, ModelSpec, WorkloadBase

Lengths = NDArray[np.integer] | NDArray[np.floating]


class ModelLoad(NamedTuple):
    """The traffic of one model: its share of all requests and their mean lengths."""

    model: str
    share: float
    """Any positive scale; shares are normalised to sum to 1."""
    prompt_tokens: float
    output_tokens: float
    resident_tokens: float | None = None
    """See :func:`saturated_rate_per_s`."""


def mean_resident_tokens(prompt_tokens: Lengths, output_tokens: Lengths) -> float:
    """KV tokens of a running request, averaged over time in a full batch, for sampled lengths of shape (N,).

    A request holds ``P + O/2`` tokens on average, and is there in proportion to ``O``: the mean is
    ``E[O*(P + O/2)] / E[O]``, for ShareGPT a quarter above that of requests all alike.
    """
    prompt, output = np.asarray(prompt_tokens, np.float64), np.asarray(output_tokens, np.float64)
    return float((output * (prompt + output / 2)).sum() / output.sum())


def usable_kv_blocks(profile: Profile, engine: EngineSpec) -> int:
    """KV blocks of ``engine.block_size`` tokens that requests can use on one instance.

    The engine's own ``num_gpu_blocks``, or else the profile's memory cut into blocks of that size; less the
    one that vLLM keeps as its null block.
    """
    blocks = engine.num_gpu_blocks
    if blocks is None:
        blocks = int(profile.num_gpu_blocks.value) * BLOCK_TOKENS // engine.block_size
    return max(0, blocks - 1)


def fitting_profile(
    group: InstancesSpec, engine: EngineSpec, model: ModelSpec, directory: Path | None = None
) -> Profile | None:
    """The profile of ``model`` on the instances of ``group``, or ``None`` where it does not fit.

    It fits where there is a profile of its architecture for the device and tp, and the KV cache holds one
    request of ``context_tokens``: the condition under which vLLM starts.

    Raises:
        ConfigError: the profile's file is malformed.
    """
    profile = find_profile(group.device, model.architecture, group.tp, directory)
    if profile is None or usable_kv_blocks(profile, engine) * engine.block_size < model.context_tokens:
        return None
    return profile


def saturated_rate_per_s(
    profile: Profile,
    engine: EngineSpec,
    prompt_tokens: float,
    output_tokens: float,
    resident_tokens: float | None = None,
) -> float:
    """Requests per second of one instance whose batch is always full.

    In steady state ``B = min(max_num_seqs, KV tokens / R)`` requests run at mixed progress, and every ``S``
    steps each slot serves one request: ``O`` steps, or more where the ``B*(P + O - 1)`` new tokens of that
    time exceed the token budget. The step-time formula is linear but for ``n0``, so the time of those steps
    follows from their sums, with ``n0`` applied at the mean number of tokens per step. Preemptions are left
    out, so the rate is an upper bound where KV memory is what fills up.

    Args:
        prompt_tokens: P, the mean, at least 1.
        output_tokens: O, the mean, at least 1.
        resident_tokens: R, the mean KV tokens of a running request (:func:`mean_resident_tokens`); ``None``
            takes requests as all alike, ``P + O/2``.

    Raises:
        ConfigError: one such request does not fit the KV cache.
        ValueError: a length is below 1.
    """
    resident = prompt_tokens + output_tokens / 2 if resident_tokens is None else resident_tokens
    if not (prompt_tokens >= 1 and output_tokens >= 1 and resident >= 1):
        raise ValueError(
            f"lengths must be at least 1, got prompt {prompt_tokens}, output {output_tokens}, resident {resident}"
        )
    kv_tokens = usable_kv_blocks(profile, engine) * engine.block_size
    if max(prompt_tokens + output_tokens, resident) > kv_tokens:
        raise ConfigError(
            f"a request of {prompt_tokens:g} + {output_tokens:g} tokens exceeds the {kv_tokens} tokens of KV "
            f"cache of {profile.architecture} on {profile.device} tp={profile.tp}"
        )
    batch = min(float(engine.max_num_seqs), kv_tokens / resident)
    new_tokens = batch * (prompt_tokens + output_tokens - 1)
    steps = max(output_tokens, new_tokens / engine.max_num_batched_tokens)
    # The prefill yields the first output token, so each request takes one decode fewer than its output.
    decodes = batch * (output_tokens - 1)
    # Before a step, a sequence has cached one token less than it holds on average.
    kv_read = decodes * (resident - 1)
    attention = batch * prompt_tokens**2 / 2

    # Prompts enter one after another, so of the steps in which a batch is served so many hold a prefill chunk.
    c = profile.step_time
    tokens_below = min(new_tokens / steps, c.n0_tokens) * steps
    seconds = (
        c.c0_s * steps
        + c.c1_s_per_token * tokens_below
        + c.c2_s_per_token * (new_tokens - tokens_below)
        + c.c3_s_per_kv_token * kv_read
        + c.c4_s_per_token2 * attention
        + c.c5_s_per_sequence * decodes
        + c.c6_s_per_mixed_kv_token * kv_read * min(1.0, batch / steps)
    )
    return batch / seconds


def cluster_capacity_per_s(
    cluster: ClusterSpec,
    models: Sequence[ModelSpec],
    loads: Sequence[ModelLoad],
    directory: Path | None = None,
) -> float:
    """The largest total request rate at which every model gets its share of it, swaps being free.

    A linear program over the fraction ``x[g, m]`` of time that instance group ``g`` gives to load ``m``:
    maximise ``R`` subject to ``sum_g count[g] * rate[g, m] * x[g, m] >= share[m] * R`` for each ``m`` and
    ``sum_m x[g, m] <= 1`` for each ``g``.

    Args:
        models: the models that ``loads`` name; what each fits is looked up by its architecture.
        directory: a folder with further profiles.

    Raises:
        ConfigError: there is no load, one names an unknown model or a share that is not positive, or a model
            fits no instance.
    """
    by_name = {model.name: model for model in models}
    for load in loads:
        if load.model not in by_name:
            raise ConfigError(f"loads name model {load.model!r}; allowed: {', '.join(by_name)}")
        if not load.share > 0:
            raise ConfigError(f"share of model {load.model!r} must be positive, not {load.share}")
    if not loads:
        raise ConfigError("loads must name at least one model")
    rate = np.zeros((len(cluster.instances), len(loads)))
    for g, group in enumerate(cluster.instances):
        for m, load in enumerate(loads):
            profile = fitting_profile(group, cluster.engine, by_name[load.model], directory)
            if profile is not None:
                rate[g, m] = group.count * saturated_rate_per_s(
                    profile, cluster.engine, load.prompt_tokens, load.output_tokens, load.resident_tokens
                )
    for m, load in enumerate(loads):
        if not rate[:, m].any():
            raise _fits_nowhere(cluster, by_name[load.model], directory)

    num_groups, num_loads = rate.shape
    share = np.array([load.share for load in loads]) / sum(load.share for load in loads)
    # Variables: x[g, m] in row-major order, then R in units of `scale`, which keeps the program well scaled.
    scale = float(rate.max())
    serves_share = np.zeros((num_loads, num_groups * num_loads + 1))
    for m in range(num_loads):
        serves_share[m, m:-1:num_loads] = -rate[:, m] / scale
    serves_share[:, -1] = share
    time_budget = np.zeros((num_groups, num_groups * num_loads + 1))
    for g in range(num_groups):
        time_budget[g, g * num_loads : (g + 1) * num_loads] = 1.0
    objective = np.zeros(num_groups * num_loads + 1)
    objective[-1] = -1.0
    solution = linprog(
        objective,
        A_ub=np.vstack([serves_share, time_budget]),
        b_ub=np.concatenate([np.zeros(num_loads), np.ones(num_groups)]),
        bounds=(0, None),
        method="highs",
    )
    if not solution.success:
        raise RuntimeError(f"the capacity program was not solved: {solution.message}")
    return float(solution.x[-1]) * scale


def check_placement(
    cluster: ClusterSpec, workload: WorkloadBase, directory: Path | None = None
) -> dict[str, tuple[int, ...]]:
    """For each model of ``workload``, the indices into ``cluster.instances`` of the groups that it fits.

    What fitting means: :func:`fitting_profile`.

    Raises:
        ConfigError: a model fits no group; a group's ``initial_model`` or one of its ``warm_models`` does not
            fit it; or ``host_memory_gb`` is too small for the weights of its ``warm_models`` together. One
            line naming device, model and bytes.
    """
    placement = {
        model.name: tuple(
            index
            for index, group in enumerate(cluster.instances)
            if fitting_profile(group, cluster.engine, model, directory) is not None
        )
        for model in workload.models
    }
    for model in workload.models:
        if not placement[model.name]:
            raise _fits_nowhere(cluster, model, directory)

    by_name = {model.name: model for model in workload.models}
    for index, group in enumerate(cluster.instances):
        named = [("initial_model", group.initial_model)] if group.initial_model is not None else []
        named += [("warm_models", name) for name in group.warm_models]
        for key, name in named:
            if name not in by_name:
                raise ConfigError(f"{key} names model {name!r}; allowed: {', '.join(by_name)}")
            if index not in placement[name]:
                raise ConfigError(
                    f"{key} {_describe(by_name[name], directory)} does not fit {group.device} tp={group.tp}"
                )
        _check_host_memory(group, [by_name[name] for name in dict.fromkeys(group.warm_models)], directory)
    return placement


def _check_host_memory(group: InstancesSpec, warm: Sequence[ModelSpec], directory: Path | None) -> None:
    needed_bytes = sum(_weight_bytes(model, directory) or 0.0 for model in warm)
    if needed_bytes > group.host_memory_gb * 1e9:
        raise ConfigError(
            f"host_memory_gb of {group.device} tp={group.tp} is {group.host_memory_gb:g}, but warm_models "
            f"{', '.join(model.name for model in warm)} have {needed_bytes / 1e9:.1f}e9 bytes of weights"
        )


def _fits_nowhere(cluster: ClusterSpec, model: ModelSpec, directory: Path | None) -> ConfigError:
    reasons = {}
    for group in cluster.instances:
        profile = find_profile(group.device, model.architecture, group.tp, directory)
        if profile is None:
            reason = "no profile"
        else:
            kv_tokens = usable_kv_blocks(profile, cluster.engine) * cluster.engine.block_size
            reason = f"KV cache of {kv_tokens} tokens below context_tokens={model.context_tokens}"
        reasons[f"{group.device} tp={group.tp}"] = reason
    here = ", ".join(f"{instance}: {reason}" for instance, reason in reasons.items())
    elsewhere = ", ".join(
        f"{key.device} tp={key.tp}" for key in list_profiles(directory) if key.architecture == model.architecture
    )
    return ConfigError(
        f"model {_describe(model, directory)} fits no instance of cluster {cluster.name!r} ({here}); "
        f"profiles of {model.architecture}: {elsewhere or 'none'}"
    )


def _describe(model: ModelSpec, directory: Path | None) -> str:
    num_bytes = _weight_bytes(model, directory)
    size = "" if num_bytes is None else f", {num_bytes / 1e9:.1f}e9 bytes of weights"
    return f"{model.name!r} ({model.architecture}{size})"


def _weight_bytes(model: ModelSpec, directory: Path | None) -> float | None:
    """As any profile of its architecture has it; they do not depend on the device."""
    for key in list_profiles(directory):
        if key.architecture == model.architecture:
            return load_profile(*key, directory).weight_bytes.value
    return None
