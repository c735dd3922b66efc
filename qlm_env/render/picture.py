"""The cluster as a picture of fixed size, as video encoders need.

Instances are rows, each read from left to right: what its GPU has been doing, how many requests it runs now,
and the groups in its virtual queue in the order in which they will run. Below stand the waiting requests over
the same time. Larger clusters have one row per device type, in which instances are stacked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qlm_env.dynamics import EVICT, PREEMPT, SWAP_BEGIN
from qlm_env.render.areas import Pixels, hatched, paint_history, paint_waiting
from qlm_env.render.layout import (
    ALARM,
    DOWN,
    FAINT,
    HEIGHT,
    HISTORY_WIDTH,
    HISTORY_X,
    INK,
    LABEL_X,
    LEGEND_LINE,
    LEGEND_Y,
    MEANINGS_X,
    MODELS_X,
    PAPER,
    PREEMPTION,
    QUEUE_END_X,
    QUEUE_X,
    ROWS_Y,
    RULE,
    RUNNING_X,
    UNQUEUED_HEIGHT,
    UNQUEUED_Y,
    WAITING_HEIGHT,
    WAITING_Y,
    WIDTH,
    Colour,
    Row,
    Window,
    class_colour,
    ink_on,
    model_colour,
    pale,
    rows_of,
    window_of,
)
from qlm_env.timeline import Timeline
from qlm_env.view import ClusterView

TICKS = 6
MARKS = ((SWAP_BEGIN, "model swap begins"), (EVICT, "eviction"), (PREEMPT, "preemption"))
MARKS_LINE, LOADING_LINE, SWATCH = 8, 8, 20
MARK_PIXELS = 8
"""Marks of one row and kind that fall into so many columns are drawn as one."""


@dataclass(frozen=True)
class Box:
    """Waiting requests of one model and SLO class: a group, or several summed up."""

    model: int
    slo_class: int
    waiting: int


def draw_frame(view: ClusterView, timeline: Timeline) -> Pixels:
    """The cluster now and over the last minutes.

    Args:
        timeline: of the same episode, sampled at least once.

    Returns:
        uint8 RGB, shape (HEIGHT, WIDTH, 3).
    """
    rows = rows_of(view.instance_names)
    window = window_of(timeline)
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    paint_history(canvas, rows, window, len(timeline.models))
    scale = paint_waiting(canvas, rows, window)
    _paint_loading_swatch(canvas)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    _draw_headline(draw, timeline)
    _draw_titles(draw, window, stacked=len(rows) < len(view.instances))
    _draw_time(draw, rows, window)
    _draw_marks(draw, rows, window, timeline)
    _draw_rows(draw, rows, view, timeline)
    _draw_waiting_labels(draw, rows, window, timeline, scale)
    _draw_legend(draw, view)
    return np.array(image)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    text: str,
    colour: Colour = INK,
    *,
    size: int = 12,
    anchor: str = "lm",
    room: int | None = None,
) -> None:
    """One line of text, cut to ``room`` pixels; ``anchor`` as in Pillow: horizontal, then vertical."""
    font = _font(size)
    if room is not None and font.getlength(text) > room:
        while text and font.getlength(f"{text}..") > room:
            text = text[:-1]
        text += ".."
    draw.text((x, y), text, colour, font, anchor=anchor)


# --------------------------------------------------------------------------- now
def _draw_headline(draw: ImageDraw.ImageDraw, timeline: Timeline) -> None:
    now = timeline.samples[-1]
    settled = int(now["settled"])
    attainment = f"{now['met'] / settled:.1%} of {settled} settled requests" if settled else "-"
    load = f"running {now['running'].sum()}    waiting {now['waiting'].sum() + now['unqueued']}"
    _write(draw, LABEL_X, 28, f"t = {now['time_s']:.0f} s", size=20)
    _write(draw, HISTORY_X, 28, f"SLO attainment {attainment}", size=20)
    _write(draw, QUEUE_END_X, 28, load, size=20, anchor="rm")


def _draw_titles(draw: ImageDraw.ImageDraw, window: Window, *, stacked: bool) -> None:
    queue, layers = "virtual queue: waiting requests per group, next to run at the left", "virtual queue"
    if stacked:
        queue, layers = "waiting in virtual queues, by SLO class and model", "device type"
    y = ROWS_Y - 16
    _write(draw, LABEL_X, y, "instance", FAINT)
    _write(draw, HISTORY_X, y, "model on the GPU over time", FAINT)
    if window.right_x > HISTORY_X + HISTORY_WIDTH // 3:
        _write(draw, window.right_x, y, "now", FAINT, anchor="rm")
    _write(draw, RUNNING_X, y, "running", FAINT, anchor="rm")
    _write(draw, QUEUE_X, y, queue, FAINT)
    _write(draw, HISTORY_X, WAITING_Y - 16, f"waiting requests over time, by {layers}", FAINT)


def _draw_rows(draw: ImageDraw.ImageDraw, rows: list[Row], view: ClusterView, timeline: Timeline) -> None:
    """Names, batches and virtual queues. All queues share one scale."""
    running = timeline.samples["running"][-1]
    queues, unqueued = _queues(view, rows)
    longest = max(sum(box.waiting for box in queue) for queue in [*queues, unqueued])
    pixels = min(6.0, (QUEUE_END_X - QUEUE_X - 40) / max(1, longest))
    for row, queue in zip(rows, queues, strict=True):
        height = min(row.height, 36)
        _write(draw, LABEL_X, row.middle, row.label, room=HISTORY_X - LABEL_X - 8)
        if len(row.members) > 1:
            _write(draw, LABEL_X, row.middle + 16, f"{len(row.members)} instances", FAINT)
        _write(draw, RUNNING_X, row.middle, str(running[row.members].sum()), anchor="rm")
        draw.line([(QUEUE_X, row.bottom + 1), (QUEUE_END_X, row.bottom + 1)], RULE)
        _draw_queue(draw, queue, row.middle - height // 2, height, pixels)
    if unqueued:
        _write(draw, RUNNING_X, UNQUEUED_Y + UNQUEUED_HEIGHT // 2, "in no queue", ALARM, anchor="rm")
        _draw_queue(draw, unqueued, UNQUEUED_Y, UNQUEUED_HEIGHT, pixels)


def _queues(view: ClusterView, rows: list[Row]) -> tuple[list[list[Box]], list[Box]]:
    """The boxes of each row, and those of the groups in no queue.

    For one instance they are its groups in order. Those of several instances, like those in no queue, are
    summed by SLO class and model, the most urgent class first.
    """
    row_of = {i: k for k, row in enumerate(rows) for i in row.members}
    sums: list[dict[tuple[float, int, int], int]] = [{} for _ in [*rows, None]]
    for group in view.groups:
        k = row_of[group.instance] if group.queued and group.instance is not None else len(rows)
        key = group.target_s, group.slo_class, group.model
        sums[k][key] = sums[k].get(key, 0) + group.waiting
    boxes = [[Box(model, c, waiting) for (_, c, model), waiting in sorted(total.items())] for total in sums]
    for k, row in enumerate(rows):
        if len(row.members) == 1:
            groups = [view.group(g) for g in view.instances[row.members[0]].queue]
            boxes[k] = [Box(group.model, group.slo_class, group.waiting) for group in groups]
    return boxes[:-1], boxes[-1]


def _draw_queue(draw: ImageDraw.ImageDraw, queue: list[Box], top: int, height: int, pixels: float) -> None:
    """Boxes as wide as they hold requests; how many did not fit stands at the end."""
    x = QUEUE_X
    edge = 3 if height >= 16 else 2
    middle = top + height // 2
    for index, box in enumerate(queue):
        width = max(10, round(box.waiting * pixels))
        left = len(queue) - index
        if x + width > QUEUE_END_X - (0 if left == 1 else 36):
            _write(draw, QUEUE_END_X, middle, f"+{left}", anchor="rm")
            return
        area = [(x, top), (x + width - 1, top + height - 1)]
        fill = model_colour(box.model)
        draw.rectangle(area, fill, class_colour(box.slo_class), edge)
        if _font(11).getlength(str(box.waiting)) <= width - 2 * edge:
            _write(draw, x + width // 2, middle, str(box.waiting), ink_on(fill), size=11, anchor="mm")
        x += width + 2


# --------------------------------------------------------------------------- over time
def _draw_time(draw: ImageDraw.ImageDraw, rows: list[Row], window: Window) -> None:
    """Ticks under the areas, and a line at now."""
    bottom = WAITING_Y + WAITING_HEIGHT
    step_s = window.span_s / TICKS
    draw.line([(HISTORY_X, bottom), (HISTORY_X + HISTORY_WIDTH, bottom)], FAINT)
    first = math.ceil(window.start_s / step_s)
    for tick in range(first, first + TICKS + (first * step_s == window.start_s)):
        x = window.x(tick * step_s)
        draw.line([(x, bottom), (x, bottom + 4)], FAINT)
        _write(draw, x, bottom + 13, f"{tick * step_s:.0f} s", FAINT, anchor="mm")
    for top, end in ((ROWS_Y - 4, rows[-1].bottom + 3), (WAITING_Y - 4, bottom)):
        draw.line([(window.right_x, top), (window.right_x, end)], INK)


def _draw_marks(draw: ImageDraw.ImageDraw, rows: list[Row], window: Window, timeline: Timeline) -> None:
    row_of = {i: k for k, row in enumerate(rows) for i in row.members}
    events = timeline.events[np.searchsorted(timeline.events["time_s"], window.start_s) :]
    for kind, _ in MARKS:
        chosen = events[events["kind"] == kind]
        column = (chosen["time_s"] - window.start_s) / window.span_s * HISTORY_WIDTH // MARK_PIXELS
        rows_marked = [row_of[i] for i in chosen["instance"].tolist()]
        for k, c in sorted(set(zip(rows_marked, column.astype(int).tolist(), strict=True))):
            x = HISTORY_X + MARK_PIXELS * c + MARK_PIXELS // 2
            _draw_mark(draw, kind, x, rows[k].top, rows[k].bottom)


def _draw_mark(draw: ImageDraw.ImageDraw, kind: int, x: int, top: int, bottom: int) -> None:
    """A swap at the top of a row, an eviction at its bottom, a preemption above that."""
    if kind == SWAP_BEGIN:
        draw.polygon([(x - 4, top - 1), (x + 4, top - 1), (x, top + 6)], INK, PAPER)
    elif kind == EVICT:
        draw.polygon([(x - 4, bottom), (x + 4, bottom), (x, bottom - 7)], ALARM, PAPER)
    else:
        y = max((top + bottom) // 2, bottom - 14)
        draw.ellipse([(x - 3, y - 3), (x + 3, y + 3)], PREEMPTION, PAPER)


def _draw_waiting_labels(
    draw: ImageDraw.ImageDraw, rows: list[Row], window: Window, timeline: Timeline, scale: int
) -> None:
    """The scale at the left and, right of now, what each layer is, where there is room."""
    for share in (0.0, 0.5, 1.0):
        y = WAITING_Y + round((1 - share) * WAITING_HEIGHT)
        draw.line([(HISTORY_X - 4, y), (HISTORY_X, y)], FAINT)
        _write(draw, HISTORY_X - 8, y, f"{share * scale:g}", FAINT, anchor="rm")
    now = timeline.samples[-1]
    base = float(WAITING_Y + WAITING_HEIGHT)
    layers = [(row.label, INK, int(now["waiting"][row.members].sum())) for row in rows]
    for label, colour, waiting in [*layers, ("no queue", ALARM, int(now["unqueued"]))]:
        thickness = waiting / scale * WAITING_HEIGHT
        if thickness >= 10:
            _write(draw, window.right_x + 5, round(base - thickness / 2), label, colour, size=11, room=62)
        base -= thickness


# --------------------------------------------------------------------------- legend
def _legend_y(line: int) -> int:
    return LEGEND_Y + line * LEGEND_LINE


def _swatch(draw: ImageDraw.ImageDraw, x: int, y: int, fill: Colour, edge: Colour | None = None) -> None:
    draw.rectangle([(x, y - 6), (x + SWATCH - 1, y + 5)], fill, edge, 3)


def _paint_loading_swatch(canvas: Pixels) -> None:
    y = _legend_y(LOADING_LINE)
    area = canvas[y - 6 : y + 6, MEANINGS_X : MEANINGS_X + SWATCH]
    area[:] = hatched([PAPER], [model_colour(0)], np.zeros(area.shape[:2], np.intp))


def _capped(names: list[str], most: int) -> list[str]:
    """The first names; the line after them says how many there are besides."""
    return names if len(names) <= most else [*names[:most], f"and {len(names) - most} more"]


def _draw_legend(draw: ImageDraw.ImageDraw, view: ClusterView) -> None:
    def label(x: int, line: int, text: str, colour: Colour = INK) -> None:
        end = MEANINGS_X if x < MEANINGS_X else QUEUE_END_X
        _write(draw, x, _legend_y(line), text, colour, room=end - x - 4)

    models = [model.name for model in view.scenario.workload.models]
    label(MODELS_X, 0, "model", FAINT)
    for m, name in enumerate(_capped(models, 5)):
        if m < min(5, len(models)):
            _swatch(draw, MODELS_X, _legend_y(m + 1), model_colour(m))
        label(MODELS_X + 28, m + 1, name)
    for line, (kind, name) in enumerate(MARKS, start=MARKS_LINE):
        y = _legend_y(line)
        _draw_mark(draw, kind, MODELS_X + SWATCH // 2, y - 5, y + 5)
        label(MODELS_X + 28, line, name)

    slo = view.scenario.slo
    classes = [f"{c.name}: {c.target_s:g} s" for c in slo.classes]
    label(MEANINGS_X, 0, f"SLO class and target ({slo.metric}) of a group", FAINT)
    for c, name in enumerate(_capped(classes, 3)):
        if c < min(3, len(classes)):
            _swatch(draw, MEANINGS_X, _legend_y(c + 1), PAPER, class_colour(c))
        label(MEANINGS_X + 28, c + 1, name)
    label(MEANINGS_X, LOADING_LINE - 3, "GPU", FAINT)
    colour = model_colour(0)
    _swatch(draw, MEANINGS_X, _legend_y(LOADING_LINE - 2), colour)
    label(MEANINGS_X + 28, LOADING_LINE - 2, "model loaded, KV cache in use")
    _swatch(draw, MEANINGS_X, _legend_y(LOADING_LINE - 1), pale(colour))
    label(MEANINGS_X + 28, LOADING_LINE - 1, "model loaded, KV cache free")
    label(MEANINGS_X + 28, LOADING_LINE, "model being loaded")
    _swatch(draw, MEANINGS_X, _legend_y(LOADING_LINE + 1), DOWN)
    label(MEANINGS_X + 28, LOADING_LINE + 1, "instance failed")
