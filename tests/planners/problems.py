"""Random planning problems."""

from __future__ import annotations

import numpy as np

from planners.qlm.problem import MISS, Problem


def random_problem(rng: np.random.Generator, num_groups: int, num_instances: int, num_models: int = 3) -> Problem:
    """Groups and instances of the sizes that episodes have; every group may run somewhere."""
    shape = (num_groups, num_instances)
    first = rng.uniform(-20, 120, num_groups)
    allowed = rng.random(shape) < 0.8
    allowed[np.arange(num_groups), rng.integers(0, num_instances, num_groups)] = True
    return Problem(
        requests=rng.integers(1, 60, num_groups).astype(float),
        weight=rng.choice([1.0, 2.0], num_groups),
        first_slack_s=first,
        last_slack_s=first + rng.uniform(0, 30, num_groups),
        model=rng.integers(0, num_models, num_groups).astype(np.int32),
        output_cv=rng.uniform(0.3, 1.2, num_groups),
        allowed=allowed,
        interval_s=rng.uniform(0.05, 1.0, shape),
        batch=rng.uniform(4, 60, shape),
        latency_s=rng.uniform(2, 10, shape),
        latency_growth_s=rng.uniform(0.0, 0.3, shape),
        start_model=rng.integers(-1, num_models, num_instances).astype(np.int32),
        ready_s=rng.choice([0.0, 5.0], num_instances),
        present=rng.integers(0, 40, num_instances).astype(float),
        drain_s=rng.uniform(0, 20, num_instances),
        evict_s=rng.choice([1.0, np.inf], num_instances),
        displaced_weight=rng.uniform(0, 20, num_instances),
        displaced_slack_s=rng.uniform(0, 200, num_instances),
        displaced_delay_cost=rng.uniform(0, 1e-3, num_instances),
        load_s=rng.uniform(1, 40, (num_instances, num_models)),
        unload_s=rng.uniform(0, 2, (num_instances, num_models)),
        idle_s=rng.choice([0.0, 30.0], num_instances),
        swap_cost=rng.uniform(0, 1, num_instances),
        hold_s=10.0,
        form=MISS,
        confidence=0.9,
        delay_cost=rng.uniform(1e-6, 1e-4, num_groups),
        crowding_cost=np.maximum(0.0, rng.uniform(-0.1, 0.2, shape)),
    )
