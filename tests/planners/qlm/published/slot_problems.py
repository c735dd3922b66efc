"""Random problems for the published programs, some of which cannot meet every deadline."""

from __future__ import annotations

import numpy as np

from planners.qlm.published.slot_problem import SlotProblem

NUM_MODELS = 3


def random_slot_problem(rng: np.random.Generator, num_groups: int, num_instances: int) -> SlotProblem:
    """Services of seconds, swaps of tens of seconds, deadlines around what a good plan can meet."""
    shape = (num_groups, num_instances)
    allowed = rng.random(shape) < 0.8
    allowed[np.arange(num_groups), rng.integers(0, num_instances, num_groups)] = True
    service_s = rng.uniform(1, 20, shape)
    swap_s = rng.uniform(2, 25, (num_instances, NUM_MODELS, NUM_MODELS))
    swap_s[:, np.arange(NUM_MODELS), np.arange(NUM_MODELS)] = 0.0
    begin_s = rng.uniform(2, 25, (num_instances, NUM_MODELS))
    begin_s[np.arange(num_instances), rng.integers(0, NUM_MODELS, num_instances)] = 0.0
    # A tight share of the time that all work takes, spread over the instances: about half of the problems are feasible.
    span_s = 25.0 * num_groups / num_instances
    return SlotProblem(
        service_s=service_s,
        service_std_s=service_s * rng.uniform(0.05, 0.4, shape),
        latency_s=rng.uniform(1, 8, shape),
        latency_std_s=rng.uniform(0.2, 3, shape),
        deadline_s=10.0 + rng.uniform(0.3, 1.0) * span_s * rng.uniform(0.6, 2.0, num_groups),
        weight=rng.integers(1, 40, num_groups).astype(float),
        model=rng.integers(0, NUM_MODELS, num_groups).astype(np.int32),
        allowed=allowed,
        release_s=rng.choice([0.0, 5.0], num_instances),
        begin_s=begin_s,
        swap_s=swap_s,
    )
