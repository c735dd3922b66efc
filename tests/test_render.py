from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qlm_env.cluster import InstanceName
from qlm_env.lso import Balance, SwapModel
from qlm_env.render import draw_frame, draw_text
from qlm_env.render.areas import round_up
from qlm_env.render.layout import (
    ALARM,
    DOWN,
    EMPTY,
    HEIGHT,
    HISTORY_X,
    INK,
    PAPER,
    QUEUE_END_X,
    QUEUE_X,
    ROWS_HEIGHT,
    ROWS_Y,
    UNQUEUED_HEIGHT,
    UNQUEUED_Y,
    WAITING_HEIGHT,
    WAITING_SHADES,
    WAITING_Y,
    WIDTH,
    Colour,
    class_colour,
    model_colour,
    pale,
    rows_of,
    window_of,
)
from qlm_env.render.text import COLUMNS
from qlm_env.spec import FailureSpec
from tests.toy_world import COLD_START_S, FAST, SLEEP_S, SLOW, Request, ToyWorld, toy_world

RED, BLUE = model_colour(0), model_colour(1)
Pixels = NDArray[np.uint8]


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[\d+m", "", text)


def share(pixels: Pixels, colour: Colour) -> float:
    """Share of pixels of a colour."""
    return float((pixels == np.array(colour, np.uint8)).all(axis=-1).mean())


def history(toy: ToyWorld, frame: Pixels, row: int, time_s: float) -> Pixels:
    """The column of a row at a point in time, without what is drawn over its edges."""
    place = rows_of(toy.view.instance_names)[row]
    x = window_of(toy.timeline).x(time_s)
    return frame[place.top + 8 : place.bottom - 8, x]


@pytest.fixture
def toy(tmp_path: Path) -> ToyWorld:
    """Three instances: one serves red and queues both models, one swaps to blue at 10, one fails at 20."""
    toy = toy_world(
        tmp_path,
        [
            Request(0, 60, 60, SLOW),
            *[Request(1, 8, 4, FAST)] * 12,
            *[Request(2, 8, 4, SLOW, model=1)] * 20,
            *[Request(3, 8, 4, SLOW)] * 9,
        ],
        instances=3,
        num_blocks=8,
        failures=(FailureSpec(instance=2, at_s=20, duration_s=10),),
    )
    toy.pass_time(0)
    toy.do(Balance(0, 0))
    toy.pass_time(10)
    toy.do(Balance(1, 0), Balance(2, 0), SwapModel(1, 1))
    for time_s in range(11, 41):
        toy.pass_time(time_s)
    return toy


# --------------------------------------------------------------------------- picture
def test_frames_have_one_shape_and_change_over_time(tmp_path: Path) -> None:
    toy = toy_world(tmp_path, [Request(5.0 * k, 8, 7, k % 2, k % 2) for k in range(20)], instances=2)
    frames = [draw_frame(toy.view, toy.timeline)]
    for until_s in (5, 30, 59, 61, 200, 700):
        toy.serve(until_s=until_s)
        toy.pass_time(until_s)
        frames.append(draw_frame(toy.view, toy.timeline))
    for frame, following in pairwise(frames):
        assert frame.shape == (HEIGHT, WIDTH, 3)
        assert frame.dtype == np.uint8
        assert frame.flags.writeable
        assert (frame != following).any()


def test_the_same_state_gives_the_same_frame(toy: ToyWorld) -> None:
    assert (draw_frame(toy.view, toy.timeline) == draw_frame(toy.view, toy.timeline)).all()


def test_history_shows_model_kv_cache_loading_and_failure(toy: ToyWorld) -> None:
    frame = draw_frame(toy.view, toy.timeline)
    # 60 + 25 tokens in 6 of 8 blocks: a row is red to three quarters of its height.
    column = history(toy, frame, 0, 25.5)
    assert share(column[-20:], RED) == 1
    assert share(column[:8], pale(RED)) == 1
    assert share(history(toy, frame, 1, 5.5), pale(RED)) == 1
    loading = history(toy, frame, 1, 30.5)
    assert share(loading, BLUE) + share(loading, PAPER) == 1
    assert 0.2 < share(loading, BLUE) < 0.6
    assert share(history(toy, frame, 2, 25.5), DOWN) == 1
    assert share(history(toy, frame, 2, 35.5), EMPTY) == 1
    # What is to come is blank.
    assert share(history(toy, frame, 0, 50), PAPER) == 1


def test_the_kv_cache_stands_as_high_as_it_is_used(toy: ToyWorld) -> None:
    frame = draw_frame(toy.view, toy.timeline)
    row = rows_of(toy.view.instance_names)[0]
    x = window_of(toy.timeline).x(25.5)
    assert share(frame[row.top : row.bottom, x], RED) == pytest.approx(6 / 8, abs=1 / row.height)


def test_a_swap_is_marked(toy: ToyWorld) -> None:
    window = window_of(toy.timeline)
    row = rows_of(toy.view.instance_names)[1]
    frame = draw_frame(toy.view, toy.timeline)
    assert share(frame[row.top : row.top + 5, window.x(9) : window.x(11)], INK) > 0.1
    assert share(frame[row.top : row.top + 5, window.x(12) : window.x(39)], INK) == 0


def test_virtual_queues_show_groups_in_order(toy: ToyWorld) -> None:
    """Instance 0: 12 red fast, then 20 blue slow; 9 red slow in no queue."""
    frame = draw_frame(toy.view, toy.timeline)
    row = rows_of(toy.view.instance_names)[0]
    queue = frame[row.middle - 12, QUEUE_X:QUEUE_END_X]
    red, blue = (np.flatnonzero((queue == np.array(colour)).all(axis=-1)) for colour in (RED, BLUE))
    assert red.max() < blue.min()
    edges = [np.flatnonzero((queue == np.array(class_colour(c))).all(axis=-1)) for c in (FAST, SLOW)]
    assert edges[0].min() == 0
    assert edges[0].max() < blue.min()
    assert edges[1].max() > blue.max()
    # Widths are in proportion to the requests, edges included.
    width = edges[0].max() - edges[0].min() + 1, edges[1].max() - edges[1].min() + 1
    assert width[1] / width[0] == pytest.approx(20 / 12, abs=0.1)

    unqueued = frame[UNQUEUED_Y : UNQUEUED_Y + UNQUEUED_HEIGHT, QUEUE_X:QUEUE_END_X]
    assert share(unqueued, RED) > 0
    assert share(unqueued, BLUE) == 0


def test_waiting_requests_are_stacked(toy: ToyWorld) -> None:
    """41 wait from 10 on, 9 of them in no queue, on a scale to 60."""
    frame = draw_frame(toy.view, toy.timeline)
    x = window_of(toy.timeline).x(30.5)
    column = frame[WAITING_Y : WAITING_Y + WAITING_HEIGHT, x]
    assert share(column, WAITING_SHADES[0]) == pytest.approx(32 / 60, abs=0.02)
    assert share(column, ALARM) == pytest.approx(9 / 60, abs=0.02)


def test_more_groups_than_fit_are_counted(tmp_path: Path) -> None:
    requests = [Request(0, 8, 100), *[Request(1, 8, 100)] * 120]
    toy = toy_world(tmp_path, requests, group_members=1)
    toy.pass_time(1)
    for group in toy.view.groups:
        toy.do(Balance(group.id, 0))
    toy.pass_time(2)
    frame = draw_frame(toy.view, toy.timeline)
    row = rows_of(toy.view.instance_names)[0]
    assert share(frame[row.top : row.bottom, QUEUE_END_X:], PAPER) > 0.9
    assert "more" in plain(draw_text(toy.view, toy.timeline)).splitlines()[4]


@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        ({("A100", 1): 1}, 1),
        ({("A10", 1): 8, ("A100", 1): 8}, 16),
        ({("A10", 1): 30, ("A100", 1): 50}, 2),
        ({("A10", 1): 400, ("A100", 1): 500, ("A100", 4): 100}, 3),
    ],
)
def test_rows_hold_every_instance_once_and_stay_in_place(counts: dict[tuple[str, int], int], rows: int) -> None:
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    names = [InstanceName(f"{i} {device}", device, tp) for i, (device, tp) in enumerate(kinds)]
    placed = rows_of(names)
    assert len(placed) == rows
    assert sorted(i for row in placed for i in row.members) == list(range(len(names)))
    assert placed[0].top == ROWS_Y
    assert placed[-1].bottom <= ROWS_Y + ROWS_HEIGHT
    for row, below in pairwise(placed):
        assert row.height >= 14
        assert row.bottom < below.top


