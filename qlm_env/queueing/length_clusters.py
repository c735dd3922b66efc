"""Length clusters: requests of a model and SLO class told apart by length, where that makes groups more alike.

Lengths are kept as a histogram over prompt lengths, in half octaves: how many requests arrived in each, and how long
the answers of those that finished were. k-means over the buckets, on prompt and expected output length, gives each
bucket a cluster, and an arriving request joins the group of its bucket's cluster. A policy could see all of it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qlm_env.compiled import compiled
from qlm_env.requests import Records

LENGTH_DTYPE = np.dtype(
    [
        ("arrived", "i8"),
        ("recent", "f8"),  # the same, older arrivals counting for less
        ("prompt_tokens", "f8"),  # theirs, summed with the same weights
        # Of finished requests.
        ("finished", "i8"),
        ("output_tokens", "f8"),
        ("output_tokens_squared", "f8"),
        ("cluster", "i4"),
    ],
    align=True,
)
"""One bucket of a (model, SLO class)."""

NUM_BUCKETS = 40
"""Up to prompts of a million tokens."""

MEMORY = 0.5
"""Share of their weight that past arrivals keep at every clustering, so that clusters follow a mix that drifts."""

MIN_ARRIVALS = 64.0
"""Recent arrivals of a model and class below which its clusters stay as they are."""

LEAST_GAIN = 0.05
"""Share of all variance that a further cluster must cut."""

PRIOR_WEIGHT = 8.0
"""Finished requests whose weight the mean of all buckets has in a bucket's expected output."""


@compiled
def prompt_bucket(prompt_tokens: float) -> int:
    """The bucket of a prompt: twice its binary logarithm."""
    return min(NUM_BUCKETS - 1, int(2.0 * math.log2(max(1.0, prompt_tokens))))


def cluster_buckets(lengths: Records, max_clusters: int, min_variance_cut: float) -> NDArray[np.int32]:
    """The cluster of each bucket, numbered by ascending prompt length.

    Starting from one, another cluster is added for as long as it cuts the variance within clusters, of prompt and
    expected output length together in tokens, by at least a share of ``min_variance_cut``. Two clusters cut that of a
    single hump by two thirds (normal, exponential) to three quarters (uniform), so less than that says nothing; and
    what is cut must be more than :data:`LEAST_GAIN` of all there was, or groups would be split over trifles.

    Args:
        lengths: (B,) LENGTH_DTYPE with at least one recent arrival.

    Returns:
        shape (B,); buckets without arrivals go with the nearest that has some.
    """
    # Imported here, because it takes a second and most runs of the environment do without.
    from sklearn.cluster import KMeans

    used = np.flatnonzero(lengths["recent"] > 0)
    weight = lengths["recent"][used]
    finished = lengths["finished"][used].astype(np.float64)
    mean_output = lengths["output_tokens"].sum() / max(1, lengths["finished"].sum())
    points = np.column_stack(
        [
            lengths["prompt_tokens"][used] / lengths["recent"][used],
            (lengths["output_tokens"][used] + PRIOR_WEIGHT * mean_output) / (finished + PRIOR_WEIGHT),
        ]
    )
    label = np.zeros(len(used), np.int32)
    centre = np.average(points, axis=0, weights=weight)
    total = within = float(weight @ ((points - centre) ** 2).sum(axis=1))
    for k in range(2, min(max_clusters, len(used)) + 1):
        fitted = KMeans(k, n_init=4, random_state=0).fit(points, sample_weight=weight)
        if within - fitted.inertia_ < max(min_variance_cut * within, LEAST_GAIN * total):
            break
        by_prompt = np.argsort(np.argsort(fitted.cluster_centers_[:, 0]))
        label, within = by_prompt[fitted.labels_].astype(np.int32), float(fitted.inertia_)
    nearest = np.abs(np.arange(len(lengths))[:, None] - used[None, :]).argmin(axis=1)
    clusters: NDArray[np.int32] = label[nearest]
    return clusters
