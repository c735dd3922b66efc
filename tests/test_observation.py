"""What a policy sees: every column means what the documentation says, and nothing is hidden or given away."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from qlm_env.env import QLMEnv
from qlm_env.features import (
    CLUSTER_FEATURES,
    GROUP_FEATURES,
    INSTANCE_FEATURES,
    columns,
    feature_tables,
    with_feature_tables,
)
from qlm_env.registration import ENVIRONMENTS
from qlm_env.requests import NOWHERE
from tests.random_episodes import random_env, random_legal_action, random_requests

DOCUMENT = Path(__file__).parents[1] / "docs" / "environment.md"


def log(x: float, scale: float = 4096) -> float:
    return float(min(1.0, np.log1p(x) / np.log1p(scale)))


class Reader:
    """Columns of an observation by name."""

    def __init__(self, env: QLMEnv) -> None:
        sizes = (len(env.scenario.workload.models), len(env.scenario.slo.classes))
        self._groups = columns(GROUP_FEATURES, *sizes)
        self._instances = columns(INSTANCE_FEATURES, *sizes)
        self._cluster = columns(CLUSTER_FEATURES, *sizes)

    def group(self, observation: dict[str, NDArray[np.float32]], row: int, name: str) -> list[float]:
        return list(observation["groups"][row, self._groups[name]].tolist())

    def instance(self, observation: dict[str, NDArray[np.float32]], i: int, name: str) -> list[float]:
        return list(observation["instances"][i, self._instances[name]].tolist())

    def cluster(self, observation: dict[str, NDArray[np.float32]], name: str) -> float:
        return float(observation["cluster"][self._cluster[name]].item())


def one_hot(index: int | None, size: int) -> list[float]:
    return [float(k == index) for k in range(size)]


def check_rows(env: QLMEnv, observation: dict[str, Any], row_groups: NDArray[np.int32]) -> None:
    """Compare the rows with what planners read of the same cluster."""
    view, read = env.view, Reader(env)
    num_models, num_classes = len(env.scenario.workload.models), len(env.scenario.slo.classes)
    now_s = view.now_s
    groups = sorted(view.groups, key=lambda group: (group.deadline_s, group.id))
    num_rows = len(row_groups)
    alone = groups if len(groups) <= num_rows else groups[: num_rows - 1]
    rest = groups[len(alone) :]
    assert [g for g in row_groups.tolist() if g != NOWHERE] == [group.id for group in alone]
    assert observation["group_mask"].tolist() == [float(row < len(alone) + bool(rest)) for row in range(num_rows)]
    assert not observation["groups"][len(alone) + bool(rest) :].any()
    for row, group in enumerate(alone):
        queue = view.instances[group.instance].queue if group.queued and group.instance is not None else []
        expected = {
            "model": one_hot(group.model, num_models),
            "slo_class": one_hot(group.slo_class, num_classes),
            "waiting": [log(group.waiting)],
            "in_engine": [log(group.in_engine)],
            "prompt_tokens": [min(1.0, group.mean_prompt_tokens / 4096)],
            "output_tokens": [view.group_output(group).mean_tokens / 4096],
            "slack": [max(-1.0, (group.deadline_s - now_s) / group.target_s)],
            "last_slack": [max(-1.0, (group.last_deadline_s - now_s) / group.target_s)],
            "target_s": [log(group.target_s, 36000)],
            "queued": [float(group.queued)],
            "queue": [(group.instance + 1) / len(view.instances) if queue and group.instance is not None else 0.0],
            "position": [1 / (1 + queue.index(group.id)) if queue else 0.0],
            "aggregate": [0.0],
        }
        for name, values in expected.items():
            assert read.group(observation, row, name) == pytest.approx(values, abs=1e-6), (name, group.id)
    if rest:
        waiting = sum(group.waiting for group in rest)
        shares = [sum(g.waiting for g in rest if g.model == m) / waiting for m in range(num_models)]
        last = num_rows - 1
        assert read.group(observation, last, "model") == pytest.approx(shares, abs=1e-6)
        assert read.group(observation, last, "waiting") == pytest.approx([log(waiting)], abs=1e-6)
        assert read.group(observation, last, "in_engine") == pytest.approx(
            [log(sum(group.in_engine for group in rest))], abs=1e-6
        )
        assert read.group(observation, last, "aggregate") == pytest.approx([log(len(rest) - 1)], abs=1e-6)
        assert read.group(observation, last, "queue") == [0.0]
    for instance in view.instances:
        head = view.group(instance.queue[0]) if instance.queue else None
        expected = {
            "up": [float(instance.up)],
            "active_model": one_hot(instance.active_model, num_models),
            "swap_target": one_hot(instance.coming_model, num_models),
            "warm": [float(instance.warm(m)) for m in range(num_models)],
            "fits": [float(instance.fits(m)) for m in range(num_models)],
            "loading_left": [min(1.0, instance.loading_left_s / 100)],
            "running": [instance.num_running / env.scenario.cluster.engine.max_num_seqs],
            "queue_groups": [log(len(instance.queue))],
            "queue_waiting": [log(instance.waiting)],
            "engine_queue": [log(instance.engine_queue_length)],
            "head_slack": [1.0 if head is None else max(-1.0, (head.deadline_s - now_s) / head.target_s)],
            "head_active": [float(head is not None and head.model == instance.active_model)],
        }
        for name, values in expected.items():
            assert read.instance(observation, instance.index, name) == pytest.approx(values, abs=1e-6), name
    clock = env._running_world(allow_done=True).clock[0]
    sums: dict[str, float] = {
        "waiting": log(sum(group.waiting for group in groups), 65536),
        "running": log(sum(instance.num_running for instance in view.instances), 65536),
        "groups": log(len(groups)),
        "unqueued": log(sum(not group.queued for group in groups)),
        "settled": log(int(clock.settled), 65536),
        "attainment": int(clock.met) / max(1, int(clock.settled)),
        "instances_up": sum(instance.up for instance in view.instances) / len(view.instances),
    }
    for name, value in sums.items():
        assert read.cluster(observation, name) == pytest.approx(value, abs=1e-6), name


def test_rows_say_what_the_views_say_and_stay_in_the_space() -> None:
    summed_up = False
    for seed in range(30):
        rng = np.random.default_rng(seed)
        env = random_env(rng)
        observation, info = env.start(random_requests(rng, env))
        for _ in range(60):
            assert env.observation_space.contains(observation)
            check_rows(env, observation, info["row_groups"])
            summed_up |= len(env.view.groups) > env.scenario.environment.max_groups
            if "metrics" in info:
                break
            observation, _, _, _, info = env.step(random_legal_action(rng, env))
    assert summed_up


def test_output_lengths_show_only_once_a_request_has_finished() -> None:
    """Two workloads that differ in the lengths of unfinished requests look and behave alike."""
    compared = 0
    for seed in range(20):
        env, other = random_env(np.random.default_rng(seed)), random_env(np.random.default_rng(seed))
        rng = np.random.default_rng([seed, 1])
        requests = random_requests(rng, env)
        shorter = requests.copy()
        # Only shorter: a request that is too long for every instance shows by being rejected.
        late = rng.integers(len(requests) // 4, len(requests))
        shorter["output_tokens"][late:] = np.maximum(1, shorter["output_tokens"][late:] // 2)
        observation, info = env.start(requests)
        seen, told = other.start(shorter)
        while "metrics" not in info and np.isnan([requests["finish_s"][late:], shorter["finish_s"][late:]]).all():
            for name, array in observation.items():
                np.testing.assert_array_equal(seen[name], array)
            for key in info.keys() - {"workload_hash"}:
                np.testing.assert_array_equal(told[key], info[key])
            compared += 1
            action = random_legal_action(rng, env)
            observation, _, _, _, info = env.step(action)
            seen, _, _, _, told = other.step(action)
    assert compared > 200


def test_spaces_do_not_depend_on_the_episode() -> None:
    env = QLMEnv()
    before = env.observation_space, env.action_space
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        assert observation in env.observation_space
    assert (env.observation_space, env.action_space) == before


# --------------------------------------------------------------------------- docs/environment.md
def test_the_documented_tables_are_those_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert feature_tables() in text
    assert with_feature_tables(text) == text, "run: python -m qlm_env.features docs/environment.md"


def test_the_documented_shapes_and_ids_are_those_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(QLM/\w+-v\d+)`", text, re.M)) == set(ENVIRONMENTS)
    env = QLMEnv()
    sizes = {
        "G": env.scenario.environment.max_groups,
        "I": len(env.instance_names),
        "M": len(env.scenario.workload.models),
        "C": len(env.scenario.slo.classes),
    }

    def value(formula: str) -> Any:
        return eval(re.sub(r"(?<=[\dGIMC]) ?(?=[GIMC])", "*", formula), dict(sizes))

    shapes = {name: value(f"({shape})") for name, shape in re.findall(r"^\| `(\w+)` \| \(([^|]*)\) \|", text, re.M)}
    assert shapes == {name: array.shape for name, array in env.reset(seed=0)[0].items()}
    assert [value(n) for n in re.findall(r"`n = (.*?)`", text)] == [env.codec.num_actions]
    assert re.findall(r"max_groups` \((\d+)\)", text) == [str(sizes["G"])]


def test_the_documented_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"gym": gym}
    for code in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S):
        if "sb3_contrib" not in code:
            exec(code, names)
    assert re.search(r"return -?\d\.\d+, SLO attainment \d+\.\d%, \d+ swaps", capsys.readouterr().out)
