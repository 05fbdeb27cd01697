"""Hard sheets: what their names promise, measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.synthesis import check_possible

from training.data.synthetic.canvas import Part
from training.data.synthetic.textures import TEXTURES, assorted, fill, lay, warped


def drawn(name: str, seed: int = 0, size: int = 160) -> Part:
    part = Part.blank(size)
    TEXTURES[name](part, np.random.default_rng(seed))
    return part


@pytest.mark.parametrize("name", TEXTURES)
def test_sheets_fill_the_canvas_with_possible_materials(name: str) -> None:
    part = drawn(name, size=64)
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


def test_warped_coordinates_move_by_the_amount() -> None:
    part = Part.blank(200)
    x, y = warped(np.random.default_rng(0), part.x, part.y, 0.03, 30)
    assert [(x - part.x).std(), (y - part.y).std()] == pytest.approx([0.03, 0.03], rel=0.15)


def test_cells_have_the_colors_of_a_palette() -> None:
    cell = np.arange(3000).reshape(30, 100)
    palette = (0.1, 0.1, 0.1), (0.6, 0.3, 0.1)
    colors = assorted(np.random.default_rng(1), palette, cell, 3000, 0.0, 0.1)
    red = (colors[0] / colors[2] > 3).ravel()
    assert red.mean() == pytest.approx(0.5, abs=0.05)
    for drawn_, color in zip((~red, red), palette, strict=True):
        logs = np.log(colors.reshape(3, -1)[:, drawn_] / np.array(color)[:, None])
        assert np.ptp(logs, axis=0).max() < 1e-5 and logs.std() == pytest.approx(0.1, rel=0.1)


def test_fill_sets_all_but_the_body() -> None:
    part = Part.blank(4)
    fill(part, np.full((3, 4, 4), 0.3, np.float32), 0.1, 0.2, 1)
    assert part.maps[:, 0, 0].tolist() == pytest.approx([0.1, 0.3, 0.3, 0.3, 0.2, 1, 0])


def test_a_perforated_sheet_has_the_open_share_of_its_pitch() -> None:
    part = drawn("perforated_sheet", size=300)
    # Round holes of 0.30 of the pitch, in rows that are closer by the root of 3/4.
    assert (part.gloss < 0.25).mean() == pytest.approx(math.pi * 0.30**2 / math.sqrt(3 / 4), rel=0.1)


@pytest.mark.parametrize(("name", "count"), [("ceramic_tiles", 2.2), ("mosaic", 5)])
def test_tiles_are_glazed_and_joints_are_not(name: str, count: float) -> None:
    part = drawn(name, size=300)
    tile = part.gloss > 0.3
    assert tile.mean() == pytest.approx(0.91**2, abs=0.03)
    assert part.height[tile].mean() > part.height[~tile].mean() + 0.01
    # Each row is shifted by half a tile against that above.
    pitch = round(150 / count)
    half = pitch // 2
    shifted = (tile[:-pitch, :-half] == tile[pitch:, half:]).mean()
    assert shifted > (tile[:-pitch] == tile[pitch:]).mean() + 0.05 and shifted > 0.9


def test_studs_repeat() -> None:
    part = drawn("rubber_studs", size=272)
    top = (part.height > 0.03).astype(float)
    spectrum = np.abs(np.fft.rfft2(top - top.mean()))
    row, column = np.unravel_index(spectrum[:40, :40].argmax(), (40, 40))
    # 3.4 studs per unit of length, on a canvas of 2.
    assert max(row, column) == pytest.approx(6.8, abs=0.5) and min(row, column) <= 1


def test_the_prints_of_label_and_cardboard_are_pieces() -> None:
    # Two lines and two arrows; brand, four lines, code, sign and seal.
    assert [drawn(name, size=64).pieces.count for name in ("cardboard", "label")] == [4, 8]


def test_brushed_metal_is_smoother_along_the_brush() -> None:
    part = drawn("brushed_steel", size=300)
    along, across = (np.abs(np.diff(part.color[1], axis=axis)).mean() for axis in (1, 0))
    assert across > 5 * along and part.metal.min() == 1


def test_boards_have_gaps_and_planks_have_none() -> None:
    floor, plank = drawn("walnut_floor", 2, 300), drawn("oak", 2, 300)
    # Five boards on the two units of the canvas.
    deep = (floor.height < -0.012).mean(1) > 0.5
    assert 4 <= np.diff(deep.astype(int)).clip(0).sum() + deep[0] <= 6
    assert plank.height.min() > -0.012