def test_large_clusters_are_stacked(tmp_path: Path) -> None:
    """Of 40 instances 10 load blue; red is left on three quarters."""
    toy = toy_world(tmp_path, [Request(0, 8, 100), *[Request(0, 8, 100, FAST)] * 5], instances=40)
    toy.pass_time(0)
    toy.do(*(SwapModel(i, 1) for i in range(10)))
    toy.do(Balance(0, 39))
    for time_s in range(1, 31):
        toy.pass_time(time_s)
    frame = draw_frame(toy.view, toy.timeline)
    (row,) = rows_of(toy.view.instance_names)
    column = frame[row.top : row.bottom, HISTORY_X + 100]
    assert share(column, pale(RED)) == pytest.approx(0.75, abs=0.01)
    toy.pass_time(SLEEP_S + COLD_START_S + 15)
    frame = draw_frame(toy.view, toy.timeline)
    now = frame[row.top : row.bottom, window_of(toy.timeline).right_x - 1]
    assert share(now, pale(BLUE)) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("value", "top"), [(1, 10), (10, 10), (11, 20), (61, 80), (99, 100), (101, 200), (4001, 6000)])
def test_scales_are_round(value: int, top: int) -> None:
    assert round_up(value) == top


# --------------------------------------------------------------------------- text
def test_text_by_line(toy: ToyWorld) -> None:
    lines = plain(draw_text(toy.view, toy.timeline)).splitlines()
    assert lines[0].split("   ") == [
        "t = 40.0 s",
        # The twelve fast requests have missed 4 s after their arrival.
        "SLO attainment 0.0% of 12 settled",
        "running 1",
        "waiting 41 (9 in no queue)",
    ]
    assert lines[1] == "SLO on e2e: fast 4 s  slow 100 s"
    assert re.fullmatch(r"0 TOY\s+red\s+#{8}\s+1\s+88%\s+fast:red x12\s+slow:blue x20", lines[4])
    assert re.fullmatch(r"1 TOY\s+<- blue \(11 s\)\s+\.{8}\s+0\s+0%\s+-", lines[5])
    assert re.fullmatch(r"2 TOY\s+no model\s+\.{8}\s+0\s+0%\s+-", lines[6])
    assert lines[7] == "in no queue:  slow:red x9"


