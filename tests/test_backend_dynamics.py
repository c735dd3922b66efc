"""Queues over the backend contract against the compiled dynamics, on the emulator that stands behind both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import qlm_env
from planners import make_planner
from planners.spec import parse_planner
from qlm_env.backends.base import Backend, BackendError, BackendEvent, EventKind
from qlm_env.backends.emulator.backend import EmulatorBackend
from qlm_env.backends.emulator.state import Fleet
from qlm_env.cluster import make_cluster
from qlm_env.dynamics import EVENT_NAMES
from qlm_env.env import QLMEnv
from qlm_env.lso import Balance, Evict, Lso, SwapModel, WarmStart
from qlm_env.requests import FINISHED, NOWHERE, RequestTable, make_request_table
from qlm_env.spec import ConfigError, ScenarioSpec
from qlm_env.view import ClusterView
from tests.random_episodes import emulated_backend, random_env, random_requests, sensible_lsos

Script = Callable[[ClusterView], Sequence[Lso]]

SMALL: dict[str, Any] = {
    "cluster": {
        "instances": [{"device": "A100", "count": 2, "initial_model": "a"}],
        "engine": {"max_num_seqs": 4},
    },
    "workload": {
        "kind": "synthetic",
        "models": [{"name": "a", "architecture": "llama-2-7b"}, {"name": "b", "architecture": "llama-2-7b"}],
        "mix": [{"model": "a", "slo_class": "urgent"}, {"model": "b", "slo_class": "patient"}],
        "arrivals": {"kind": "batch"},
    },
    "slo": {"classes": [{"name": "urgent", "target_s": 20.0}, {"name": "patient", "target_s": 600.0}]},
}
URGENT, PATIENT = 0, 1
A, B = 0, 1


def requests_of(*rows: tuple[float, int, int, int, int]) -> RequestTable:
    """Requests of (arrival_s, prompt tokens, output tokens, model, SLO class)."""
    arrival_s, prompt, output, model, slo_class = (list(column) for column in zip(*rows, strict=True))
    return make_request_table(
        np.array(arrival_s, float), np.array(prompt), np.array(output), np.array(model), np.array(slo_class)
    )


def play(env: QLMEnv, requests: RequestTable, script: Script) -> dict[str, Any]:
    """An episode; returns its metrics."""
    env.start(requests)
    info: dict[str, Any] = {}
    while "metrics" not in info:
        info = env.step_plan(script(env.view))[-1]
    metrics: dict[str, Any] = info["metrics"]
    return metrics


def both(
    rows: Iterable[tuple[float, int, int, int, int]], script: Callable[[], Script], **cluster: Any
) -> list[tuple[QLMEnv, RequestTable, dict[str, Any]]]:
    """The episode on the compiled dynamics, and through the contract."""
    played = []
    for backend in ("emulator", emulated_backend):
        env = QLMEnv(**{**SMALL, "cluster": {**SMALL["cluster"], **cluster}}, backend=backend, timeline=True)
        requests = requests_of(*rows)
        played.append((env, requests, play(env, requests, script())))
    return played


def events(env: QLMEnv) -> list[tuple[Any, ...]]:
    """The timeline's events but pulls, which are up to a step earlier; times to the microsecond."""
    assert env.timeline is not None
    rows = [
        (round(float(e["time_s"]), 6), EVENT_NAMES[e["kind"]], int(e["instance"]), int(e["model"]), int(e["count"]))
        for e in env.timeline.events
    ]
    return [row for row in rows if row[1] != "pull"]


def assert_same(played: list[tuple[QLMEnv, RequestTable, dict[str, Any]]]) -> dict[str, Any]:
    """Both episodes are the same in every request, operation and metric; returns the metrics."""
    (compiled, requests, metrics), (commanded, told, others) = played
    for name in ("first_scheduled_s", "first_token_s", "finish_s"):
        np.testing.assert_allclose(told[name], requests[name], rtol=1e-9)
    for name in ("state", "settled", "evictions", "recomputed_tokens", "preemptions", "generated_tokens"):
        assert told[name].tolist() == requests[name].tolist(), name
    assert events(commanded) == events(compiled)
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and name not in ("decisions", "hol_blocking_s", "kv_occupancy"):
            assert others[name] == pytest.approx(value), name
    return metrics


