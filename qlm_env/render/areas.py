"""Stacked areas over time, painted pixel by pixel: instances by model, waiting requests by queue."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qlm_env.render.layout import (
    ALARM,
    DOWN,
    EMPTY,
    PAPER,
    WAITING_HEIGHT,
    WAITING_SHADES,
    WAITING_Y,
    Colour,
    Row,
    Window,
    model_colour,
    pale,
)

Pixels = NDArray[np.uint8]
Codes = NDArray[np.intp]


def hatched(colours: list[Colour], stripes: list[Colour], codes: Codes) -> Pixels:
    """Pixels of the colour of each code; where its stripe is another colour, diagonal stripes of both."""
    height, width = codes.shape
    striped = (np.arange(height)[:, None] + np.arange(width)) % 8 < 3
    table = np.array([colours, stripes], np.uint8)
    return table[striped.astype(np.intp), codes]


def _stacked(shares: NDArray[np.float64], height: int) -> Codes:
    """Which layer each pixel of a stacked area belongs to.

    Args:
        shares: (U, S) thickness of each layer from the bottom up, as a share of ``height``.

    Returns:
        (height, U); S above the last layer.
    """
    tops = np.round(np.cumsum(shares, axis=1) * height).T
    level = np.arange(height)[::-1, None]
    codes = np.zeros((height, len(shares)), np.intp)
    for top in tops:
        codes += top <= level
    return codes


def paint_history(canvas: Pixels, rows: list[Row], window: Window, num_models: int) -> None:
    """Instances of each row stacked by model: solid as far as their KV cache is in use, pale above."""
    colours: list[Colour] = []
    stripes: list[Colour] = []
    for m in range(num_models):
        colour = model_colour(m)
        colours += [colour, pale(colour), PAPER]
        stripes += [colour, pale(colour), colour]
    colours += [DOWN, EMPTY]
    stripes += [DOWN, EMPTY]
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
        codes = _stacked(shares, row.height)[:, window.columns]
        canvas[row.top : row.bottom, window.left_x : window.right_x] = hatched(colours, stripes, codes)


def paint_waiting(canvas: Pixels, rows: list[Row], window: Window) -> int:
    """Waiting requests stacked by row, those in no queue on top; returns the top of the scale."""
    samples = window.samples
    layers = [samples["waiting"][:, row.members].sum(axis=1) for row in rows]
    waiting = np.stack([*layers, samples["unqueued"]], axis=1)
    scale = round_up(max(10, int(waiting.sum(axis=1).max(initial=0))))
    colours: list[Colour] = [*(WAITING_SHADES[k % 2] for k in range(len(rows))), ALARM, PAPER]
    codes = _stacked(waiting / scale, WAITING_HEIGHT)[:, window.columns]
    area = canvas[WAITING_Y : WAITING_Y + WAITING_HEIGHT, window.left_x : window.right_x]
    area[:] = np.array(colours, np.uint8)[codes]
    return scale


def round_up(value: int) -> int:
    """The next of 10, 20, 40, 60, 80, 100 times a power of ten."""
    power: int = 10 ** max(1, len(str(value - 1)) - 1)
    return next(factor * power for factor in (1, 2, 4, 6, 8, 10) if factor * power >= value)
