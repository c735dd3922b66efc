"""Small worlds whose numbers can be worked out by hand: every engine step takes one second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from qlm_env.cluster import instance_names, make_world
from qlm_env.dynamics import LOG_FULL, World, advance
from qlm_env.lso import Balance, Lso, apply_lso
from qlm_env.requests import make_request_table
from qlm_env.spec import (
    ClusterSpec,
    EngineSpec,
    EnvironmentSpec,
    FailureSpec,
    GroupingSpec,
    InstancesSpec,
    MixSpec,
    ModelSpec,
    ScenarioSpec,
    SloClassSpec,
    SloSpec,
    SyntheticWorkload,
)
from qlm_env.timeline import Timeline
from qlm_env.view import ClusterView
from tests.profiles.toy import toy_profile, write_profile

COLD_START_S, STAGE_S, WAKE_S, SLEEP_S = 40.0, 30.0, 2.0, 1.0
MODELS = ("red", "blue")
CLASSES = (
    SloClassSpec(name="fast", target_s=4.0, weight=3.0),
    SloClassSpec(name="slow", target_s=100.0),
)
FAST, SLOW = 0, 1


class Request(NamedTuple):
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo_class: int = SLOW
    model: int = 0


class ToyWorld(NamedTuple):
    world: World
    timeline: Timeline
    view: ClusterView

    @property
    def now_s(self) -> float:
        return float(self.world.clock[0].now_s)

    @property
    def over(self) -> bool:
        clock = self.world.clock[0]
        return bool(clock.finished + clock.rejected == len(self.world.requests))

    def do(self, *lsos: Lso) -> None:
        """Operations that have to be legal."""
        for lso in lsos:
            assert apply_lso(self.world, *lso.code()), lso

    def pass_time(self, until_s: float, stop_at_epoch: bool = False) -> None:
        """As the environment passes time."""
        while True:
            reasons = advance(self.world, until_s, stop_at_epoch)
            self.timeline.take_log(self.world)
            self.timeline.sample(self.world)
            if reasons != LOG_FULL:
                break

    def serve(self, until_s: float = np.inf, instance: int = 0) -> None:
        """Put every group that forms at the back of one virtual queue, until everything is served."""
        while not self.over and self.now_s < until_s:
            for group in self.view.groups:
                if not group.queued:
                    self.do(Balance(group.id, instance))
            self.pass_time(min(until_s, self.now_s + 1.0), stop_at_epoch=True)


def toy_world(
    folder: Path,
    requests: Sequence[Request],
    *,
    instances: int = 1,
    num_blocks: int = 100,
    max_num_seqs: int = 1,
    metric: Literal["e2e", "ttft"] = "e2e",
    failures: tuple[FailureSpec, ...] = (),
    group_members: int = 64,
) -> ToyWorld:
    """Instances that hold ``red`` at first and can swap to ``blue``.

    Args:
        folder: where the profiles go.
        num_blocks: KV blocks of 16 tokens, at least 8, the models' context.
        group_members: the size at which a group closes.
    """
    profile = toy_profile(
        c0_s=1.0,
        c1_s_per_token=0.0,
        c2_s_per_token=0.0,
        c3_s_per_kv_token=0.0,
        c4_s_per_token2=0.0,
        c5_s_per_sequence=0.0,
        c6_s_per_mixed_kv_token=0.0,
        num_gpu_blocks=num_blocks + 1.0,
        cold_start_s=COLD_START_S,
        stage_s=STAGE_S,
        wake_s=WAKE_S,
        sleep_s=SLEEP_S,
    )
    write_profile(folder, profile)
    scenario = ScenarioSpec(
        cluster=ClusterSpec(
            instances=(InstancesSpec(device="TOY", count=instances, initial_model="red"),),
            engine=EngineSpec(max_num_seqs=max_num_seqs, max_num_batched_tokens=2048),
            failures=failures,
        ),
        workload=SyntheticWorkload(
            models=tuple(ModelSpec(name=n, architecture="toy-1b", context_tokens=128) for n in MODELS),
            mix=(MixSpec(model="red", slo_class="fast"),),
        ),
        slo=SloSpec(metric=metric, classes=CLASSES),
        environment=EnvironmentSpec(
            grouping=GroupingSpec(typical_request_tokens=1, delta=group_members / max_num_seqs)
        ),
    )
    columns = [np.array(column) for column in zip(*requests, strict=True)]
    arrival_s, prompt_tokens, output_tokens, slo_class, model = columns
    table = make_request_table(arrival_s.astype(float), prompt_tokens, output_tokens, model, slo_class)
    world = make_world(scenario, table, logging=True, profile_folder=folder)
    names = instance_names(scenario.cluster)
    timeline = Timeline(names, list(MODELS))
    timeline.sample(world)
    return ToyWorld(world, timeline, ClusterView(world, scenario, names))
