"""A policy trained with plain Stable-Baselines3: `python examples/train_with_sb3.py [steps]`."""

import sys

import gymnasium as gym
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.vec_env import VecMonitor

from planners.learned.sb3_vec_env import QLMVecEnv

torch.set_num_threads(1)  # for networks this small, threads only wait for each other
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
settings = {"workload": {"preset": "smoke", "num_requests": 50}, "environment": {"max_drain_s": 60.0}}
env = QLMVecEnv(gym.make_vec("qlm_env:QLM/Smoke-v0", num_envs=16, **settings).unwrapped)
model = MaskablePPO("MultiInputPolicy", VecMonitor(env), n_steps=128, batch_size=256, gamma=0.999, seed=0)
model.learn(steps)

env.seed(1000)  # sixteen workloads that it has not seen
observations, finished = env.reset(), {}
while len(finished) < env.num_envs:
    actions, _ = model.predict(observations, action_masks=get_action_masks(env))
    observations, _, dones, infos = env.step(actions)
    finished |= {k: infos[k]["metrics"]["slo_attainment"] for k in dones.nonzero()[0] if k not in finished}
print(f"SLO attainment {100 * sum(finished.values()) / len(finished):.1f} %")