# --------------------------------------------------------------------------- against the compiled dynamics
@pytest.mark.parametrize("keep_kv", [True, False])
def test_an_urgent_request_takes_the_place_of_evicted_ones(keep_kv: bool) -> None:
    def script() -> Script:
        def act(view: ClusterView) -> list[Lso]:
            lsos: list[Lso] = []
            for group in view.groups:
                if not group.queued:
                    urgent = group.slo_class == URGENT
                    lsos.append(Balance(group.id, 0, front=urgent))
                    if urgent:
                        lsos.append(Evict(0, keep_kv))
            return lsos

        return act

    rows = [
        *((0.1 * k, 100 + k, 400, A, PATIENT) for k in range(6)),
        (3.0, 50, 20, A, URGENT),
        (3.5, 50, 20, A, URGENT),
    ]
    metrics = assert_same(both(rows, script))
    assert metrics["evictions"] > 0
    assert (metrics["kv_swapped_bytes"] > 0) == keep_kv
    assert (metrics["recomputed_tokens"] > 0) == (not keep_kv)


@pytest.mark.parametrize("warm", [True, False])
def test_a_swap_waits_for_the_batch_and_a_warm_start_makes_it_short(warm: bool) -> None:
    def script() -> Script:
        def act(view: ClusterView) -> list[Lso]:
            lsos: list[Lso] = [Balance(group.id, 0) for group in view.groups if not group.queued]
            if warm and view.is_legal(WarmStart(0, B)) and view.now_s < 1.0:
                lsos.append(WarmStart(0, B))
            if view.now_s > 60.0 and view.is_legal(SwapModel(0, B)):
                lsos.append(SwapModel(0, B))
            return lsos

        return act

    rows = [(0.0, 20, 30, A, URGENT), (55.0, 100, 300, A, PATIENT), (56.0, 100, 50, B, PATIENT)]
    metrics = assert_same(both(rows, script))
    assert (metrics["warm_hits"], metrics["cold_starts"]) == ((1, 0) if warm else (0, 1))
    assert metrics["finished"] == 3


def test_a_failure_sends_requests_back_and_groups_elsewhere() -> None:
    def script() -> Script:
        def act(view: ClusterView) -> list[Lso]:
            up = [instance.index for instance in view.instances if instance.up]
            return [Balance(group.id, up[0]) for group in view.groups if not group.queued and group.model == A]

        return act

    rows = [(0.2 * k, 100, 400, A, PATIENT) for k in range(8)]
    failures = [{"instance": 0, "at_s": 2.0, "duration_s": 3.0}, {"instance": 1, "at_s": 6.0, "duration_s": 60.0}]
    played = both(rows, script, failures=failures)
    names = [name for _, name, *_ in events(played[1][0])]
    assert names.count("fail") == 2
    assert names.count("recover") >= 1
    # Nothing is on instance 0 after it came back, so that the rest has no engine once the other has failed too.
    (_, requests, metrics), (_, told, others) = played
    assert told["recomputed_tokens"].sum() > 0
    assert others["finished"] == metrics["finished"]
    np.testing.assert_allclose(told["finish_s"], requests["finish_s"], rtol=1e-9)


