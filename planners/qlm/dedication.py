"""Dedicated instances: what a cluster without model swapping does. Each instance serves one model for good."""

from __future__ import annotations

import numpy as np

from planners.qlm.problem import Int
from planners.rwt import full_batch, service_of_batch
from qlm_env.observation import PRIOR_OUTPUT_TOKENS
from qlm_env.view import ClusterView

TYPICAL_PROMPT_TOKENS = 256.0
"""Only the rates of models relative to each other matter here, and hardly depend on it."""


def dedicate(view: ClusterView) -> Int:
    """(I,) the model of each instance, -1 where none fits.

    Instances go to models in proportion to the share of requests that the workload's mix announces, by D'Hondt's rule:
    each instance, those that fit the fewest models first, to the model with the most requests per request/s that its
    instances, this one included, can serve. With more models than instances some model gets none, and is never served.
    """
    names = [model.name for model in view.scenario.workload.models]
    share = np.zeros(len(names))
    for entry in view.scenario.workload.mix:
        share[names.index(entry.model)] += entry.weight
    placement = view.placements
    fits = placement["num_blocks"] > 0
    tokens = PRIOR_OUTPUT_TOKENS
    batch = full_batch(view.scenario.cluster.engine, placement, TYPICAL_PROMPT_TOKENS, tokens, tokens**2)
    interval_s = service_of_batch(placement, batch, TYPICAL_PROMPT_TOKENS, tokens).interval_s
    rate_per_s = np.where(fits, 1.0 / np.where(fits, interval_s, 1.0), 0.0)
    dedicated = np.full(len(view.instances), -1, np.int32)
    capacity_per_s = np.zeros(len(names))
    for i in np.argsort(fits.sum(axis=1), kind="stable"):
        if fits[i].any():
            need = np.where(fits[i], share / np.maximum(1e-9, capacity_per_s + rate_per_s[i]), -1.0)
            # What no instance serves yet comes first.
            model = int(np.argmax(np.where(fits[i] & (capacity_per_s == 0.0) & (share > 0.0), need + need.max(), need)))
            dedicated[i] = model
            capacity_per_s[model] += rate_per_s[i, model]
    return dedicated
