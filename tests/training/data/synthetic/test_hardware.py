"""Metal parts and the table that all objects lie on, against plain formulas."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from helpers.synthesis import check_possible
from scipy import ndimage

from training.data.synthetic.canvas import Builder, Part
from training.data.synthetic.hardware import (
    FLANGE_SCREWS,
    HARDWARE,
    SCALE,
    bushed_flange,
    finish,
    placed,
    table,
    turning,
)
from training.data.synthetic.shapes import Rng, disc


def drawn(builder: Builder, size: int = 160, missing: int | None = None) -> Part:
    part = Part.blank(size, missing)
    builder(part, np.random.default_rng(7))
    return part


@pytest.mark.parametrize("name", HARDWARE)
def test_objects_lie_within_the_picture_and_are_possible(name: str) -> None:
    part = drawn(HARDWARE[name], 96)
    check_possible(part)
    assert not part.surface
    rim = np.ones(part.shape, bool)
    rim[3:-3, 3:-3] = False
    assert not part.body[rim].any() and part.body.mean() > 0.05


def test_the_table_is_what_is_there_without_the_product() -> None:
    part = Part.blank(120)
    window = table(part, np.random.default_rng(0), (0.2, 0.4, 0.6), 0.5)
    np.testing.assert_array_equal(part.floor, part.maps)
    assert not part.body.any() and (part.gloss == np.float32(0.1)).all()
    assert part.height.std() == pytest.approx(0.0007, rel=0.2)
    assert (part.color[2] > part.color[1]).all() and (part.color[1] > part.color[0]).all()
    # All of the canvas is in the window, whose lengths are SCALE as long.
    assert window.shape == part.shape and window.texel == pytest.approx(part.texel / SCALE)
    step = math.hypot(window.x[0, 1] - window.x[0, 0], window.y[0, 1] - window.y[0, 0])
    assert step == pytest.approx(part.texel / SCALE, rel=1e-4)


@pytest.mark.parametrize("surface", [False, True])
def test_what_is_placed_knows_its_core_and_lies_on_a_table_or_covers_it(surface: bool) -> None:
    def draw(p: Part, rng: Rng) -> None:
        p.solid(disc(p.x, p.y, 0.5), 0.2, p.core, bevel=0.001)

    part = drawn(placed(draw, core=(0.9, 0.1, 0.1), ground=0.3, spread=1, wear=0, surface=surface), 300)
    assert part.core == (0.9, 0.1, 0.1) and part.surface == surface and not part.floor[6].any()
    red = part.color[0] > 3 * part.color[1]
    area = math.pi * (0.5 * SCALE + part.texel) ** 2 / 4
    assert red.mean() == pytest.approx(area, rel=0.02)
    assert (part.body > 0.5).mean() == (1 if surface else pytest.approx(area, rel=0.02))


def test_wear_is_on_the_product_alone_and_as_much_as_asked() -> None:
    part = Part.blank(300)
    part.color[...], part.gloss[...] = 0.5, 0.5
    part.body[:, :150] = 1
    finish(part, np.random.default_rng(0), 0.1)
    assert (part.color[:, :, 150:] == 0.5).all() and (part.gloss[:, 150:] == 0.5).all()
    logs = np.log(part.color[0, :, :150] / 0.5)
    # Two kinds of noise, of deviation 1 and 0.6.
    assert logs.std() == pytest.approx(0.1 * math.hypot(1, 0.6), rel=0.2)
    np.testing.assert_allclose(part.gloss[:, :150] - 0.5, -0.5 * logs, atol=1e-5)


def test_marks_of_the_lathe_are_circles() -> None:
    part = Part.blank(300)
    window = part.near(0.1, -0.2, 1.5)
    turning(window, np.random.default_rng(0), np.ones(window.shape, np.float32), 0.01)
    order = np.argsort(np.hypot(window.x, window.y), axis=None)
    radius, height = np.hypot(window.x, window.y).ravel()[order], window.height.ravel()[order]
    close = np.diff(radius) < 1e-6
    assert close.sum() > 1000 and np.abs(np.diff(height))[close].max() < 1e-4
    assert height.std() > 0.005


def test_a_gear_has_its_teeth_evenly_around() -> None:
    part = drawn(HARDWARE["gear"], 300)
    assert part.pieces.count == 22
    row, column = ndimage.center_of_mass(part.body)
    angles = np.linspace(0, 2 * math.pi, 720, endpoint=False)
    radius = 0.70 * SCALE / part.texel
    around = ndimage.map_coordinates(part.body, [row + radius * np.sin(angles), column + radius * np.cos(angles)])
    assert np.abs(np.fft.rfft(around))[1:200].argmax() + 1 == 22
    broken = drawn(HARDWARE["gear"], 300, missing=3)
    lost = part.body.sum() - broken.body.sum()
    assert 0 < lost * part.texel**2 < 2 * math.pi * 0.7 / 22 * 0.2


def test_a_nut_looks_the_same_after_a_sixth_of_a_turn() -> None:
    body = drawn(HARDWARE["hex_nut"], 300).body
    row, column = ndimage.center_of_mass(body)
    rows, columns = np.indices(body.shape)

    def turned(degrees: float) -> float:
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        down, right = rows - row, columns - column
        moved = ndimage.map_coordinates(
            body, [row + cos * down - sin * right, column + sin * down + cos * right], order=1
        )
        return float(np.abs(moved - body).mean())

    assert turned(60) < 0.2 * turned(30)


def test_pieces_are_what_can_be_missing() -> None:
    counts = {name: drawn(builder, 64).pieces.count for name, builder in HARDWARE.items()}
    assert counts == {"hex_nut": 0, "gear": 22}


def test_one_screw_of_the_sample_is_of_another_kind() -> None:
    right = drawn(bushed_flange)
    for wrong in range(FLANGE_SCREWS):
        changed = np.abs(drawn(partial(bushed_flange, wrong=wrong)).height - right.height) > 0.005
        rows, columns = np.nonzero(changed)
        angle = wrong * 2 * math.pi / FLANGE_SCREWS
        x, y = 0.42 * SCALE * math.cos(angle), 0.42 * SCALE * math.sin(angle)
        at_x, at_y = (columns.mean() + 0.5) * right.texel - 1, (rows.mean() + 0.5) * right.texel - 1
        # Within the shift and turn of the part.
        assert math.hypot(at_x - x, at_y - y) < 0.15 and max(np.ptp(rows), np.ptp(columns)) * right.texel < 0.2