def test_kv_that_stays_behind_a_moved_group_is_dropped() -> None:
    def script() -> Script:
        def act(view: ClusterView) -> list[Lso]:
            lsos: list[Lso] = [Balance(group.id, 0) for group in view.groups if group.instance is None]
            if 3.0 <= view.now_s < 4.0:
                lsos += [Balance(group.id, 0, front=True) for group in view.groups if group.model == B]
                lsos.append(Evict(0, keep_kv=True))
            if 5.0 <= view.now_s < 6.0:
                lsos += [Balance(group.id, 1) for group in view.groups if group.model == A and group.movable]
            return lsos

        return act

    rows = [*((0.0, 100, 400, A, PATIENT) for _ in range(2)), (2.5, 10, 10, B, PATIENT), (60.0, 10, 10, A, PATIENT)]
    (compiled, requests, _), (commanded, told, _) = both(rows, lambda: _bounded(script(), until_s=200.0))
    assert requests["recomputed_tokens"][:2].min() > 0
    assert told["recomputed_tokens"].tolist() == requests["recomputed_tokens"].tolist()
    for env in (compiled, commanded):
        assert not env._running_world(allow_done=True).fleet.engine["host_kv_used_bytes"].any()


def _bounded(script: Script, until_s: float) -> Script:
    """Past ``until_s`` the other model is loaded where it is waited for, so that the episode ends."""

    def act(view: ClusterView) -> Sequence[Lso]:
        late: list[Lso] = [SwapModel(0, B)] if view.now_s > until_s and view.is_legal(SwapModel(0, B)) else []
        return [*script(view), *late]

    return act


def test_a_long_queue_is_handed_over_as_prompts_are_computed() -> None:
    """Not all at once, or it could not move any more; and without leaving the engine short of prompts."""
    waiting: list[tuple[float, int]] = []

    def script() -> Script:
        waiting.clear()

        def act(view: ClusterView) -> list[Lso]:
            waiting.append((view.now_s, view.progress().waiting))
            return [Balance(group.id, 0) for group in view.groups if not group.queued]

        return act

    rows = [(0.0, 400, 200, A, PATIENT) for _ in range(40)] + [(0.3, 400, 200, A, PATIENT)]
    (_, requests, _), (_, told, _) = both(rows, script, engine={"max_num_seqs": 64, "max_num_batched_tokens": 512})
    assert waiting[0] == (0.0, 40)
    assert dict(waiting)[0.3] > 20
    assert told["finish_s"].max() == pytest.approx(requests["finish_s"].max(), rel=0.02)


EPISODES = 80


def test_random_episodes_come_out_the_same() -> None:
    """Every request ends the same where no engine preempts and no prompt waits for others to be computed.

    Else a request is committed to its engine some steps earlier, which can change what a policy does next; SLO
    attainment hardly moves.
    """
    same = swaps = failures = exact = 0
    attainment: list[tuple[float, float]] = []
    for number in range(EPISODES):
        played = []
        for backend in ("emulator", emulated_backend):
            env = random_env(np.random.default_rng([number, 0]), backend)
            if env.scenario.environment.decision_time.mode != "zero":
                break
            requests = random_requests(np.random.default_rng(number), env)
            played.append((requests, play(env, requests, lambda _, env=env: sensible_lsos(env))))
        if len(played) < 2:
            continue
        (requests, metrics), (told, others) = played
        attainment.append((metrics["slo_attainment"], others["slo_attainment"]))
        exact += bool(np.allclose(told["finish_s"], requests["finish_s"], rtol=1e-9, equal_nan=True))
        ample = env.scenario.cluster.engine.max_num_batched_tokens >= 400 and env.scenario.environment.auto_pull
        if ample and metrics["preemptions"] == 0:
            np.testing.assert_allclose(told["finish_s"], requests["finish_s"], rtol=1e-9, err_msg=f"episode {number}")
            assert told["settled"].tolist() == requests["settled"].tolist()
            same, swaps = same + 1, swaps + metrics["swaps"]
            failures += len(env.scenario.cluster.failures)
    assert same >= 3
    assert exact > len(attainment) / 2
    assert swaps > 0
    assert failures > 0
    compiled, commanded = np.array(attainment).T
    assert abs(commanded - compiled).mean() < 0.01


