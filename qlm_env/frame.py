"""The cluster as a picture.

Instances are rows, each read from left to right: what its GPU has been doing, the batch it runs now, and the
groups in its virtual queue in the order in which they will run. Below stand the waiting requests over the same
time. Larger clusters have one row per device type, in which instances are stacked. The size never changes, as
video encoders need.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from qlm_env.cluster import InstanceName
from qlm_env.dynamics import EVICT, PREEMPT, SWAP_BEGIN
from qlm_env.timeline import Timeline
from qlm_env.view import ClusterView

Colour = tuple[int, int, int]
Pixels = NDArray[np.uint8]
Codes = NDArray[np.intp]

WIDTH, HEIGHT = 1200, 672
"""Multiples of 16, which video codecs want."""
LABEL_X, HISTORY_X, HISTORY_WIDTH = 12, 120, 600
RUNNING_X, QUEUE_X, QUEUE_END_X = 770, 784, 1188
ROWS_Y, ROWS_HEIGHT = 84, 320
UNQUEUED_Y, UNQUEUED_HEIGHT = ROWS_Y + ROWS_HEIGHT + 10, 24
WAITING_Y, WAITING_HEIGHT = 486, 150
MODELS_X, MEANINGS_X, LEGEND_Y, LEGEND_LINE = 784, 960, 470, 17
LEGEND_LINES = 10

MAX_INSTANCE_ROWS = 16
HISTORY_SPANS_S = (60.0, 120.0, 300.0, 600.0)
"""The window of time is the shortest of these that holds the episode so far; the last one slides."""
TICKS = 6

INK, FAINT, RULE, PAPER = (33, 37, 41), (110, 116, 122), (222, 226, 230), (255, 255, 255)
DOWN, EMPTY = (73, 80, 87), (245, 246, 248)
ALARM, PREEMPTION = (200, 16, 46), (130, 0, 150)
WAITING_SHADES = ((112, 138, 163), (176, 190, 205))
"""Of one row of instances and the next, alternating."""
MODEL_COLOURS = (
    (78, 121, 167),
    (242, 142, 43),
    (89, 161, 79),
    (176, 122, 161),
    (118, 183, 178),
    (237, 201, 72),
    (255, 157, 167),
    (156, 117, 95),
)
CLASS_COLOURS = ((200, 16, 46), (240, 180, 0), (25, 60, 130), (130, 0, 150), (0, 105, 80))


@dataclass(frozen=True)
class Row:
    """One instance, or all instances of a device type, and where it stands in the picture."""

    label: str
    members: list[int]
    top: int
    height: int


@dataclass(frozen=True)
class Box:
    """Waiting requests of one model and SLO class: a group, or several summed up."""

    model: int
    slo_class: int
    waiting: int


@dataclass(frozen=True)
class Window:
    """The time shown, and the samples that its pixel columns up to now show."""

    start_s: float
    span_s: float
    left_x: int
    """The first column with a sample."""
    samples: NDArray[np.void]
    """(U,) those that are shown"""
    columns: NDArray[np.intp]
    """(W,) the sample of each column from ``left_x`` to now, as an index into ``samples``"""

    @property
    def right_x(self) -> int:
        """The first column after now."""
        return self.left_x + len(self.columns)

    def x(self, time_s: float) -> int:
        return HISTORY_X + int((time_s - self.start_s) / self.span_s * HISTORY_WIDTH)


def draw_frame(view: ClusterView, timeline: Timeline) -> Pixels:
    """The cluster now and over the last minutes.

    Args:
        timeline: of the same episode, sampled at least once.

    Returns:
        uint8 RGB, shape (HEIGHT, WIDTH, 3).
    """
    rows = _rows(view.instance_names)
    window = _window(timeline)
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    _paint_history(canvas, rows, window, len(timeline.models))
    most_waiting = _paint_waiting(canvas, rows, window)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    _draw_headline(draw, timeline)
    _draw_time_axis(draw, window)
    _draw_marks(draw, rows, window, timeline)
    _draw_rows(draw, rows, view, timeline)
    _draw_waiting_labels(draw, rows, window, most_waiting)
    _draw_legend(draw, view)
    return np.array(image)


# --------------------------------------------------------------------------- layout
def _rows(names: list[InstanceName]) -> list[Row]:
    if len(names) <= MAX_INSTANCE_ROWS:
        members = {name.name: [i] for i, name in enumerate(names)}
    else:
        members = {}
        for i, name in enumerate(names):
            members.setdefault(name.name.split(" ", 1)[1], []).append(i)
        members = {f"{len(indices)} x {kind}": indices for kind, indices in members.items()}
    pitch = min(40 if len(names) <= MAX_INSTANCE_ROWS else 120, ROWS_HEIGHT // len(members))
    return [
        Row(label, indices, ROWS_Y + k * pitch, pitch - 3)
        for k, (label, indices) in enumerate(members.items())
    ]


def _window(timeline: Timeline) -> Window:
    time_s = timeline.samples["time_s"]
    now_s = float(time_s[-1])
    span_s = next((span for span in HISTORY_SPANS_S if span >= now_s), HISTORY_SPANS_S[-1])
    start_s = max(0.0, now_s - span_s)
    column_s = start_s + (np.arange(HISTORY_WIDTH) + 1) / HISTORY_WIDTH * span_s
    column_s = column_s[column_s <= now_s]
    sample = np.searchsorted(time_s, column_s, side="right") - 1
    used, columns = np.unique(sample[sample >= 0], return_inverse=True)
    left_x = HISTORY_X + len(sample) - len(columns)
    return Window(start_s, span_s, left_x, timeline.samples[used], columns)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _mixed(colour: Colour, other: Colour, share: float) -> Colour:
    r, g, b = (round((1 - share) * a + share * c) for a, c in zip(colour, other, strict=True))
    return r, g, b


def _model_colour(model: int) -> Colour:
    """Models beyond the palette take its colours again, darker each time."""
    cycle, index = divmod(model, len(MODEL_COLOURS))
    return _mixed(MODEL_COLOURS[index], INK, 1 - 0.6**cycle)


def _class_colour(slo_class: int) -> Colour:
    return CLASS_COLOURS[slo_class % len(CLASS_COLOURS)]


# --------------------------------------------------------------------------- areas
def _stacked(levels: NDArray[np.float64], height: int) -> Codes:
    """Which layer shows at each pixel of a stacked area.

    Args:
        levels: (W, S) thickness of each layer from the bottom up, as a share of ``height``.

    Returns:
        (height, W); S above the last layer.
    """
    tops = np.round(np.cumsum(levels, axis=1) * height).T
    pixel = np.arange(height)[::-1, None]
    codes = np.zeros((height, levels.shape[0]), np.intp)
    for top in tops:
        codes += top <= pixel
    return codes


def _paint(area: Pixels, codes: Codes, colours: list[Colour], hatched: list[Colour]) -> None:
    """Fill an area by a colour per code; where ``hatched`` differs, in diagonal stripes of both."""
    y, x = np.indices(codes.shape, sparse=True)
    stripe = (x + y) % 8 < 4
    area[:] = np.where(stripe[..., None], np.array(hatched, np.uint8)[codes], np.array(colours, np.uint8)[codes])


def _paint_history(canvas: Pixels, rows: list[Row], window: Window, num_models: int) -> None:
    """Per row the instances stacked by model: solid as far as their KV cache is in use, pale above."""
    colours: list[Colour] = []
    hatched: list[Colour] = []
    for m in range(num_models):
        colour = _model_colour(m)
        pale = _mixed(colour, PAPER, 0.65)
        colours += [colour, pale, PAPER]
        hatched += [colour, pale, colour]
    colours += [DOWN, EMPTY]
    hatched += [DOWN, EMPTY]
    samples = window.samples
    for row in rows:
        active = samples["active_model"][:, row.members]
        loading = samples["loading_model"][:, row.members]
        kv_used = samples["kv_used"][:, row.members]
        shares = np.zeros((len(samples), 3 * num_models + 1))
        for m in range(num_models):
            holds = active == m
            shares[:, 3 * m] = (holds * kv_used).mean(axis=1)
            shares[:, 3 * m + 1] = holds.mean(axis=1) - shares[:, 3 * m]
            shares[:, 3 * m + 2] = (loading == m).mean(axis=1)
        shares[:, -1] = 1 - samples["up"][:, row.members].mean(axis=1)
        area = canvas[row.top : row.top + row.height, window.left_x : window.right_x]
        _paint(area, _stacked(shares, row.height)[:, window.columns], colours, hatched)


def _paint_waiting(canvas: Pixels, rows: list[Row], window: Window) -> int:
    """Waiting requests over time, stacked by row, those in no queue on top; returns the top of the scale."""
    samples = window.samples
    layers = [samples["waiting"][:, row.members].sum(axis=1) for row in rows]
    waiting = np.stack([*layers, samples["unqueued"]], axis=1)
    scale = _round_up(max(10, int(waiting.sum(axis=1).max(initial=0))))
    colours = [WAITING_SHADES[k % 2] for k in range(len(rows))]
    codes = _stacked(waiting / scale, WAITING_HEIGHT)[:, window.columns]
    area = canvas[WAITING_Y : WAITING_Y + WAITING_HEIGHT, window.left_x : window.right_x]
    _paint(area, codes, [*colours, PAPER, PAPER], [*colours, ALARM, PAPER])
    return scale


def _round_up(value: int) -> int:
    """To 1, 2 or 5 times a power of ten."""
    power = 10 ** (len(str(value)) - 1)
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


# --------------------------------------------------------------------------- lines and letters
def _write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, colour: Colour = INK, *, size: int = 12, anchor: str = "lm", room: int | None = None) -> None:
    """One line of text, cut to ``room`` pixels; ``anchor`` as in Pillow (horizontal, vertical)."""
    font = _font(size)
    if room is not None and font.getlength(text) > room:
        while text and font.getlength(text + "..") > room:
            text = text[:-1]
        text += ".."
    draw.text((x, y), text, colour, font, anchor=anchor)


def _draw_headline(draw: ImageDraw.ImageDraw, timeline: Timeline) -> None:
    now = timeline.samples[-1]
    settled = int(now["settled"])
    attainment = f"{now['met'] / settled:.1%} of {settled} settled requests" if settled else "no request settled yet"
    _write(draw, LABEL_X, 26, f"t = {now['time_s']:.0f} s", size=20)
    _write(draw, HISTORY_X, 26, f"SLO attainment {attainment}", size=20)
    load = f"running {now['running'].sum()}    waiting {now['waiting'].sum() + now['unqueued']}"
    _write(draw, QUEUE_END_X, 26, load, size=20, anchor="rm")
    _write(draw, HISTORY_X, ROWS_Y - 16, "model on each GPU over time", FAINT)
    _write(draw, RUNNING_X, ROWS_Y - 16, "batch", FAINT, anchor="rm")
    _write(draw, QUEUE_X, ROWS_Y - 16, "virtual queue now: requests per group, first to run at the left", FAINT)


def _draw_time_axis(draw: ImageDraw.ImageDraw, window: Window) -> None:
    step_s = window.span_s / TICKS
    bottom = WAITING_Y + WAITING_HEIGHT
    tick_s = np.ceil(window.start_s / step_s) * step_s
    while tick_s <= window.start_s + window.span_s:
        x = window.x(tick_s)
        draw.line([(x, bottom), (x, bottom + 4)], FAINT)
        _write(draw, x, bottom + 12, f"{tick_s:.0f} s", FAINT, anchor="mm")
        tick_s += step_s
    for top, end in ((ROWS_Y - 3, UNQUEUED_Y - 8), (WAITING_Y, bottom)):
        draw.line([(window.right_x, top), (window.right_x, end)], INK)


def _draw_marks(draw: ImageDraw.ImageDraw, rows: list[Row], window: Window, timeline: Timeline) -> None:
    """Swaps at the top of a row, evictions at its bottom, preemptions between; one mark for what falls together."""
    row_of = {i: row for row in rows for i in row.members}
    events = timeline.events
    events = events[np.searchsorted(events["time_s"], window.start_s) :]
    for kind in (SWAP_BEGIN, EVICT, PREEMPT):
        chosen = events[events["kind"] == kind]
        columns = ((chosen["time_s"] - window.start_s) / window.span_s * HISTORY_WIDTH // 4).astype(int)
        places = set(zip(columns.tolist(), chosen["instance"].tolist(), strict=True))
        for x, top, height in {(HISTORY_X + 4 * c + 2, row_of[i].top, row_of[i].height) for c, i in places}:
            _draw_mark(draw, kind, x, top, height)


def _draw_mark(draw: ImageDraw.ImageDraw, kind: int, x: int, top: int, height: int) -> None:
    if kind == SWAP_BEGIN:
        draw.polygon([(x - 5, top - 2), (x + 5, top - 2), (x, top + 7)], INK, PAPER)
    elif kind == EVICT:
        bottom = top + height
        draw.polygon([(x - 5, bottom + 1), (x + 5, bottom + 1), (x, bottom - 8)], ALARM, PAPER)
    else:
        middle = top + height // 2
        draw.ellipse([(x - 3, middle - 3), (x + 3, middle + 3)], PREEMPTION, PAPER)


def _draw_rows(draw: ImageDraw.ImageDraw, rows: list[Row], view: ClusterView, timeline: Timeline) -> None:
    """Names, batches and virtual queues. All queues share one scale."""
    running = timeline.samples["running"][-1]
    queues, unqueued = _queues(view, rows)
    longest = max(sum(box.waiting for box in queue) for queue in [*queues, unqueued])
    pixels = min(6.0, (QUEUE_END_X - QUEUE_X) / max(1, longest))
    for row, queue in zip(rows, queues, strict=True):
        middle = row.top + row.height // 2
        _write(draw, LABEL_X, middle, row.label, room=HISTORY_X - LABEL_X - 6)
        _write(draw, RUNNING_X, middle, str(running[row.members].sum()), anchor="rm")
        height = min(row.height, 40)
        _draw_queue(draw, queue, middle - height // 2, height, pixels)
    if unqueued:
        _write(draw, RUNNING_X, UNQUEUED_Y + UNQUEUED_HEIGHT // 2, "in no queue", ALARM, anchor="rm")
        _draw_queue(draw, unqueued, UNQUEUED_Y, UNQUEUED_HEIGHT, pixels)


def _queues(view: ClusterView, rows: list[Row]) -> tuple[list[list[Box]], list[Box]]:
    """The boxes of each row, and of the groups in no queue.

    For one instance they are its groups in order. Those of several instances, like those in no queue, are summed by
    SLO class and model, the most urgent class first.
    """
    row_of = {i: k for k, row in enumerate(rows) for i in row.members}
    sums: list[dict[tuple[float, int, int], int]] = [{} for _ in [*rows, None]]
    ordered: dict[int, list[Box]] = {k: [] for k, row in enumerate(rows) if len(row.members) == 1}
    for k in ordered:
        for g in view.instances[rows[k].members[0]].queue:
            group = view.group(g)
            ordered[k].append(Box(group.model, group.slo_class, group.waiting))
    for group in view.groups:
        k = row_of[group.instance] if group.queued and group.instance is not None else len(rows)
        key = group.target_s, group.slo_class, group.model
        sums[k][key] = sums[k].get(key, 0) + group.waiting
    summed = [[Box(m, c, waiting) for (_, c, m), waiting in sorted(boxes.items())] for boxes in sums]
    return [ordered.get(k, summed[k]) for k in range(len(rows))], summed[-1]


def _draw_queue(draw: ImageDraw.ImageDraw, queue: list[Box], top: int, height: int, pixels: float) -> None:
    """Boxes as wide as they hold requests; what does not fit is counted at the end."""
    x = QUEUE_X
    for index, box in enumerate(queue):
        width = max(8, round(box.waiting * pixels) - 1)
        left = len(queue) - index
        if x + width > QUEUE_END_X - (0 if left == 1 else 34):
            _write(draw, QUEUE_END_X, top + height // 2, f"+{left}", anchor="rm")
            return
        edge = 3 if height >= 14 else 2
        area = [(x, top), (x + width - 1, top + height - 1)]
        draw.rectangle(area, _model_colour(box.model), _class_colour(box.slo_class), edge)
        if height >= 14 and _font(11).getlength(str(box.waiting)) <= width - 2 * edge:
            _write(draw, x + width // 2, top + height // 2, str(box.waiting), size=11, anchor="mm")
        x += width + 2


def _draw_waiting_labels(draw: ImageDraw.ImageDraw, rows: list[Row], window: Window, scale: int) -> None:
    """The scale at the left, and right of now what each layer is, where there is room."""
    _write(draw, HISTORY_X, WAITING_Y - 14, "waiting requests over time, by virtual queue", FAINT)
    for share in (0.0, 0.5, 1.0):
        y = WAITING_Y + round((1 - share) * WAITING_HEIGHT)
        _write(draw, HISTORY_X - 8, y, f"{share * scale:g}", FAINT, anchor="rm")
        draw.line([(HISTORY_X - 4, y), (HISTORY_X, y)], FAINT)
    now = window.samples[-1:]
    base = float(WAITING_Y + WAITING_HEIGHT)
    layers = [(row.label, INK, now["waiting"][:, row.members].sum()) for row in rows]
    for label, colour, waiting in [*layers, ("in no queue", ALARM, now["unqueued"].sum())]:
        thickness = waiting / scale * WAITING_HEIGHT
        if thickness >= 11:
            _write(draw, window.right_x + 4, round(base - thickness / 2), label, colour, size=11, room=60)
        base -= thickness


def _draw_legend(draw: ImageDraw.ImageDraw, view: ClusterView) -> None:
    _write(draw, MODELS_X, LEGEND_Y, "model", FAINT)
    for m, name in enumerate(_capped([model.name for model in view.scenario.workload.models], 8)):
        y = LEGEND_Y + (m + 1) * LEGEND_LINE
        _swatch(draw, MODELS_X, y, _model_colour(m))
        _write(draw, MODELS_X + 26, y, name, room=MEANINGS_X - MODELS_X - 36)
    slo = view.scenario.slo
    classes = _capped([f"{c.name}: {c.target_s:g} s ({slo.metric})" for c in slo.classes], 4)
    _write(draw, MEANINGS_X, LEGEND_Y, "SLO class of a waiting group", FAINT)
    for c, name in enumerate(classes):
        y = LEGEND_Y + (c + 1) * LEGEND_LINE
        _swatch(draw, MEANINGS_X, y, PAPER, _class_colour(c))
        _write(draw, MEANINGS_X + 26, y, name, room=QUEUE_END_X - MEANINGS_X - 26)
    y = LEGEND_Y + (len(classes) + 1) * LEGEND_LINE + 6
    colour = _model_colour(0)
    _write(draw, MEANINGS_X, y, "GPU", FAINT)
    for fill, meaning in (
        (colour, "KV cache in use"),
        (_mixed(colour, PAPER, PALE), "model loaded, KV cache free"),
        (None, "model being loaded"),
        (DOWN, "failed"),
    ):
        ...
