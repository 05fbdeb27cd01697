"""Parts and windows into them, against plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from training.data.synthetic.canvas import Part, jitter, rgb
from training.data.synthetic.shapes import box, disc


def test_a_window_draws_where_it_should() -> None:
    part = Part.blank(200)
    outer = part.near(0.3, -0.2, 0.5, 0.7)
    inner = outer.near(0.2, 0.1, 0.2, -0.3)
    inner.paint(inner.inside(disc(inner.x, inner.y, 0.05)), (1, 1, 1))
    row, column = ndimage.center_of_mass(part.color[0])
    expected_x = 0.3 + 0.2 * math.cos(0.7) - 0.1 * math.sin(0.7)
    expected_y = -0.2 + 0.2 * math.sin(0.7) + 0.1 * math.cos(0.7)
    assert (column + 0.5) / 100 - 1 == pytest.approx(expected_x, abs=1e-3)
    assert (row + 0.5) / 100 - 1 == pytest.approx(expected_y, abs=1e-3)
    assert part.color[0].sum() * part.texel**2 == pytest.approx(math.pi * 0.05**2, rel=0.02)


def test_a_missing_piece_leaves_the_random_numbers_after_it_alone() -> None:
    def draw(missing: int | None) -> Part:
        rng, part = np.random.default_rng(3), Part.blank(64, missing)
        for x in (-0.5, 0.0, 0.5):
            with part.piece():
                window = part.near(x, float(rng.uniform(-0.3, 0.3)), 0.2)
                window.solid(disc(window.x, window.y, 0.15), 0.1, (0.5, 0.5, 0.5))
        return part

    whole, without = draw(None), draw(1)
    assert whole.pieces.count == 3
    changed = (whole.maps != without.maps).any((0, 1))
    columns = np.flatnonzero(changed)
    assert columns.size and columns.min() > 20 and columns.max() < 44
    assert not without.maps[:, :, 24:40].any()


def test_a_window_holds_all_within_reach_and_shares_memory() -> None:
    part = Part.blank(120)
    for x, y, turn in ((0.0, 0.0, 0.0), (0.7, -0.4, 0.9), (-0.97, 0.97, 2.5)):
        window = part.near(x, y, 0.2, turn)
        assert np.shares_memory(window.maps, part.maps)
        near = np.hypot(part.x - x, part.y - y) <= 0.2
        assert (np.hypot(window.x, window.y) <= 0.2).sum() == near.sum()
    window.height += 1
    assert part.height.sum() == window.height.size


def test_a_window_off_the_canvas_is_not_empty() -> None:
    part = Part.blank(40)
    for x, y in ((5, 5), (-5, 0), (0, -5)):
        window = part.near(x, y, 0.1)
        assert min(window.shape) >= 1 and np.hypot(window.x, window.y).min() > 3


def test_paint_blends_each_map_by_its_cover() -> None:
    rng, part = np.random.default_rng(0), Part.blank(8)
    part.maps[...] = rng.random(part.maps.shape, dtype=np.float32)
    before, cover = part.maps.copy(), rng.random((8, 8), dtype=np.float32)
    part.paint(cover, (0.1, 0.2, 0.3), gloss=0.9, height=part.x)
    targets = np.stack([part.x, *np.broadcast_to(rgb((0.1, 0.2, 0.3)), (3, 8, 8)), np.full((8, 8), 0.9)])
    np.testing.assert_allclose(part.maps[:5], (1 - cover) * before[:5] + cover * targets, atol=1e-6)
    np.testing.assert_array_equal(part.maps[5:], before[5:])
    with pytest.raises(AttributeError, match="glos"):
        part.paint(cover, glos=1)


def test_solids_have_their_volume_and_holes_go_down_to_the_floor() -> None:
    part = Part.blank(400)
    part.height[...], part.color[...] = 0.01, 0.5
    part.floor = part.maps.copy()
    part.solid(box(part.x, part.y, 0.5, 0.3), 0.2, (1, 0, 0), bevel=0.001, gloss=0.7)
    assert (part.height > 0.1).sum() * part.texel**2 == pytest.approx(1.0 * 0.6, rel=0.02)
    # The material reaches one texel further than the wall.
    area = (1.0 + 2 * part.texel) * (0.6 + 2 * part.texel)
    assert (part.body > 0.5).sum() * part.texel**2 == pytest.approx(area, rel=0.005)
    assert part.height[200, 200] == pytest.approx(0.2) and part.height[10, 10] == pytest.approx(0.01)
    part.hole(disc(part.x, part.y, 0.2), wall=0.02)
    hollow = np.hypot(part.x, part.y) < 0.2 - 0.02 - part.texel
    np.testing.assert_allclose(part.maps[:, hollow], part.floor[:, hollow], atol=1e-6)
    assert (part.body > 0.5).sum() * part.texel**2 == pytest.approx(area - math.pi * (0.2 - 0.8 * 0.02) ** 2, rel=0.005)


def test_colors_are_grays_triples_or_pictures() -> None:
    picture = np.random.default_rng(1).random((3, 4, 5), dtype=np.float32)
    assert [rgb(color).shape for color in (0.5, (0.1, 0.2, 0.3), picture)] == [(1, 1, 1), (3, 1, 1), (3, 4, 5)]


def test_another_batch_is_as_much_off_as_asked() -> None:
    rng = np.random.default_rng(2)
    logs = np.log([jitter(rng, (0.2, 0.4, 0.6), 0.1).ravel() / (0.2, 0.4, 0.6) for _ in range(4000)])
    # One number for all channels, and 0.4 of one for each.
    np.testing.assert_allclose(np.cov(logs.T) / 0.01, 0.16 * np.eye(3) + 1, atol=0.12)