@pytest.mark.parametrize(("planner", "tolerance_s"), [("fcfs", 1e-9), ("edf_evict", 0.1), ("qlm", 0.5)])
def test_planners_act_through_it_unchanged(planner: str, tolerance_s: float) -> None:
    """Requests finish at the same instant, or about a step apart where plans depend on what is in the engine."""
    finish_s, hashes = [], []
    for backend in ("emulator", emulated_backend):
        env = QLMEnv(workload={"preset": "smoke", "num_requests": 120}, backend=backend)
        _, info = env.reset(seed=3)
        hashes.append(info["workload_hash"])
        policy = make_planner(parse_planner(planner, {}))
        policy.reset(env.view, np.random.default_rng(0))
        while "metrics" not in info:
            info = env.step_plan(policy.act(env.view))[-1]
        assert info["metrics"]["finished"] == 120
        finish_s.append(env._running_world(allow_done=True).requests["finish_s"].copy())
    assert hashes[0] == hashes[1]
    assert abs(finish_s[1] - finish_s[0]).max() < tolerance_s


# --------------------------------------------------------------------------- where time passes by itself
class Clockwork(EmulatorBackend):
    """The emulator as a real cluster looks from outside: time passes while nobody calls it.

    Every call of ``now_s`` costs a millisecond, and news are up to 50 ms old when they are heard.
    """

    def __init__(self, new_fleet: Callable[[], Fleet]) -> None:
        super().__init__(new_fleet)
        self.passed_s = 0.0

    @property
    def now_s(self) -> float:
        self.passed_s = max(self.passed_s + 0.001, super().now_s)
        return self.passed_s

    def reset(self, requests: RequestTable) -> None:
        super().reset(requests)
        self.passed_s = 0.0

    def advance(self, until_s: float) -> list[BackendEvent]:
        heard: list[BackendEvent] = []
        until_s = max(until_s, self.passed_s)
        while not heard and EmulatorBackend.now_s.fget(self) < until_s:  # type: ignore[attr-defined]
            heard = super().advance(min(until_s, EmulatorBackend.now_s.fget(self) + 0.05))  # type: ignore[attr-defined]
        return heard


def clockwork(scenario: ScenarioSpec) -> Backend:
    return Clockwork(lambda: make_cluster(scenario.cluster, scenario.workload.models))


def test_thinking_time_has_simply_passed() -> None:
    """What happened while the policy was thinking is heard of before its decision takes effect, and counts in dt."""
    env = QLMEnv(workload={"preset": "smoke", "num_requests": 60}, backend=clockwork, timeline=True)
    _, info = env.reset(seed=0)
    elapsed_s = env.now_s
    while "metrics" not in info:
        backend = env._backend
        assert isinstance(backend, Clockwork)
        before_s = env.now_s
        backend.passed_s += 0.2
        info = env.step_plan(sensible_lsos(env))[-1]
        elapsed_s += info["dt"]
        assert info["dt"] >= 0.2 or "metrics" in info
        assert env.now_s == pytest.approx(before_s + info["dt"])
    assert elapsed_s == pytest.approx(env.now_s)
    assert info["metrics"]["finished"] == 60
    requests = env._running_world(allow_done=True).requests
    assert (requests["state"] == FINISHED).all()
    assert env.timeline is not None
    assert (np.diff(env.timeline.events["time_s"]) >= 0).all()


def test_a_stuck_cluster_ends_the_episode_at_its_time_limit() -> None:
    class Stuck(EmulatorBackend):
        """Engines that take requests and never finish one."""

        def advance(self, until_s: float) -> list[BackendEvent]:
            self._run.clock["now_s"] = max(self.now_s, until_s)
            return []

    env = QLMEnv(
        workload={"preset": "smoke", "num_requests": 20},
        environment={"max_drain_s": 30.0},
        backend=lambda scenario: Stuck(lambda: make_cluster(scenario.cluster, scenario.workload.models)),
    )
    _, info = env.reset(seed=0)
    truncated = False
    while not truncated:
        *_, terminated, truncated, info = env.step_plan(sensible_lsos(env))
        assert not terminated
    assert info["metrics"]["finished"] == 0
    assert info["metrics"]["slo_attainment"] == 0.0
    assert info["metrics"]["episode_return"] == pytest.approx(-1.0)


