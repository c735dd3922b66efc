"""The vector environment: N clusters advance together in compiled code, on one thread or several.

It gives what N single environments give (:class:`~qlm_env.env.QLMEnv`), bit for bit. A step is one compiled call per
thread (:mod:`qlm_env.batch`) on one stack of worlds (:mod:`qlm_env.worlds`); Python only begins and ends episodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from qlm_env.batch import BEGIN, EPISODE_DTYPE, Rules, Scratch, choose_legal, look_at_worlds, step_worlds
from qlm_env.cluster import instance_names, make_cluster, make_world
from qlm_env.dynamics import World
from qlm_env.errors import InvalidActionError
from qlm_env.lso import VERB_NAMES, ActionCodec
from qlm_env.metrics import episode_metrics
from qlm_env.observation import Float32, Panel, observation_space
from qlm_env.presets import make_scenario
from qlm_env.queueing.groups import recluster
from qlm_env.requests import workload_hash
from qlm_env.scenario import Episodes
from qlm_env.spec import ConfigError, ScenarioSpec
from qlm_env.worlds import WorldStack

Observations = dict[str, Float32]
Bools = NDArray[np.bool_]
Info = dict[str, Any]


class Ended(NamedTuple):
    """An episode that ended in a step, and the one that has begun in its place."""

    env: int
    """Its place in the batch."""
    observation: Observations
    """The last one of the episode that ended."""
    info: Info
    """The last one, with ``metrics``."""
    next_info: Info
    """The first one of the next episode."""


class Batch(NamedTuple):
    """The result of a step: one entry per environment, in order."""

    observations: Observations
    """Where an episode ended, the first observation of the next."""
    rewards: NDArray[np.float64]
    terminations: Bools
    truncations: Bools
    infos: dict[str, NDArray[Any]]
    """``dt``, ``now_s``, ``invalid_action``, ``action_mask``, ``row_groups``; of the next episode where one ended."""
    ended: tuple[Ended, ...]


def random_legal_actions(action_mask: NDArray[np.int8], rng: np.random.Generator) -> NDArray[np.int64]:
    """For every row of ``action_mask``, shape (N, n), one of its legal actions, all equally likely; shape (N,)."""
    actions = np.empty(len(action_mask), np.int64)
    choose_legal(action_mask, rng.random(len(action_mask)), actions)
    return actions


class QLMVectorEnv(VectorEnv[Observations, NDArray[np.int64], NDArray[Any]]):
    """``num_envs`` environments as :class:`~qlm_env.env.QLMEnv`, in one.

    The interface is that of Gymnasium's vector environments with autoreset in the same step: where an episode ends, the
    step returns its last reward and ``terminated`` or ``truncated`` with the first observation and info of the next
    episode, and ``infos["final_obs"]`` and ``infos["final_info"]`` hold the last of the one that ended.
    ``infos["action_mask"]`` (N, n) and :meth:`action_masks` say what is legal.

    ``reset(seed=s)`` gives environment ``k`` the workload ``s + k``; a list gives each its own. Later episodes draw
    their seeds from each environment's own generator, as single environments do.
    ``reset(options={"reset_mask": mask})`` begins new episodes only where the mask is true.

    Args:
        num_envs: how many.
        cluster, workload, slo, environment, backend: as of :class:`~qlm_env.env.QLMEnv`. The policy's thinking time
            cannot be ``measured``: that of a batch is nobody's own.
        timeline, render_mode: single environments draw and keep timelines; must be left out.
        threads: how many share the environments. More than one pays only where a step of its part takes much longer
            than waking a thread, some 50 us: with thousands of environments, or clusters far larger than ``smoke``.

    Raises:
        ConfigError: a setting is wrong; one line that names it and what is allowed.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        cluster: str | Mapping[str, Any] = "smoke",
        workload: str | Mapping[str, Any] = "smoke",
        slo: str | Mapping[str, Any] | None = None,
        environment: str | Mapping[str, Any] | None = None,
        backend: str = "emulator",
        timeline: bool = False,
        render_mode: str | None = None,
        threads: int = 1,
    ) -> None:
        if backend != "emulator":
            raise ConfigError(f"backend '{backend}' is not available in a vector environment; allowed: emulator")
        if timeline or render_mode is not None:
            raise ConfigError(
                "'timeline' and 'render_mode' are of single environments; leave them out, or use "
                "gymnasium.make_vec(..., vectorization_mode='sync')"
            )
        for name, value in (("num_envs", num_envs), ("threads", threads)):
            if value < 1:
                raise ConfigError(f"'{name}' must be at least 1 (got {value})")
        self._episodes_of_seed = Episodes(make_scenario(cluster, workload, slo, environment))
        self.scenario: ScenarioSpec = self._episodes_of_seed.scenario
        settings = self.scenario.environment
        if settings.decision_time.mode == "measured":
            raise ConfigError(
                "'environment.decision_time.mode': 'measured' is not available in a vector environment; "
                "allowed: zero, fixed"
            )
        self.num_envs = num_envs
        num_instances, num_models = self.scenario.cluster.num_instances, len(self.scenario.workload.models)
        self.instance_names = instance_names(self.scenario.cluster)
        self._class_names = [c.name for c in self.scenario.slo.classes]
        self.codec = ActionCodec(settings.max_groups, num_instances, num_models)
        self.single_action_space = spaces.Discrete(self.codec.num_actions)
        single = observation_space(settings.max_groups, num_instances, num_models, len(self._class_names))
        self.single_observation_space = single
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(single, num_envs)
        self._rules = Rules(
            decision_interval_s=settings.decision_interval_s,
            max_actions_per_epoch=settings.max_actions_per_epoch,
            thinking=settings.decision_time.mode == "fixed",
            thinking_s=settings.decision_time.fixed_s,
            swap_cost=settings.costs.swap,
            eviction_cost=settings.costs.eviction,
        )
        self._fleet = make_cluster(self.scenario.cluster, self.scenario.workload.models)
        self._stack: WorldStack | None = None
        self._episodes = np.zeros(num_envs, EPISODE_DTYPE).view(np.recarray)
        # Views of the fields; of a plain array, because to look one up in records takes NumPy microseconds.
        plain = self._episodes.view(np.ndarray)
        self._last = {name: plain[name] for name in EPISODE_DTYPE.names or ()}
        self._row_groups = np.zeros((num_envs, settings.max_groups), np.int32)
        self._action_mask = np.zeros((num_envs, self.codec.num_actions), np.int8)
        self._shapes = {name: (num_envs, *(box.shape or ())) for name, box in single.items()}
        self._kept: dict[str, Any] = {
            "row_groups": self._row_groups,
            "action_mask": self._action_mask,
            "order": np.zeros(0, np.int32),  # every thread has its own
            "urgency": np.zeros(0),
        }
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._seeds: list[int | None] = [None] * num_envs
        self._everywhere = np.ones(num_envs, bool)
        self._clustered_at_arrival = np.zeros(num_envs, np.int64)
        self._begin_all = np.full(num_envs, BEGIN, np.int64)
        self._parts = np.array_split(np.arange(num_envs), min(threads, num_envs))
        self._pool = ThreadPoolExecutor(len(self._parts) - 1, "qlm-vector") if len(self._parts) > 1 else None

    # ----------------------------------------------------------------- Gymnasium
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, Info]:
        """Begin an episode in every environment, or where ``options["reset_mask"]``, (N,) bool, is true.

        Args:
            seed: of environment 0, the others counting on from it; or one for each; or None, drawn by each.

        Returns:
            the observations of all environments, and the infos of those reset.
        """
        mask = self._reset_mask(options)
        seeds = self._seeds_of_reset(seed)
        chosen = [int(k) for k in np.flatnonzero(mask)]
        for k in chosen:
            if seeds[k] is not None:
                self._generators[k], self._seeds[k] = seeding.np_random(seeds[k])
        panels = self._new_panels()
        hashes = self._begin(chosen, seeds, panels)
        kept = np.flatnonzero(~mask)
        if len(kept):
            look_at_worlds(self._worlds(), panels, self._episodes, self._rules, self._scratch, kept)
        infos: Info = {}
        for name, values in self._infos().items():
            values[kept] = 0
            infos[name], infos[f"_{name}"] = values, mask.copy()
        for k, text in hashes.items():
            infos = self._add_info(infos, {"workload_hash": text}, k)
        return _observations(panels), infos

    def step(self, actions: ArrayLike) -> tuple[Observations, NDArray[np.float64], Bools, Bools, Info]:
        """Take one action in every environment.

        Args:
            actions: (N,) integers within the action space.

        Raises:
            InvalidActionError: an action is outside the space, and nothing was done; or one is illegal in strict mode.
            gymnasium.error.ResetNeeded: before the first reset.
        """
        batch = self.advance(actions)
        infos: Info = {}
        for name, values in batch.infos.items():
            infos[name], infos[f"_{name}"] = values, self._everywhere.copy()
        for ended in batch.ended:
            final = {"final_obs": ended.observation, "final_info": ended.info}
            infos = self._add_info(infos, final, ended.env)
            infos = self._add_info(infos, {"workload_hash": ended.next_info["workload_hash"]}, ended.env)
        return batch.observations, batch.rewards, batch.terminations, batch.truncations, infos

    def advance(self, actions: ArrayLike, only: NDArray[np.int64] | None = None) -> Batch:
        """As :meth:`step`, with what ended listed by environment: for adapters to other libraries.

        Args:
            only: the environments that take their action, ascending; the others stay as they are, their
                observations are undefined, and their rewards and ends are none.
        """
        chosen = self._checked(actions)
        panels = self._new_panels()
        before = self._row_groups.copy() if self.scenario.environment.strict else self._row_groups
        last = self._last
        if only is not None:
            for name in ("reward", "dt_s", "invalid", "terminated", "truncated"):
                last[name][:] = 0
        self._run(panels, chosen, self._parts if only is None else np.array_split(only, len(self._parts)))
        self._recluster()
        if self.scenario.environment.strict and last["invalid"].any():
            self._refuse(chosen, before)
        rewards = last["reward"].copy()
        terminations = last["terminated"].astype(bool)
        truncations = last["truncated"].astype(bool)
        ended: tuple[Ended, ...] = ()
        over = np.flatnonzero(terminations | truncations).tolist()
        if over:
            finals = [(_observation_at(panels, k), self._info_at(k) | {"metrics": self._metrics(k)}) for k in over]
            hashes = self._begin(over, [None] * self.num_envs, panels)
            ended = tuple(
                Ended(k, *final, self._info_at(k) | {"workload_hash": hashes[k]})
                for k, final in zip(over, finals, strict=True)
            )
        return Batch(_observations(panels), rewards, terminations, truncations, self._infos(), ended)

    def action_masks(self) -> Bools:
        """(N, n) which actions are legal now in each environment."""
        self._running()
        return self._action_mask.astype(bool)

    def state(self) -> dict[str, NDArray[Any]]:
        """Where all episodes and generators stand, as plain arrays, copies: what :meth:`restore` takes."""
        stack = self._running()
        generators = [self._generator(k).bit_generator.state for k in range(self.num_envs)]
        return {f"world_{j}": rows.copy() for j, rows in enumerate(stack.rows)} | {
            "episodes": self._episodes.view(np.ndarray).view(np.uint8).copy(),
            "row_groups": self._row_groups.copy(),
            "action_mask": self._action_mask.copy(),
            "clustered_at_arrival": self._clustered_at_arrival.copy(),
            "generators": np.frombuffer(json.dumps(generators).encode(), np.uint8),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put all episodes where another vector environment of the same settings was; after a reset.

        Raises:
            ConfigError: the state is of other settings.
        """
        rows = self._running().rows
        targets = {f"world_{j}": array for j, array in enumerate(rows)} | {
            "episodes": self._episodes.view(np.ndarray).view(np.uint8),
            "row_groups": self._row_groups,
            "action_mask": self._action_mask,
            "clustered_at_arrival": self._clustered_at_arrival,
        }
        for name, array in targets.items():
            if name not in state or state[name].shape != array.shape or state[name].dtype != array.dtype:
                raise ConfigError(f"the state of the environments is of other settings ('{name}' differs)")
        for name, array in targets.items():
            array[:] = state[name]
        for k, generator in enumerate(json.loads(bytes(state["generators"]))):
            self._generator(k).bit_generator.state = generator

    def horizon_s(self, k: int) -> float:
        """When environment ``k``'s episode is cut off, in emulated seconds."""
        return float(self._last["horizon_s"][k])

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the threads and let go of the worlds."""
        self._stack = None
        if self._pool is not None:
            self._pool.shutdown()

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """The seed of each environment's generator, as of ``SyncVectorEnv``."""
        return tuple(self._seeds)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Each environment's generator."""
        return tuple(self._generator(k) for k in range(self.num_envs))

    # ----------------------------------------------------------------- parts of a step
    def _run(self, panels: Panel, actions: NDArray[np.int64], parts: Sequence[NDArray[np.int64]]) -> None:
        """One step of the worlds in ``parts``: the first part on this thread, the others on the pool's."""
        given = (self._worlds(), panels, self._episodes, self._rules, self._scratch, actions)
        running = [
            self._pool.submit(step_worlds, *given, part, thread)
            for thread, part in enumerate(parts)
            if thread > 0 and self._pool is not None
        ]
        step_worlds(*given, parts[0], 0)
        for call in running:
            call.result()

    def _begin(self, envs: list[int], seeds: Sequence[int | None], panels: Panel) -> dict[int, str]:
        """Begin episodes in ``envs``, of the given seeds or those drawn; returns the hash of each workload."""
        hashes = {}
        for k in envs:
            seed = seeds[k]
            requests = self._episodes_of_seed.requests(
                int(self._generator(k).integers(2**31)) if seed is None else seed
            )
            world = make_world(
                self.scenario, requests, logging=False, prefixes=self._episodes_of_seed.prefixes, fleet=self._fleet
            )
            if self._stack is None:
                self._stack = WorldStack(world, self.num_envs)
                shape = (len(self._parts), len(requests))
                self._scratch = Scratch(np.zeros(shape, np.int32), np.zeros(shape))
            self._stack.put(k, world)
            self._episodes[k] = 0
            self._clustered_at_arrival[k] = 0
            self._last["horizon_s"][k] = requests["arrival_s"][-1] + self.scenario.environment.max_drain_s
            hashes[k] = workload_hash(requests)
        begun = np.array(envs, np.int64)
        step_worlds(self._worlds(), panels, self._episodes, self._rules, self._scratch, self._begin_all, begun, 0)
        self._recluster()
        return hashes

    def _recluster(self) -> None:
        """Find length clusters anew where enough requests have arrived since the last time."""
        grouping = self.scenario.environment.grouping
        if grouping.max_clusters == 1:
            return
        arrivals = self._worlds().clock["next_arrival"][:, 0]
        for k in np.flatnonzero(arrivals - self._clustered_at_arrival >= grouping.recluster_requests).tolist():
            recluster(self._running().at(k).queues, grouping.min_variance_cut)
            self._clustered_at_arrival[k] = arrivals[k]

    def _running(self) -> WorldStack:
        if self._stack is None:
            raise gym.error.ResetNeeded("call reset() first: no episode has begun, or the environment is closed")
        return self._stack

    def _worlds(self) -> World:
        return self._running().worlds

    def _generator(self, k: int) -> np.random.Generator:
        generator = self._generators[k]
        if generator is None:
            generator, self._seeds[k] = seeding.np_random()
            self._generators[k] = generator
        return generator

    def _reset_mask(self, options: dict[str, Any] | None) -> Bools:
        if options is None or "reset_mask" not in options:
            return self._everywhere
        mask = options["reset_mask"]
        if not (isinstance(mask, np.ndarray) and mask.shape == (self.num_envs,) and mask.dtype == np.bool_):
            raise ConfigError(f"options['reset_mask'] must be a bool array of shape ({self.num_envs},)")
        if not mask.any():
            raise ConfigError("options['reset_mask'] must be true somewhere")
        if not mask.all():
            self._running()
        return mask

    def _seeds_of_reset(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + k for k in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ConfigError(f"'seed' must be one number or {self.num_envs} of them (got {len(seed)})")
        return list(seed)

    def _checked(self, actions: ArrayLike) -> NDArray[np.int64]:
        given = np.asarray(actions)
        if given.shape != (self.num_envs,) or given.dtype.kind not in "iu":
            raise InvalidActionError(
                f"actions are {self.num_envs} integers of {self.single_action_space}, "
                f"not an array of {given.dtype} of shape {given.shape}"
            )
        if given.min() < 0 or given.max() >= self.codec.num_actions:
            k = int(np.argmax((given < 0) | (given >= self.codec.num_actions)))
            raise InvalidActionError(f"action {given[k]} of environment {k} is outside 0..{self.codec.num_actions - 1}")
        return np.ascontiguousarray(given, np.int64)

    def _refuse(self, actions: NDArray[np.int64], row_groups: NDArray[np.int32]) -> None:
        k = int(np.argmax(self._last["invalid"]))
        lso = self.codec.decode(int(actions[k]), row_groups[k])
        verb, instance, subject, _ = lso.code()
        raise InvalidActionError(
            f"{VERB_NAMES[verb]} is not legal in environment {k}: instance {instance}, group or model {subject} ({lso})"
        )

    def _new_panels(self) -> Panel:
        """Panels of all worlds whose observations will be given away."""
        arrays: dict[str, Any] = {name: np.empty(shape, np.float32) for name, shape in self._shapes.items()}
        return Panel(**arrays, **self._kept)

    def _infos(self) -> dict[str, NDArray[Any]]:
        """Copies of what every step tells of every environment."""
        last = self._last
        return {
            "dt": last["dt_s"].copy(),
            "now_s": last["now_s"].copy(),
            "invalid_action": last["invalid"].astype(bool),
            "action_mask": self._action_mask.copy(),
            "row_groups": self._row_groups.copy(),
        }

    def _info_at(self, k: int) -> Info:
        """The same of one environment, as a single environment tells it."""
        episode = self._episodes[k]
        return {
            "dt": float(episode.dt_s),
            "now_s": float(episode.now_s),
            "invalid_action": bool(episode.invalid),
            "action_mask": self._action_mask[k].copy(),
            "row_groups": self._row_groups[k].copy(),
        }

    def _metrics(self, k: int) -> dict[str, Any]:
        episode = self._episodes[k]
        return episode_metrics(self._running().at(k), self._class_names) | {
            "invalid_actions": int(episode.invalid_actions),
            "decisions": int(episode.decisions),
            "episode_return": float(episode.episode_return),
        }


def _observations(panels: Panel) -> Observations:
    """The observation arrays, in the order of the observation space."""
    return {
        "cluster": panels.cluster,
        "group_mask": panels.group_mask,
        "groups": panels.groups,
        "instance_mask": panels.instance_mask,
        "instances": panels.instances,
    }


def _observation_at(panels: Panel, k: int) -> Observations:
    return {name: array[k].copy() for name, array in _observations(panels).items()}
