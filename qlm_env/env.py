"""The Gymnasium environment: one cluster, emulated or real, LLM serving operations as actions.

Data flow of a step: the action becomes an LSO (:mod:`.lso`) and the policy's thinking time passes. Then, in one
compiled call (:mod:`.epoch`), the LSO is applied or time passes to the next decision epoch (:mod:`.dynamics`), and
observation (:mod:`.observation`) and mask are written. Reward and time are read off the clock. Where the engines are
not the emulator's own, :mod:`.backend_dynamics` stands in the place of that call.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from qlm_env.backend_dynamics import BackendDynamics, rehearse
from qlm_env.backends.base import Backend
from qlm_env.cluster import instance_names, make_cluster, make_world
from qlm_env.dynamics import CLOCK_DTYPE, LOG_FULL, World
from qlm_env.epoch import ILLEGAL, decide
from qlm_env.errors import InvalidActionError
from qlm_env.lso import VERB_NAMES, ActionCodec, Advance, Lso, apply_lso
from qlm_env.metrics import episode_metrics
from qlm_env.observation import Float32, Panel, make_panel, observation_space
from qlm_env.prefixes import NO_PREFIXES, PromptPrefixes
from qlm_env.presets import make_scenario
from qlm_env.queueing.groups import recluster
from qlm_env.render import draw_frame, draw_text
from qlm_env.requests import RequestTable, workload_hash
from qlm_env.scenario import Episodes
from qlm_env.spec import ConfigError, ScenarioSpec
from qlm_env.timeline import Timeline
from qlm_env.view import ClusterView

Observation = dict[str, Float32]
StepResult = tuple[Observation, float, bool, bool, dict[str, Any]]

EMULATOR, VLLM = "emulator", "vllm"
BACKENDS = (EMULATOR, VLLM)


def make_vllm_backend(scenario: ScenarioSpec) -> Backend:
    """The real cluster of ``scenario``; its servers are started, or found, with the first episode.

    Raises:
        ConfigError: ``cluster.vllm`` is missing, or asks for what is not there.
    """
    # With the HTTP client that the emulator does without.
    from qlm_env.backends.vllm.build import make_backend

    return make_backend(scenario, lambda: make_cluster(scenario.cluster, scenario.workload.models))


class QLMEnv(gym.Env[Observation, np.int64]):
    """Queue management of an LLM serving cluster.

    Observation: ``Dict`` of float32 arrays in [-1, 1]: ``groups`` (G, F), ``group_mask`` (G,), ``instances`` (I, F),
    ``instance_mask`` (I,), ``cluster`` (F,); see docs/environment.md for every feature.

    Action: ``Discrete(n)``; :class:`qlm_env.lso.ActionCodec` gives the layout. Any action but ``advance`` takes no
    time. ``info["action_mask"]`` and :meth:`action_masks` say what is legal; an illegal action does nothing, is
    counted, and sets ``info["invalid_action"]``.

    Reward: per request whose outcome became certain in the step, ``+w`` if its SLO was met and ``-w`` if missed,
    weights normalised to 1 over the workload, so that an episode returns ``2 * weighted attainment - 1`` (less
    operation costs, where configured).

    Episode: ends when every request has finished or was rejected; truncated ``max_drain_s`` after the
    last arrival. ``info["metrics"]`` then holds the results. ``reset(seed=s)`` draws workload ``s``: every policy sees
    the identical requests.

    Args:
        cluster, workload, slo, environment: a preset's name, or a mapping of its values (``{"preset": name, ...}``
            overrides some); see :mod:`qlm_env.spec`.
        backend: ``"emulator"``; ``"vllm"``, real servers as ``cluster.vllm`` says, where time is real; or what makes
            a :class:`~qlm_env.backends.base.Backend` of the scenario, which is then this environment's to close.
        timeline: keep a :class:`~qlm_env.timeline.Timeline` of the episode (``env.unwrapped.timeline``).
        render_mode: ``None``, ``"ansi"`` or ``"rgb_array"``.

    Raises:
        ConfigError: a setting is wrong; one line that names it and what is allowed.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        cluster: str | Mapping[str, Any] = "smoke",
        workload: str | Mapping[str, Any] = "smoke",
        slo: str | Mapping[str, Any] | None = None,
        environment: str | Mapping[str, Any] | None = None,
        backend: str | Callable[[ScenarioSpec], Backend] = EMULATOR,
        timeline: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if isinstance(backend, str) and backend not in BACKENDS:
            raise ConfigError(f"backend '{backend}' is not available; allowed: {', '.join(BACKENDS)}")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ConfigError(f"render_mode '{render_mode}' is not available; allowed: ansi, rgb_array")
        self._episodes = Episodes(make_scenario(cluster, workload, slo, environment))
        self.scenario: ScenarioSpec = self._episodes.scenario
        if backend == VLLM:
            backend = make_vllm_backend
        self._backend = None if isinstance(backend, str) else backend(self.scenario)
        self.render_mode = render_mode
        self.instance_names = instance_names(self.scenario.cluster)
        self._class_names = [c.name for c in self.scenario.slo.classes]
        self._model_names = [m.name for m in self.scenario.workload.models]
        self._settings = self.scenario.environment
        self.codec = ActionCodec(self._settings.max_groups, len(self.instance_names), len(self._model_names))
        self.action_space = spaces.Discrete(self.codec.num_actions)
        self._observations = observation_space(
            self._settings.max_groups, len(self.instance_names), len(self._model_names), len(self._class_names)
        )
        self.observation_space = cast("spaces.Space[Observation]", self._observations)
        self._spec: EnvSpec | None = None
        self._keep_timeline = timeline or render_mode is not None
        self.timeline: Timeline | None = None
        self._world: World | None = None
        self._dynamics: BackendDynamics | None = None
        """Of the episode, where the engines are not the emulator's own."""

    # ----------------------------------------------------------------- Gymnasium
    @property
    def spec(self) -> EnvSpec | None:
        """How ``gymnasium.make`` made it; other backends than the emulator's own count as nondeterministic."""
        return self._spec

    @spec.setter
    def spec(self, value: EnvSpec | None) -> None:
        if value is not None and self._backend is not None:
            value.nondeterministic = True
        self._spec = value

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the episode of workload ``seed`` (without one: of a seed drawn from the environment's generator).

        Returns:
            observation and info at the first decision epoch, the first arrival.
        """
        super().reset(seed=seed)
        workload_seed = int(self.np_random.integers(2**31)) if seed is None else seed
        return self.start(self._episodes.requests(workload_seed), self._episodes.prefixes)

    def start(
        self, requests: RequestTable, prefixes: PromptPrefixes = NO_PREFIXES
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode on a given request table, whose state is reset, and the prefixes its prompts share.

        Backends other than the emulator's own give every request a prompt of its own, whatever ``prefixes`` say.
        """
        self._panel: Panel = make_panel(self._observations, len(requests), self.codec.num_actions)
        if self._backend is None:
            world = make_world(self.scenario, requests, logging=self._keep_timeline, prefixes=prefixes)
        else:
            if self._dynamics is None:
                rehearse(self.scenario, self._panel)
            self._dynamics = BackendDynamics(self._backend, self.scenario, requests, logging=self._keep_timeline)
            world = self._dynamics.world
        self._world = world
        self._clock = world.clock.view(CLOCK_DTYPE, np.ndarray)[0]
        self.workload_hash = workload_hash(requests)
        self._actions_this_epoch = 0
        self._clustered_at_arrival = 0
        self.invalid_actions = 0
        self.decisions = 0
        self._return = 0.0
        self._costs_charged = 0.0
        self._done = False
        self._horizon_s = float(requests["arrival_s"][-1]) + self._settings.max_drain_s
        if self._keep_timeline:
            self.timeline = Timeline(self.instance_names, self._model_names)
        self.view = ClusterView(world, self.scenario, self.instance_names)
        self._pass_time(float(requests["arrival_s"][0]), stop_at_epoch=True)
        self._recluster(world)
        info = self._info(dt=self.now_s, invalid=False) | {"workload_hash": self.workload_hash}
        self._decided_at = time.perf_counter()
        return self._panel.observation(), info

    def step(self, action: int | np.integer[Any]) -> StepResult:
        """Take one action.

        Raises:
            InvalidActionError: the action is outside the space, or illegal in strict mode.
            gymnasium.error.ResetNeeded: the episode is over.
        """
        self._running_world()
        lso = self._decode(action)
        before_s = self._charge_decision_time()
        exhausted = self._actions_this_epoch >= self._settings.max_actions_per_epoch
        invalid = exhausted and not isinstance(lso, Advance)
        if invalid:
            self._reject(lso)
        if exhausted or isinstance(lso, Advance):
            self._pass_time(self.now_s + self._settings.decision_interval_s, stop_at_epoch=True)
        else:
            self._actions_this_epoch += 1
            invalid = self._decide(lso, self.now_s, stop_at_epoch=False) == ILLEGAL
            if invalid:
                self._reject(lso)
        return self._result(before_s, invalid)

    def step_plan(self, lsos: Sequence[Lso]) -> StepResult:
        """Apply several LSOs at this epoch, in order, then advance to the next one: the planners' way in.

        Each goes through the same legality check as an action; an illegal one is skipped and counted (an error in
        strict mode).
        """
        self._running_world()
        before_s = self._charge_decision_time()
        invalid = False
        for lso in lsos:
            if not self._apply(lso):
                invalid = True
                self._reject(lso)
        self._pass_time(self.now_s + self._settings.decision_interval_s, stop_at_epoch=True)
        return self._result(before_s, invalid)

    def action_masks(self) -> NDArray[np.bool_]:
        """(n,) which actions are legal now; the sb3-contrib convention."""
        self._running_world(allow_done=True)
        return self._panel.action_mask.astype(bool)

    def render(self) -> Any:
        """The cluster as text (``ansi``) or as an RGB picture of shape (H, W, 3) (``rgb_array``)."""
        if self.render_mode is None:
            gym.logger.warn("render() was called without a render_mode")
            return None
        if self.timeline is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self.render_mode == "ansi":
            return draw_text(self.view, self.timeline)
        return draw_frame(self.view, self.timeline)

    def close(self) -> None:
        """Stop what the backend started; the environment cannot be used afterwards."""
        if self._backend is not None:
            self._backend.close()

    # ----------------------------------------------------------------- parts of a step
    @property
    def now_s(self) -> float:
        """Seconds since the episode began: emulated, or on a real cluster passed."""
        self._running_world(allow_done=True)
        return float(self._clock["now_s"])

    @property
    def requests(self) -> RequestTable:
        """The request table of the episode, as it is now (do not write to it)."""
        return self._running_world(allow_done=True).requests

    def _running_world(self, allow_done: bool = False) -> World:
        if self._world is None or (self._done and not allow_done):
            raise gym.error.ResetNeeded("call reset() before step(): the episode is over or has not begun")
        return self._world

    def _decode(self, action: int | np.integer[Any]) -> Lso:
        try:
            return self.codec.decode(operator.index(action), self._panel.row_groups)
        except TypeError:
            kind = type(action).__name__
            raise InvalidActionError(f"an action is an integer of {self.action_space}, not a {kind}") from None
        except ValueError as error:
            raise InvalidActionError(str(error)) from None

    def _charge_decision_time(self) -> float:
        """Let the policy's thinking time pass in the cluster; returns the time before it."""
        before_s = self.now_s
        self.decisions += 1
        charged = self._settings.decision_time
        if self._dynamics is not None:
            # It has passed already; what happened meanwhile is heard of before the decision takes effect.
            if self._dynamics.now_s > before_s:
                self._pass_time(self._dynamics.now_s, stop_at_epoch=False)
        elif charged.mode == "fixed":
            self._pass_time(before_s + charged.fixed_s, stop_at_epoch=False)
        elif charged.mode == "measured":
            self._pass_time(before_s + time.perf_counter() - self._decided_at, stop_at_epoch=False)
        return before_s

    def _pass_time(self, until_s: float, stop_at_epoch: bool) -> None:
        world = self._running_world()
        if stop_at_epoch:
            self._actions_this_epoch = 0
        reasons = LOG_FULL
        while reasons == LOG_FULL:
            reasons = self._decide(Advance(), until_s, stop_at_epoch)
            if self.timeline is not None:
                self.timeline.take_log(world)
                self.timeline.sample(world)

    def _recluster(self, world: World) -> None:
        """Find the length clusters anew once enough requests have arrived since the last time."""
        grouping = self._settings.grouping
        arrivals = int(self._clock["next_arrival"])
        if grouping.max_clusters > 1 and arrivals - self._clustered_at_arrival >= grouping.recluster_requests:
            recluster(world.queues, grouping.min_variance_cut)
            self._clustered_at_arrival = arrivals

    def _decide(self, lso: Lso, until_s: float, stop_at_epoch: bool) -> int:
        only_advance = self._actions_this_epoch >= self._settings.max_actions_per_epoch
        world = self._running_world()
        how = (until_s, stop_at_epoch, self._horizon_s, only_advance)
        if self._dynamics is not None:
            return self._dynamics.decide(self._panel, *lso.code(), *how)
        return decide(world, self._panel, *lso.code(), *how)

    def _apply(self, lso: Lso) -> bool:
        if self._dynamics is not None:
            return self._dynamics.apply_lso(*lso.code())
        return apply_lso(self._running_world(), *lso.code())

    def _reject(self, lso: Lso) -> None:
        if self._settings.strict:
            verb, instance, subject, _ = lso.code()
            raise InvalidActionError(
                f"{VERB_NAMES[verb]} is not legal at t={self.now_s:.3f} s: instance {instance}, "
                f"group or model {subject} ({lso})"
            )
        self.invalid_actions += 1

    def _result(self, before_s: float, invalid: bool) -> StepResult:
        world = self._running_world()
        self._recluster(world)
        clock = self._clock
        terminated = int(clock["finished"] + clock["rejected"]) == len(world.requests)
        truncated = not terminated and self.now_s >= self._horizon_s
        reward = float(clock["reward"]) - self._new_costs(world)
        clock["reward"] = 0.0
        self._return += reward
        info = self._info(dt=self.now_s - before_s, invalid=invalid)
        if terminated or truncated:
            info["metrics"] = self._metrics()
            self._done = True
        self._decided_at = time.perf_counter()
        return self._panel.observation(), reward, terminated, truncated, info

    def _new_costs(self, world: World) -> float:
        costs = self._settings.costs
        if costs.swap == 0 and costs.eviction == 0:
            return 0.0
        engine = world.fleet.engine
        total = costs.swap * float(engine["swaps"].sum()) + costs.eviction * float(engine["evictions"].sum())
        new = total - self._costs_charged
        self._costs_charged = total
        return new

    def _info(self, dt: float, invalid: bool) -> dict[str, Any]:
        return {
            "dt": dt,
            "now_s": self.now_s,
            "invalid_action": invalid,
            "action_mask": self._panel.action_mask.copy(),
            "row_groups": self._panel.row_groups.copy(),
        }

    def _metrics(self) -> dict[str, Any]:
        metrics = episode_metrics(self._running_world(), self._class_names)
        return metrics | {
            "invalid_actions": self.invalid_actions,
            "decisions": self.decisions,
            "episode_return": self._return,
        }