def test_an_instance_that_dies_unheard_of_takes_nothing_with_it() -> None:
    """A command to an instance that has just failed comes to nothing; the news of it come next."""

    class Mortal(EmulatorBackend):
        """Refuses commands from the failure on; its arrays show it when it is told."""

        pulls = 0
        died: int | None = None

        def pull(self, instance: int, request: int) -> None:
            self.pulls += 1
            if self.pulls in (3, 9):
                self.died = instance
            if instance == self.died:
                raise BackendError(f"cannot pull request {request}: instance {instance} is down")
            super().pull(instance, request)

        def advance(self, until_s: float) -> list[BackendEvent]:
            if self.died is not None:
                self.fail(self.died)
                self.died = None
            heard = super().advance(until_s)
            for event in heard:
                if event.kind == EventKind.DOWN:
                    self.recover(event.instance)
            return heard

    env = QLMEnv(
        workload={"preset": "smoke", "num_requests": 30},
        backend=lambda scenario: Mortal(lambda: make_cluster(scenario.cluster, scenario.workload.models)),
    )
    _, info = env.reset(seed=0)
    while "metrics" not in info:
        info = env.step_plan(sensible_lsos(env))[-1]
    assert info["metrics"]["finished"] == 30


def test_a_command_that_a_living_instance_refuses_is_an_error() -> None:
    class Deaf(EmulatorBackend):
        def pull(self, instance: int, request: int) -> None:
            raise BackendError(f"cannot pull request {request}")

    env = QLMEnv(
        workload={"preset": "smoke", "num_requests": 10},
        backend=lambda scenario: Deaf(lambda: make_cluster(scenario.cluster, scenario.workload.models)),
    )
    env.reset(seed=0)
    lsos = sensible_lsos(env)
    with pytest.raises(BackendError, match="cannot pull"):
        env.step_plan(lsos)


# --------------------------------------------------------------------------- the environment
def test_gymnasium_accepts_it() -> None:
    env = gym.make(
        "QLM/Smoke-v0",
        workload={"preset": "smoke", "num_requests": 40},
        backend=emulated_backend,
        render_mode="rgb_array",
    )
    assert env.unwrapped.spec is not None
    assert env.unwrapped.spec.nondeterministic
    check_env(env.unwrapped, skip_render_check=False)


def test_its_spaces_info_and_metrics_are_those_of_the_emulator() -> None:
    few = {"preset": "smoke", "num_requests": 10}
    emulator, other = QLMEnv(workload=few), QLMEnv(workload=few, backend=emulated_backend)
    assert other.observation_space == emulator.observation_space
    assert other.action_space == emulator.action_space
    seen: list[tuple[list[str], list[str]]] = []
    for env in (emulator, other):
        _, info = env.reset(seed=0)
        while "metrics" not in info:
            info = env.step_plan(sensible_lsos(env))[-1]
        seen.append((sorted(info), sorted(info["metrics"])))
    assert seen[0] == seen[1]


def test_closing_the_environment_closes_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Closing(EmulatorBackend):
        def close(self) -> None:
            closed.append(True)

    def make_backend(scenario: ScenarioSpec, new_fleet: Callable[[], Fleet]) -> Backend:
        assert (new_fleet().engine["active_model"] != NOWHERE).all()
        return Closing(new_fleet)

    build = ModuleType("qlm_env.backends.vllm.build")
    build.make_backend = make_backend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, build.__name__, build)
    env = gym.make("QLM/Smoke-v0", workload={"preset": "smoke", "num_requests": 5}, backend="vllm")
    assert env.spec is not None
    assert env.spec.to_json()
    env.reset(seed=0)
    assert not closed
    env.close()
    assert closed


def test_the_live_environment_is_registered_as_nondeterministic() -> None:
    assert qlm_env.__version__
    spec = gym.spec("QLM/Live-v0")
    assert spec.nondeterministic
    assert spec.kwargs["backend"] == "vllm"


def test_what_is_no_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="allowed: emulator, vllm"):
        QLMEnv(backend="ray")
