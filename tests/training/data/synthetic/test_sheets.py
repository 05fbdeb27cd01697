"""Sheets: ways of weaving, leather, metal and print, measured."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from helpers.synthesis import check_possible

from training.data.synthetic.canvas import Builder, Part
from training.data.synthetic.sheets import SHEETS, fill, lay, weave

WARP, WEFT = (0.6, 0.02, 0.02), (0.02, 0.02, 0.6)
even = partial(weave, yarns=(WARP, WEFT), uneven=0.0, fuzz=0.0)


def drawn(builder: Builder, seed: int = 3, size: int = 240) -> Part:
    part = Part.blank(size)
    builder(part, np.random.default_rng(seed))
    return part


@pytest.mark.parametrize("name", SHEETS)
def test_sheets_fill_the_canvas_with_possible_materials(name: str) -> None:
    part = drawn(SHEETS[name], size=64)
    assert part.surface and part.body.min() == 1 and not part.floor.any()
    check_possible(part)
    assert np.abs(part.height).max() < 0.2 and np.isin(part.metal, (0, 1)).all()


def test_a_pattern_lies_a_little_turned_and_anywhere() -> None:
    turns, shifts = [], []
    for seed in range(300):
        part = Part.blank(8)
        x, y = lay(part, np.random.default_rng(seed), 0.5, skew=0.1)
        # A rotation: steps along x and y keep their length and right angle.
        along, down = (x[0, 1] - x[0, 0], y[0, 1] - y[0, 0]), (x[1, 0] - x[0, 0], y[1, 0] - y[0, 0])
        assert math.hypot(*along) == pytest.approx(part.texel, rel=1e-4)
        assert np.dot(along, down) == pytest.approx(0, abs=1e-5)
        turns.append(math.atan2(-along[1], along[0]))
        shifts.append(float(x.mean()))
    assert np.std(turns) == pytest.approx(0.1, rel=0.15)
    assert min(shifts) > -0.4 and max(shifts) < 1.4 and np.std(shifts) == pytest.approx(1 / math.sqrt(12), rel=0.15)


def test_fill_sets_all_but_the_body() -> None:
    part = Part.blank(4)
    fill(part, np.full((3, 4, 4), 0.3, np.float32), 0.1, 0.2, 1)
    assert part.maps[:, 0, 0].tolist() == pytest.approx([0.1, 0.3, 0.3, 0.3, 0.2, 1, 0])


def test_brushed_metal_is_smoother_along_the_brush() -> None:
    part = drawn(SHEETS["brushed_steel"], size=300)
    along, across = (np.abs(np.diff(part.color[1], axis=axis)).mean() for axis in (1, 0))
    assert across > 5 * along and part.metal.min() == 1


def test_the_prints_of_a_label_are_pieces() -> None:
    # Brand, four lines, code, sign and seal.
    assert drawn(SHEETS["label"], size=64).pieces.count == 8


@pytest.mark.parametrize("twill", [(1, 1), (2, 2), (3, 1), (1, 3)])
def test_the_warp_shows_as_often_as_it_runs_over(twill: tuple[int, int]) -> None:
    part = drawn(partial(even, count=12, twill=twill))
    warp = part.color[0] > part.color[2]
    over, under = twill
    assert warp.mean() == pytest.approx(over / (over + under), abs=0.06)


def test_plain_weave_is_a_checkerboard() -> None:
    part = drawn(partial(even, count=10, twill=(1, 1)), size=400)
    warp = (part.color[0] > part.color[2]).astype(float)
    # One crossing is 20 texels: the next one is of the other kind, that after it the same.
    for axis in (0, 1):
        same = [(warp == np.roll(warp, shift, axis)).mean() for shift in (20, 40)]
        assert same[0] < 0.3 and same[1] > 0.7


def test_thin_threads_leave_gaps_and_even_ones_none() -> None:
    part = drawn(partial(weave, count=8, yarns=(WARP, WEFT), uneven=0.3, fuzz=0.0))
    gaps = (part.color == np.float32(0.012)).all(0)
    # A gap is where neither the warp nor the weft reaches: in the deepest places alone.
    assert 0.005 < gaps.mean() < 0.2 and part.height[gaps].max() <= np.quantile(part.height, gaps.mean()) + 1e-6
    assert not (drawn(partial(even, count=8)).color == np.float32(0.012)).all(0).any()


def test_finer_leather_has_more_and_lower_grains() -> None:
    coarse, fine = (drawn(SHEETS[name]) for name in ("leather", "vinyl"))
    # 17 and 26 grains per unit of length.
    crossings = [np.diff(np.signbit(part.height - np.median(part.height))).mean() for part in (coarse, fine)]
    assert crossings[1] > 1.2 * crossings[0]
    assert fine.height.std() < coarse.height.std()
