"""Small random clusters, workloads and actions that reach the corners: scarce blocks, failures, ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qlm_env.backends.base import Backend
from qlm_env.backends.emulator.backend import EmulatorBackend
from qlm_env.cluster import make_cluster
from qlm_env.env import QLMEnv
from qlm_env.lso import VERB_NAMES, Advance, Balance, Evict, Lso, Pull, SwapModel, WarmStart
from qlm_env.requests import RequestTable, make_request_table
from qlm_env.spec import ScenarioSpec

ARCHITECTURES = ("llama-2-7b", "llama-2-13b", "llama-3.1-8b")
CONTEXT_TOKENS = 160


def emulated_backend(scenario: ScenarioSpec) -> Backend:
    """The emulator behind the backend contract."""
    return EmulatorBackend(lambda: make_cluster(scenario.cluster, scenario.workload.models))


def random_env(rng: np.random.Generator, backend: str | Callable[[ScenarioSpec], Backend] = "emulator") -> QLMEnv:
    """A small environment of random settings on shipped profiles."""
    models = [f"m{k}" for k in range(rng.integers(1, 4))]
    block_size = int(rng.choice([4, 16]))
    max_num_seqs = int(rng.choice([1, 2, 4, 8]))
    instances = []
    for k in range(int(rng.integers(1, 5))):
        # The first instance fits every model, an A10 not the 13B one.
        device = "A100" if k == 0 else str(rng.choice(["A100", "A10"]))
        host_memory_gb = float(rng.choice([0.0, 20.0, 45.0]))
        instance: dict[str, Any] = {
            "device": device,
            "host_memory_gb": host_memory_gb,
            "host_kv_gb": float(rng.choice([0.0, 0.05, 0.15, 32.0])),
        }
        if host_memory_gb == 45.0 and rng.random() < 0.5:
            instance["warm_models"] = [models[0]]
        instances.append(instance)
    failures = [
        {
            "instance": int(rng.integers(len(instances))),
            "at_s": float(rng.choice([0.0, 1.0, rng.uniform(0, 60)])),
            "duration_s": float(rng.choice([1.0, rng.uniform(1, 40)])),
        }
        for _ in range(int(rng.choice([0, 0, 1, 3])))
    ]
    return QLMEnv(
        cluster={
            "instances": instances,
            "failures": failures,
            "engine": {
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_seqs + int(rng.choice([1, 40, 400])),
                "block_size": block_size,
                # One block is vLLM's own.
                "num_gpu_blocks": 1 + CONTEXT_TOKENS // block_size + int(rng.choice([0, 3, 12, 200])),
                "enable_chunked_prefill": bool(rng.random() < 0.8),
                "enable_prefix_caching": bool(rng.random() < 0.3),
                "async_scheduling": bool(rng.random() < 0.4),
                "scheduling_policy": str(rng.choice(["fcfs", "priority"])),
            },
        },
        workload={
            "kind": "synthetic",
            "models": [
                {"name": name, "architecture": ARCHITECTURES[k], "context_tokens": CONTEXT_TOKENS}
                for k, name in enumerate(models)
            ],
            "mix": [{"model": name, "slo_class": c} for name in models for c in ("a", "b", "c")],
            "arrivals": {"kind": "batch"},
            "lengths": {
                "kind": "uniform",
                "prompt_min_tokens": 1,
                "prompt_max_tokens": 20,
                "output_min_tokens": 1,
                "output_max_tokens": 20,
            },
        },
        slo={
            "metric": str(rng.choice(["e2e", "ttft"])),
            "classes": [
                {"name": name, "target_s": target_s, "weight": float(rng.choice([1.0, 2.5]))}
                for name, target_s in (("a", 1.0), ("b", 6.0), ("c", 70.0))
            ],
        },
        environment={
            "max_groups": int(rng.choice([2, 4, 16])),
            "decision_interval_s": float(rng.choice([0.3, 3.0, 15.0])),
            "auto_pull": bool(rng.random() < 0.7),
            "grouping": {
                "delta": float(rng.choice([0.2, 1.0])),
                "typical_request_tokens": CONTEXT_TOKENS // 2,
            },
            "decision_time": {"mode": "fixed", "fixed_s": 0.03} if rng.random() < 0.3 else {"mode": "zero"},
            "max_actions_per_epoch": int(rng.choice([2, 64])),
            "max_drain_s": float(rng.choice([60.0, 1000.0, 1000.0])),
        },
        timeline=bool(rng.random() < 0.2),
        backend=backend,
    )


def random_requests(rng: np.random.Generator, env: QLMEnv) -> RequestTable:
    """Requests from one token to the whole context, some longer than that."""
    n = int(rng.integers(2, 40))
    total = rng.integers(2, CONTEXT_TOKENS + 1, n)
    output = np.maximum(1, (total * rng.beta(1.0, 1.0, n)).astype(int))
    prompt = np.maximum(1, total - output)
    prompt[rng.random(n) < 0.05] += CONTEXT_TOKENS
    return make_request_table(
        np.cumsum(rng.exponential(float(rng.choice([0.0, 0.05, 0.5])), n)),
        prompt,
        output,
        rng.integers(0, len(env.scenario.workload.models), n),
        rng.integers(0, 3, n),
        rng.lognormal(0.0, 0.3, n) if rng.random() < 0.3 else np.ones(n),
    )


def random_legal_action(rng: np.random.Generator, env: QLMEnv) -> int:
    """A legal action, every verb that has one being equally likely."""
    starts = env.codec.verb_starts[: len(VERB_NAMES)]
    mask = env.action_masks()
    by_verb = [np.flatnonzero(part) + start for part, start in zip(np.split(mask, starts[1:]), starts, strict=True)]
    legal = [actions for actions in by_verb if len(actions)]
    return int(rng.choice(legal[int(rng.integers(len(legal)))]))


def random_lso(rng: np.random.Generator, env: QLMEnv) -> Lso:
    """Any operation on anything that exists, legal or not."""
    instance = int(rng.integers(len(env.instance_names)))
    model = int(rng.integers(len(env.scenario.workload.models)))
    num_groups = int(env._running_world().queues.tally[0].groups)
    choices: list[Lso] = [
        Advance(),
        Balance(int(rng.integers(max(1, num_groups))), instance, bool(rng.integers(2))),
        Pull(instance),
        Evict(instance, bool(rng.integers(2))),
        SwapModel(instance, model),
        WarmStart(instance, model),
    ]
    return choices[int(rng.choice(6, p=[0.05, 0.45, 0.15, 0.15, 0.1, 0.1]))]


def sensible_lsos(env: QLMEnv) -> list[Lso]:
    """What gets every request served in the end.

    Queue what is in no queue, each model at one instance if possible, and load what the head needs.
    """
    view = env.view
    lsos: list[Lso] = []
    for group in view.groups:
        if not group.queued:
            options = [Balance(group.id, i) for i in range(len(view.instances))]
            legal = [option for option in options if view.is_legal(option)]
            if legal:
                lsos.append(legal[group.model % len(legal)])
    for instance in view.instances:
        if instance.queue:
            model = view.group(instance.queue[0]).model
            if model != instance.active_model and view.is_legal(SwapModel(instance.index, model)):
                lsos.append(SwapModel(instance.index, model))
            if view.is_legal(Pull(instance.index)):
                lsos.append(Pull(instance.index))
    return lsos
