"""The cluster as text for a terminal (``ansi``); the picture (``rgb_array``) is drawn in :mod:`qlm_env.frame`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from qlm_env.frame import draw_frame
from qlm_env.timeline import Timeline
from qlm_env.view import ClusterView, InstanceView

__all__ = ["draw_frame", "draw_text"]

TEXT_COLUMNS = 110
TEXT_ROWS = 20
BAR_COLUMNS = 12
ANSI_COLOURS = (31, 33, 36, 35, 32, 34)
"""Foreground colours of the SLO classes, by index."""

Part = tuple[str, int | None]
"""A piece of a line, and the SLO class it is coloured by."""


def draw_text(view: ClusterView, timeline: Timeline) -> str:
    """The cluster now, in ANSI-coloured lines of at most TEXT_COLUMNS characters.

    One line per instance: model, batch as a share of ``max_num_seqs``, KV cache in use, and its virtual queue as
    ``class:model xN`` from the head on.

    Args:
        timeline: of the same episode, sampled at least once.
    """
    now = timeline.samples[-1]
    classes = view.scenario.slo.classes
    legend: list[Part] = [
        (f"{c.name} {c.target_s:g} s  ", index) for index, c in enumerate(classes)
    ]
    lines = [
        _ansi([(_headline(timeline), None)]),
        _ansi([("targets: ", None), *legend, (f"({view.scenario.slo.metric})", None)]),
        f"{'instance':<14}{'model':<22}{'batch':<{BAR_COLUMNS + 7}}{'KV':>4}  virtual queue",
    ]
    for instance in view.instances[:TEXT_ROWS]:
        i = instance.index
        running = int(now["running"][i])
        share = running / view.scenario.cluster.engine.max_num_seqs
        bar = "#" * int(np.ceil(BAR_COLUMNS * share))
        start = (
            f"{_shortened(view.instance_names[i].name, 13):<14}{_shortened(_model_state(view, instance), 21):<22}"
            f"{bar:.<{BAR_COLUMNS}} {running:>5} {now['kv_used'][i]:>4.0%}  "
        )
        lines.append(_ansi([(start, None), *_group_parts(view, instance.queue)]))
    hidden = len(view.instances) - TEXT_ROWS
    if hidden > 0:
        running = int(now["running"][TEXT_ROWS:].sum())
        waiting = int(now["waiting"][TEXT_ROWS:].sum())
        lines.append(f"... and {hidden} more instances, running {running}, waiting {waiting}")
    unqueued = [group.id for group in view.groups if not group.queued]
    lines.append(_ansi([("in no queue:  ", None), *_group_parts(view, unqueued)]))
    return "\n".join(lines) + "\n"


def _headline(timeline: Timeline) -> str:
    now = timeline.samples[-1]
    settled = int(now["settled"])
    attainment = f"{now['met'] / settled:.1%} of {settled} settled" if settled else "nothing settled yet"
    return (
        f"t = {now['time_s']:.1f} s    SLO attainment {attainment}    running {now['running'].sum()}"
        f"    waiting {now['waiting'].sum() + now['unqueued']} ({now['unqueued']} in no queue)"
    )


def _model_state(view: ClusterView, instance: InstanceView) -> str:
    models = view.scenario.workload.models
    if not instance.up:
        return "down"
    if instance.loading_left_s > 0 and instance.coming_model is not None:
        return f"{instance.loading_left_s:.0f} s to {models[instance.coming_model].name}"
    return "(none)" if instance.active_model is None else models[instance.active_model].name


def _group_parts(view: ClusterView, groups: Sequence[int]) -> Iterator[Part]:
    if not groups:
        yield "-", None
    for g in groups:
        group = view.group(g)
        name = view.scenario.slo.classes[group.slo_class].name
        yield f"{name}:{view.scenario.workload.models[group.model].name} x{group.waiting}  ", group.slo_class


def _ansi(parts: Iterable[Part]) -> str:
    """The parts that fit into a line; how many did not stands at its end."""
    line = ""
    room = TEXT_COLUMNS
    parts = list(parts)
    for index, (text, slo_class) in enumerate(parts):
        left = len(parts) - index
        note = f"+{left} more"
        if len(text.rstrip()) > room or (left > 1 and len(text) + len(note) > room):
            return line + note[:room]
        room -= len(text)
        colour = None if slo_class is None else ANSI_COLOURS[slo_class % len(ANSI_COLOURS)]
        line += text if colour is None else f"\x1b[{colour}m{text}\x1b[0m"
    return line.rstrip()


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 2] + ".."
