"""The benchmarks measure what they say, on sizes that take no time."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from runners import bench_emulator, bench_env
from runners.config import BenchEmulatorOptions, BenchEnvOptions


def test_emulator_figures_cover_both_engines_at_every_load() -> None:
    figures = bench_emulator.measure(BenchEmulatorOptions(num_requests=150, loads=(0.5, 1.2), seed=1))
    names = [figure["name"] for figure in figures]
    assert len(set(names)) == len(names) == 10
    assert sum(name.startswith("load 1.2: ") for name in names) == 5
    assert all(figure["value"] > 0 for figure in figures)


def test_the_long_run_happens_in_a_process_of_its_own() -> None:
    serving, with_workload, memory = bench_emulator.measure_memory(3000, seed=0)
    assert with_workload["value"] < serving["value"]
    assert 0.05 < memory["value"] < 1.0
    assert memory["unit"] == "GB"


def test_env_figures_are_speeds() -> None:
    figures = bench_env.measure(BenchEnvOptions(duration_s=0.1))
    units = [figure["unit"] for figure in figures]
    assert units[:7] == ["steps/s"] * 7
    assert units[-2:] == ["times", "us/step"]
    assert len({figure["name"] for figure in figures}) == len(figures)
    assert all(figure["value"] > 0 for figure in figures)


def test_sampled_actions_are_legal() -> None:
    env = bench_env.WithLegalActions(gym.make_vec("QLM/Smoke-v0", 5))
    env.action_space.seed(0)
    _, infos = env.reset(seed=0)
    for _ in range(20):
        actions = env.action_space.sample()
        assert infos["action_mask"][np.arange(5), actions].all()
        infos = env.step(actions)[-1]
        assert not infos["invalid_action"].any()
    env.close()
