"""The registered environment ids. Their dynamics are versioned: a change of results means a new version."""

from __future__ import annotations

import gymnasium as gym

ENVIRONMENTS = {
    "QLM/SingleModel-v0": {"cluster": "small", "workload": "w_a"},
    "QLM/MultiModel-v0": {"cluster": "small_multi", "workload": "w_b"},
    "QLM/MegaPrompt-v0": {"cluster": "small", "workload": "w_c"},
    "QLM/Trace-v0": {"cluster": "small", "workload": "azure_like"},
    "QLM/Smoke-v0": {"cluster": "smoke", "workload": "smoke"},
}


LIVE_ENVIRONMENTS = {
    "QLM/Live-v0": {"backend": "vllm", "cluster": "live_cpu", "workload": "live_multi"},
}
"""On real vLLM servers: time is real, and no episode can be repeated exactly."""


def register_environments() -> None:
    """Register every id with Gymnasium."""
    for env_id, kwargs in ENVIRONMENTS.items():
        gym.register(
            env_id,
            entry_point="qlm_env.env:QLMEnv",
            vector_entry_point="qlm_env.vector:QLMVectorEnv",
            kwargs=kwargs,
        )
    for env_id, kwargs in LIVE_ENVIRONMENTS.items():
        gym.register(env_id, entry_point="qlm_env.env:QLMEnv", nondeterministic=True, kwargs=kwargs)
