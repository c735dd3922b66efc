"""The cluster now, as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from qlm_env.timeline import Timeline
from qlm_env.view import ClusterView, InstanceView

COLUMNS = 110
MAX_INSTANCES = 20
NAME_COLUMNS, MODEL_COLUMNS, BAR_COLUMNS = 11, 20, 8
ANSI_COLOURS = (31, 33, 36, 35, 32, 34)
"""Foreground colours of the SLO classes, by index."""

Part = tuple[str, int | None]
"""A piece of a line, and the SLO class it is coloured by."""


def draw_text(view: ClusterView, timeline: Timeline) -> str:
    """The cluster now, in lines of at most COLUMNS characters, ANSI colours not counted.

    One line per instance: its model, the batch as a share of ``max_num_seqs``, KV cache in use, and the
    groups of its virtual queue as ``class:model xN`` from the head on.

    Args:
        timeline: of the same episode, sampled at least once.
    """
    now = timeline.samples[-1]
    classes = view.scenario.slo.classes
    legend: list[Part] = [(f"{c.name} {c.target_s:g} s  ", index) for index, c in enumerate(classes)]
    lines = [
        _line([(_headline(timeline), None)]),
        _line([(f"SLO on {view.scenario.slo.metric}: ", None), *legend]),
        "",
        f"{'instance':<{NAME_COLUMNS}} {'model':<{MODEL_COLUMNS}} "
        f"{'batch':<{BAR_COLUMNS + 5}} {'KV':>4}  virtual queue",
    ]
    for instance in view.instances[:MAX_INSTANCES]:
        running = int(now["running"][instance.index])
        bar = "#" * math.ceil(BAR_COLUMNS * running / view.scenario.cluster.engine.max_num_seqs)
        start = (
            f"{_cut(view.instance_names[instance.index].name, NAME_COLUMNS):<{NAME_COLUMNS}} "
            f"{_cut(_model_state(view, instance), MODEL_COLUMNS):<{MODEL_COLUMNS}} "
            f"{bar:.<{BAR_COLUMNS}}{running:>5} {now['kv_used'][instance.index]:>4.0%}  "
        )
        lines.append(_line([(start, None), *_groups(view, instance.queue)]))
    hidden = len(view.instances) - MAX_INSTANCES
    if hidden > 0:
        running, waiting = now["running"][MAX_INSTANCES:].sum(), now["waiting"][MAX_INSTANCES:].sum()
        lines.append(f"... and {hidden} more: running {running}, waiting {waiting}")
    unqueued = [group.id for group in view.groups if not group.queued]
    lines.append(_line([("in no queue:  ", None), *_groups(view, unqueued)]))
    return "\n".join(lines) + "\n"


def _headline(timeline: Timeline) -> str:
    now = timeline.samples[-1]
    settled = int(now["settled"])
    attainment = f"{now['met'] / settled:.1%} of {settled} settled" if settled else "- (nothing settled yet)"
    waiting = now["waiting"].sum() + now["unqueued"]
    return (
        f"t = {now['time_s']:.1f} s   SLO attainment {attainment}   running {now['running'].sum()}"
        f"   waiting {waiting} ({now['unqueued']} in no queue)"
    )


def _model_state(view: ClusterView, instance: InstanceView) -> str:
    models = view.scenario.workload.models
    if not instance.up:
        return "down"
    if instance.coming_model is not None:
        name = models[instance.coming_model].name
        waits_for = f"{instance.loading_left_s:.0f} s" if instance.active_model is None else "batch"
        return f"<- {name} ({waits_for})"
    return "no model" if instance.active_model is None else models[instance.active_model].name


def _groups(view: ClusterView, groups: Sequence[int]) -> list[Part]:
    parts: list[Part] = []
    for g in groups:
        group = view.group(g)
        slo_class = view.scenario.slo.classes[group.slo_class].name
        model = view.scenario.workload.models[group.model].name
        parts.append((f"{slo_class}:{model} x{group.waiting}  ", group.slo_class))
    return parts or [("-", None)]


def _line(parts: Iterable[Part]) -> str:
    """The parts that fit, and at the end how many did not."""
    parts = list(parts)
    line = ""
    room = COLUMNS
    for left, (text, slo_class) in zip(range(len(parts), 0, -1), parts, strict=True):
        text = text.rstrip() if left == 1 else text
        more = f"+{left} more"
        if len(text) + (0 if left == 1 else len(more)) > room:
            return line + more
        room -= len(text)
        line += text if slo_class is None else _coloured(text, slo_class)
    return line


def _coloured(text: str, slo_class: int) -> str:
    return f"\x1b[{ANSI_COLOURS[slo_class % len(ANSI_COLOURS)]}m{text}\x1b[0m"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 2] + ".."