def test_text_says_what_is_down_and_what_drains(toy: ToyWorld, tmp_path: Path) -> None:
    early = toy_world(
        tmp_path,
        [Request(0, 8, 100)],
        instances=2,
        failures=(FailureSpec(instance=1, at_s=3, duration_s=10),),
    )
    early.pass_time(0)
    early.do(Balance(0, 0))
    early.pass_time(1.5)
    early.do(SwapModel(0, 1))
    early.pass_time(4.5)
    lines = plain(draw_text(early.view, early.timeline)).splitlines()
    assert re.match(r"0 TOY\s+<- blue \(batch\)\s+#", lines[4])
    assert re.match(r"1 TOY\s+down\s+\.", lines[5])


def test_colours_tell_the_classes_apart(toy: ToyWorld) -> None:
    coloured: list[Any] = re.findall(r"\x1b\[(\d+)m(\w+)", draw_text(toy.view, toy.timeline))
    by_class = {name: {code for code, text in coloured if text == name} for name in ("fast", "slow")}
    assert all(len(codes) == 1 for codes in by_class.values())
    assert by_class["fast"] != by_class["slow"]


def test_text_is_bounded(tmp_path: Path) -> None:
    toy = toy_world(
        tmp_path,
        [Request(0.1 * k, 8, 50, k % 2, k // 2 % 2) for k in range(300)],
        instances=30,
        group_members=2,
    )
    rng = np.random.default_rng(0)
    while toy.now_s < 20:
        for group in toy.view.groups:
            if not group.queued and rng.random() < 0.1:
                toy.do(Balance(group.id, int(rng.integers(3))))
        toy.pass_time(toy.now_s + 1, stop_at_epoch=True)
    lines = plain(draw_text(toy.view, toy.timeline)).splitlines()
    assert max(len(line) for line in lines) <= COLUMNS
    assert len(lines) == 4 + 20 + 2
    assert lines[-2].startswith("... and 10 more")
    assert re.search(r"\+\d+ more$", lines[4])
    assert re.search(r"\+\d+ more$", lines[-1])
