"""Recorded episodes of a planner, as single decisions: what imitation learns from.

A planner gives several operations at an epoch. They become actions one after the other, each with what could be seen
and done before it, and then an ``advance``.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planners.base import Planner
from planners.learned.action_set import choose_from, make_layout, make_rules
from planners.learned.spec import ActionSet, SpacesSpec
from qlm_env.env import QLMEnv
from qlm_env.lso import Advance, Lso
from qlm_env.spec import ConfigError, parse
from qlm_env.workload.atomic import atomic_path

INDEX, EPISODES = "dataset.json", "episodes"

OBSERVATIONS = ("groups", "group_mask", "instances", "instance_mask", "cluster")


@dataclass(frozen=True)
class Demonstration:
    """An episode of T decisions. G groups, I instances, n actions."""

    observations: dict[str, NDArray[np.float32]]
    """Each (T, ...)"""
    masks: NDArray[np.bool_]
    """(T, n) what was legal"""
    actions: NDArray[np.int64]
    """(T,)"""
    rewards: NDArray[np.float64]
    """(T,)"""
    dt_s: NDArray[np.float64]
    """(T,) seconds that each took"""

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True)
class Recorded:
    """A demonstration and how the episode went."""

    demonstration: Demonstration
    metrics: dict[str, Any]
    left_out: int
    """Operations that no action stands for: of groups without a row of their own, or illegal."""


def record_episode(env: QLMEnv, planner: Planner, seed: int, rng: np.random.Generator) -> Recorded:
    """Run ``planner`` through workload ``seed``, one operation at a time."""
    observation, info = env.reset(seed=seed)
    planner.reset(env.view, rng)
    kept: dict[str, list[Any]] = {name: [] for name in (*OBSERVATIONS, "mask", "action", "reward", "dt")}
    left_out = 0
    while "metrics" not in info:
        lsos: list[Lso] = [*planner.act(env.view), Advance()]
        for lso in lsos:
            try:
                action = env.codec.encode(lso, info["row_groups"])
            except ValueError:
                action = -1
            if action < 0 or not info["action_mask"][action]:
                left_out += 1
                continue
            for name in OBSERVATIONS:
                kept[name].append(observation[name])
            kept["mask"].append(info["action_mask"])
            kept["action"].append(action)
            observation, reward, _, _, info = env.step(action)
            kept["reward"].append(reward)
            kept["dt"].append(info["dt"])
            if "metrics" in info:
                break
    return Recorded(
        Demonstration(
            {name: np.array(kept[name], np.float32) for name in OBSERVATIONS},
            np.array(kept["mask"], bool),
            np.array(kept["action"], np.int64),
            np.array(kept["reward"], np.float64),
            np.array(kept["dt"], np.float64),
        ),
        info["metrics"],
        left_out,
    )


# --------------------------------------------------------------------------- files
def episode_path(folder: Path, seed: int) -> Path:
    """Where the demonstration of a workload stands."""
    return folder / EPISODES / f"seed-{seed}.npz"


def write_demonstration(path: Path, demonstration: Demonstration) -> None:
    """Write an episode, atomically. Masks are packed to bits; nothing is pickled."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            masks=np.packbits(demonstration.masks, axis=1),
            num_actions=np.array(demonstration.masks.shape[1]),
            actions=demonstration.actions,
            rewards=demonstration.rewards,
            dt_s=demonstration.dt_s,
            **demonstration.observations,  # type: ignore[arg-type]
        )


def read_demonstration(path: Path) -> Demonstration:
    """Read an episode.

    Raises:
        ConfigError: the file is missing, cut short or of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            num_actions = int(arrays["num_actions"])
            demonstration = Demonstration(
                {name: arrays[name] for name in OBSERVATIONS},
                np.unpackbits(arrays["masks"], axis=1, count=num_actions).astype(bool),
                arrays["actions"],
                arrays["rewards"],
                arrays["dt_s"],
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        raise ConfigError(f"'{path}' is not a recorded episode, or was cut short") from None
    lengths = {len(array) for array in (*demonstration.observations.values(), demonstration.masks)}
    if lengths != {len(demonstration)}:
        raise ConfigError(f"'{path}': arrays of different lengths")
    return demonstration


def write_index(folder: Path, spaces: SpacesSpec, about: dict[str, Any]) -> None:
    """Say what the episodes in ``folder`` are of."""
    with atomic_path(folder / INDEX) as temporary:
        temporary.write_text(json.dumps({"spaces": spaces.model_dump(), **about}, indent=2) + "\n", encoding="utf-8")


def read_index(folder: Path) -> tuple[SpacesSpec, list[Path]]:
    """The sizes of the observations, and the episodes' files in order of seed.

    Raises:
        ConfigError: there is no dataset.
    """
    try:
        values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        spaces = parse(SpacesSpec, values["spaces"])
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"no recorded episodes in '{folder}': {INDEX} is missing or not valid") from None
    files = sorted((folder / EPISODES).glob("seed-*.npz"), key=lambda path: int(path.stem.partition("-")[2]))
    if not files:
        raise ConfigError(f"no recorded episodes in '{folder}'")
    return spaces, files


# --------------------------------------------------------------------------- for learning
def returns(demonstration: Demonstration, gamma: float, reward_scale: float) -> NDArray[np.float32]:
    """(T,) the discounted return from each decision on, scaled as in training."""
    horizon_s = -1.0 / np.log(gamma)
    scale = reward_scale * max(1.0, float(demonstration.dt_s.sum()) / horizon_s)
    found = np.zeros(len(demonstration), np.float32)
    following = 0.0
    for t in reversed(range(len(demonstration))):
        following = scale * demonstration.rewards[t] + gamma ** demonstration.dt_s[t] * following
        found[t] = following
    return found


def within(demonstration: Demonstration, actions: ActionSet, spaces: SpacesSpec) -> tuple[NDArray[Any], NDArray[Any]]:
    """What a policy of an action set can learn from an episode.

    Returns:
        its masks (T, n), and which decisions (T,) it would have faced and could have taken.
    """
    masks = np.zeros(demonstration.masks.shape, bool)
    forced = np.zeros(len(demonstration), bool)
    choose_from(
        make_rules(actions),
        make_layout(spaces.max_groups, spaces.instances, spaces.models, spaces.classes),
        demonstration.masks.astype(np.int8),
        demonstration.observations["groups"],
        masks,
        forced,
        np.zeros(spaces.instances, np.int64),
    )
    taken = masks[np.arange(len(demonstration)), demonstration.actions]
    return masks, taken & ~forced


def batches(size: int, batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Minibatches of indices below ``size``, in random order, for ever."""
    while True:
        order = rng.permutation(size)
        for start in range(0, size - min(size, batch_size) + 1, batch_size):
            yield order[start : start + batch_size]
