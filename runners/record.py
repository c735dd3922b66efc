"""`qlm record`: a planner's decisions over several workloads, written for imitation."""

from __future__ import annotations

import json
import sys

import numpy as np

from planners import make_planner
from planners.learned.demonstrations import episode_path, record_episode, write_demonstration, write_index
from planners.learned.planner import spaces_of
from qlm_env.env import QLMEnv
from runners import results
from runners.episode import PLANNER_STREAM, check_scenario
from runners.progress import CountedProgress
from runners.train_config import RecordDemonstrationsConfig


def record(config: RecordDemonstrationsConfig) -> None:
    """Record the episodes that are not in ``config.out`` yet.

    Raises:
        ConfigError: the scenario cannot run, or ``out`` holds episodes of another scenario.
    """
    scenario, out = config.scenario, config.out
    check_scenario(scenario, config.seeds[0])
    results.claim(out, scenario)
    env = QLMEnv(
        scenario.cluster.model_dump(),
        scenario.workload.model_dump(),
        scenario.slo.model_dump(),
        scenario.environment.model_dump(),
    )
    planner = make_planner(config.planner)
    write_index(out, spaces_of(scenario), {"planner": json.loads(config.planner.model_dump_json())})
    missing = [seed for seed in config.seeds if not episode_path(out, seed).exists()]
    with CountedProgress("episodes", len(config.seeds), len(config.seeds) - len(missing)) as progress:
        for seed in missing:
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(PLANNER_STREAM,)))
            recorded = record_episode(env, planner, seed, rng)
            write_demonstration(episode_path(out, seed), recorded.demonstration)
            progress.advance(
                f"seed {seed}: {len(recorded.demonstration)} decisions, {recorded.left_out} that are no actions, "
                f"SLO attainment {100 * recorded.metrics['slo_attainment']:.1f} %"
            )
    print(f"the episodes are in {out}", file=sys.stderr)
