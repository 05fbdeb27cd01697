"""Soft sheets: the ways of weaving, knitting and pile, measured."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from helpers.synthesis import check_possible

from training.data.synthetic.canvas import Builder, Part
from training.data.synthetic.cloth import CLOTH, weave

WARP, WEFT = (0.6, 0.02, 0.02), (0.02, 0.02, 0.6)
even = partial(weave, yarns=(WARP, WEFT), uneven=0.0, fuzz=0.0)


def drawn(builder: Builder, size: int = 240) -> Part:
    part = Part.blank(size)
    builder(part, np.random.default_rng(3))
    return part


@pytest.mark.parametrize("name", CLOTH)
def test_sheets_fill_the_canvas_with_possible_materials(name: str) -> None:
    part = drawn(CLOTH[name], 64)
    assert part.surface and part.body.min() == 1
    check_possible(part)
    assert np.abs(part.height).max() < 0.2 and np.isin(part.metal, (0, 1)).all()


@pytest.mark.parametrize("twill", [(1, 1), (2, 2), (3, 1), (1, 3)])
def test_the_warp_shows_as_often_as_it_runs_over(twill: tuple[int, int]) -> None:
    part = drawn(partial(even, count=12, twill=twill))
    warp = part.color[0] > part.color[2]
    over, under = twill
    assert warp.mean() == pytest.approx(over / (over + under), abs=0.06)


def test_plain_weave_is_a_checkerboard() -> None:
    part = drawn(partial(even, count=10, twill=(1, 1)), 400)
    warp = (part.color[0] > part.color[2]).astype(float)
    # One crossing is 20 texels: the next one is of the other kind, that after it the same.
    for axis in (0, 1):
        same = [(warp == np.roll(warp, shift, axis)).mean() for shift in (20, 40)]
        assert same[0] < 0.3 and same[1] > 0.7


def test_thin_threads_leave_gaps_and_thick_ones_none() -> None:
    thin, thick = (drawn(partial(even, count=8, width=width)) for width in (0.42, 1.0))
    # Threads of 0.42 of their spacing leave (1 - 0.42) squared of the plane open.
    gaps = (thin.color == np.float32(0.012)).all(0)
    assert gaps.mean() == pytest.approx(0.58**2, abs=0.05)
    assert not (thick.color == np.float32(0.012)).all(0).any()
    assert not thin.gloss[gaps].any() and not thin.metal[gaps].any()


def test_gaps_of_a_metal_mesh_are_not_metal() -> None:
    part = drawn(CLOTH["wire_mesh"])
    assert 0.5 < part.metal.mean() < 0.8
    assert part.height[part.metal == 1].min() > part.height[part.metal == 0].max() - 1e-3


def test_finer_leather_has_more_and_lower_grains() -> None:
    coarse, fine = (drawn(CLOTH[name]) for name in ("leather", "vinyl"))
    # 17 and 26 grains per unit of length.
    crossings = [np.diff(np.signbit(part.height - np.median(part.height))).mean() for part in (coarse, fine)]
    assert crossings[1] > 1.2 * crossings[0]
    assert fine.height.std() < coarse.height.std()


def test_a_sponge_has_dark_pores_and_a_carpet_all_its_yarns() -> None:
    sponge = drawn(CLOTH["sponge"])
    deep = sponge.height < np.quantile(sponge.height, 0.1)
    assert sponge.color[:, deep].mean() < 0.6 * sponge.color[:, ~deep].mean()
    carpet = drawn(CLOTH["carpet"])
    red = carpet.color[0] > 2 * carpet.color[2]
    # One yarn of four is red.
    assert red.mean() == pytest.approx(0.25, abs=0.08)
