"""Where everything stands in the picture, and its colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlm_env.cluster import InstanceName
from qlm_env.timeline import Timeline

Colour = tuple[int, int, int]

WIDTH, HEIGHT = 1200, 672
"""Multiples of 16, which video codecs want."""
LABEL_X, HISTORY_X, HISTORY_WIDTH = 12, 120, 600
RUNNING_X, QUEUE_X, QUEUE_END_X = 770, 784, 1188
ROWS_Y, ROWS_HEIGHT = 84, 320
UNQUEUED_Y, UNQUEUED_HEIGHT = ROWS_Y + ROWS_HEIGHT + 6, 26
WAITING_Y, WAITING_HEIGHT = 480, 154
MODELS_X, MEANINGS_X, LEGEND_Y, LEGEND_LINE = 784, 960, 466, 18

MAX_INSTANCE_ROWS = 16
MAX_PITCH, MAX_STACK_PITCH = 80, 160
"""Height of a row with its gap, for one instance and for many."""
HISTORY_SPANS_S = (60.0, 120.0, 300.0, 600.0)
"""The window of time is the shortest of these that holds the episode so far; the last one slides."""

INK, FAINT, RULE, PAPER = (33, 37, 41), (100, 106, 112), (222, 226, 230), (255, 255, 255)
DOWN, EMPTY = (73, 80, 87), (243, 244, 246)
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
CLASS_COLOURS = ((200, 16, 46), (255, 196, 0), (20, 40, 110), (130, 0, 150), (0, 105, 80))


def mixed(colour: Colour, other: Colour, share: float) -> Colour:
    """``colour`` with a ``share`` of ``other`` in it."""
    r, g, b = (round((1 - share) * a + share * c) for a, c in zip(colour, other, strict=True))
    return r, g, b


def model_colour(model: int) -> Colour:
    """Models beyond the palette take its colours again, darker each time."""
    cycle, index = divmod(model, len(MODEL_COLOURS))
    return mixed(MODEL_COLOURS[index], INK, 1 - 0.6**cycle)


def pale(colour: Colour) -> Colour:
    """A model's colour where its KV cache is free."""
    return mixed(colour, PAPER, 0.7)


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever reads better on ``colour`` (ITU-R BT.601 luma)."""
    r, g, b = colour
    return INK if 0.299 * r + 0.587 * g + 0.114 * b > 130 else PAPER


def class_colour(slo_class: int) -> Colour:
    """Edge of the boxes of an SLO class."""
    return CLASS_COLOURS[slo_class % len(CLASS_COLOURS)]


@dataclass(frozen=True)
class Row:
    """One instance, or all instances of a device type."""

    label: str
    members: list[int]
    top: int
    height: int

    @property
    def middle(self) -> int:
        return self.top + self.height // 2

    @property
    def bottom(self) -> int:
        return self.top + self.height


def rows_of(names: list[InstanceName]) -> list[Row]:
    """A row per instance as long as there is room for a name beside each, else one per device type."""
    members = {name.name: [i] for i, name in enumerate(names)}
    pitch = MAX_PITCH
    if len(names) > MAX_INSTANCE_ROWS:
        kinds: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            kinds.setdefault(f"{name.device}x{name.tp}" if name.tp > 1 else name.device, []).append(i)
        members, pitch = kinds, MAX_STACK_PITCH
    pitch = min(pitch, ROWS_HEIGHT // len(members))
    return [Row(label, indices, ROWS_Y + k * pitch, pitch - 3) for k, (label, indices) in enumerate(members.items())]


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
        """The column of a point in time."""
        return HISTORY_X + int((time_s - self.start_s) / self.span_s * HISTORY_WIDTH)


def window_of(timeline: Timeline) -> Window:
    """The last minutes of an episode."""
    time_s = timeline.samples["time_s"]
    now_s = float(time_s[-1])
    span_s = next((span for span in HISTORY_SPANS_S if span >= now_s), HISTORY_SPANS_S[-1])
    start_s = max(0.0, now_s - span_s)
    column_s = start_s + (np.arange(HISTORY_WIDTH) + 1) / HISTORY_WIDTH * span_s
    sample = np.searchsorted(time_s, column_s[column_s <= now_s], side="right") - 1
    shown, columns = np.unique(sample[sample >= 0], return_inverse=True)
    left_x = HISTORY_X + len(sample) - len(columns)
    return Window(start_s, span_s, left_x, timeline.samples[shown], columns)
