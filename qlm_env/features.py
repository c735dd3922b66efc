"""The features of an observation: what each column means, its unit and its scaling.

The tables in docs/environment.md are made from these by::

    python -m qlm_env.features docs/environment.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from qlm_env.workload.atomic import atomic_path

BEGIN, END = "<!-- features: made by `python -m qlm_env.features` -->\n", "<!-- end of features -->\n"


class Feature(NamedTuple):
    """One entry of the feature table in the documentation. ``width`` is 1, or "M" / "C" for one-hot codes."""

    name: str
    width: int | str
    unit: str
    scaling: str
    meaning: str


GROUP_FEATURES = (
    Feature("model", "M", "-", "one-hot", "the group's model"),
    Feature("slo_class", "C", "-", "one-hot", "the group's SLO class"),
    Feature("waiting", 1, "requests", "log1p(x)/log1p(4096)", "requests waiting in the group"),
    Feature("in_engine", 1, "requests", "log1p(x)/log1p(4096)", "requests of the group inside an engine"),
    Feature("prompt_tokens", 1, "tokens", "x/4096", "mean prompt length of the waiting requests"),
    Feature("output_tokens", 1, "tokens", "x/4096", "expected output length (finished requests, prior of 256)"),
    Feature("slack", 1, "target", "x", "time to the deadline of the first waiting request, over its target"),
    Feature("last_slack", 1, "target", "x", "the same of the last waiting request"),
    Feature("target_s", 1, "s", "log1p(x)/log1p(36000)", "the class's latency target"),
    Feature("queued", 1, "-", "0 or 1", "is in a virtual queue"),
    Feature("queue", 1, "-", "(i+1)/I", "instance of that queue, 0 when in none"),
    Feature("position", 1, "groups", "1/(1+x)", "groups ahead in that queue, 0 when in none"),
    Feature("kept_kv", 1, "-", "0 or 1", "its first waiting request has KV in host memory"),
    Feature("aggregate", 1, "groups", "log1p(x)/log1p(4096)", "groups summed up in this row beyond the first"),
)

INSTANCE_FEATURES = (
    Feature("up", 1, "-", "0 or 1", "not failed"),
    Feature("active_model", "M", "-", "one-hot", "model on the GPU"),
    Feature("swap_target", "M", "-", "one-hot", "model being loaded, or waiting for the batch to drain"),
    Feature("warm", "M", "-", "0 or 1", "models in host memory"),
    Feature("staging", "M", "-", "one-hot", "model being staged into host memory"),
    Feature("fits", "M", "-", "0 or 1", "models the instance can serve"),
    Feature("loading_left", 1, "s", "x/100", "time until the model being loaded is ready"),
    Feature("staging_left", 1, "s", "x/100", "time until the model being staged is warm"),
    Feature("running", 1, "requests", "x/max_num_seqs", "requests in the batch"),
    Feature(
        "foreign", 1, "requests", "x/max_num_seqs", "of those, not of the head group: what an eviction would remove"
    ),
    Feature("prefilling", 1, "-", "0 or 1", "a prefill is in progress"),
    Feature("kv_used", 1, "blocks", "x/num_blocks", "KV cache in use"),
    Feature("engine_queue", 1, "requests", "log1p(x)/log1p(4096)", "preempted requests in the engine's own queue"),
    Feature("queue_groups", 1, "groups", "log1p(x)/log1p(4096)", "groups in the virtual queue"),
    Feature("queue_waiting", 1, "requests", "log1p(x)/log1p(4096)", "requests waiting in the virtual queue"),
    Feature("head_slack", 1, "target", "x", "slack of the head group's first request, 1 when empty"),
    Feature("head_active", 1, "-", "0 or 1", "the head group's model is active"),
    Feature("evicting", 1, "-", "0 or 1", "an eviction is carried out at the end of the step"),
    Feature("host_memory", 1, "bytes", "share", "host memory for weights in use"),
    Feature("host_kv", 1, "bytes", "share", "host memory for KV in use"),
    Feature("decode_s", 1, "s", "x/0.1", "time of a decode step of 32 sequences of 512 tokens (active model)"),
)

CLUSTER_FEATURES = (
    Feature("waiting", 1, "requests", "log1p(x)/log1p(65536)", "requests waiting anywhere"),
    Feature("running", 1, "requests", "log1p(x)/log1p(65536)", "requests in batches"),
    Feature("groups", 1, "groups", "log1p(x)/log1p(4096)", "groups with waiting requests"),
    Feature("unqueued", 1, "groups", "log1p(x)/log1p(4096)", "of those, in no virtual queue"),
    Feature("settled", 1, "requests", "log1p(x)/log1p(65536)", "requests whose outcome is certain"),
    Feature("attainment", 1, "-", "share", "of those, met"),
    Feature("instances_up", 1, "-", "share", "instances that are up"),
)


def columns(features: tuple[Feature, ...], num_models: int, num_classes: int) -> dict[str, slice]:
    """Where each feature stands in a row of its array."""
    sizes: dict[int | str, int] = {"M": num_models, "C": num_classes}
    found: dict[str, slice] = {}
    start = 0
    for feature in features:
        stop = start + sizes.get(feature.width, 1)
        found[feature.name] = slice(start, stop)
        start = stop
    return found


def width(features: tuple[Feature, ...], num_models: int, num_classes: int) -> int:
    """Columns of all features together."""
    return int(columns(features, num_models, num_classes)[features[-1].name].stop)


def feature_tables() -> str:
    """The documentation's tables of features, as Markdown."""
    lines = []
    for title, features in (
        ("groups", GROUP_FEATURES),
        ("instances", INSTANCE_FEATURES),
        ("cluster", CLUSTER_FEATURES),
    ):
        lines += [f"### `{title}`", "", "| feature | columns | unit | scaling | meaning |", "|---|---|---|---|---|"]
        lines += [f"| {f.name} | {f.width} | {f.unit} | {f.scaling} | {f.meaning} |" for f in features]
        lines.append("")
    return "\n".join(lines)


def with_feature_tables(document: str) -> str:
    """A Markdown document with the tables between its two marks brought up to date.

    Raises:
        ValueError: the marks are missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the document lacks {BEGIN.strip()} or {END.strip()}")
    return f"{before}{begin}\n{feature_tables()}\n{end}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        text = with_feature_tables(Path(name).read_text(encoding="utf-8"))
        with atomic_path(Path(name)) as temporary:
            temporary.write_text(text, encoding="utf-8")
