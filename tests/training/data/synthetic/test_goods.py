"""Products of plastic, wood, paper and food: pieces, and what their names promise, measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.synthesis import check_possible
from scipy import ndimage

from training.data.synthetic.canvas import Part
from training.data.synthetic.goods import GOODS
from training.data.synthetic.hardware import SCALE


def drawn(name: str, missing: int | None = None, size: int = 96) -> Part:
    part = Part.blank(size, missing)
    GOODS[name](part, np.random.default_rng(13))
    return part


# What can be missing: a line and two letters, two prints, pills, and so on; beans lie too deep to miss one.
PIECES = {
    "tablet": 3,
    "capsule": 2,
    "blister_pack": 10,
    "crown_cap": 3,
    "screw_cap": 3,
    "button": 4,
    "building_brick": 8,
    "biscuit": 28,
    "zip_fastener": 22,
    "dental_brush": 4 * 9 - 4,
    "pencils": 6,
    "coffee_beans": 0,
    "gasket": 4,
    "bead_string": 6,
}


@pytest.mark.parametrize("name", GOODS)
def test_each_piece_can_be_missing_and_nothing_else_changes(name: str) -> None:
    whole = drawn(name, size=64)
    assert whole.pieces.count == PIECES[name]
    for number in sorted({0, whole.pieces.count // 2, whole.pieces.count - 1} if whole.pieces.count else ()):
        changed = (np.abs(drawn(name, number, 64).maps - whole.maps) > 0.05).any(0)
        assert changed.mean() < 0.12, number


@pytest.mark.parametrize("name", GOODS)
def test_products_are_possible(name: str) -> None:
    part = drawn(name)
    check_possible(part)
    assert part.surface == (name in ("zip_fastener", "coffee_beans")) == bool((part.body == 1).all())


@pytest.mark.parametrize(
    ("name", "radius"), [("tablet", 0.66), ("button", 0.68), ("crown_cap", 0.70), ("screw_cap", 0.66)]
)
def test_round_things_have_the_area_of_their_radius(name: str, radius: float) -> None:
    part = drawn(name, size=300)
    # The color reaches a texel further than the wall, and does not go down into holes.
    holes = 4 * math.pi * ((0.062 - 0.8 * 0.015) * SCALE) ** 2 if name == "button" else 0
    assert part.body.mean() * 4 == pytest.approx(math.pi * (radius * SCALE + part.texel) ** 2 - holes, rel=0.01)


@pytest.mark.parametrize(("name", "count"), [("button", 4 + 1), ("gasket", 4 + 2)])
def test_holes_go_through(name: str, count: int) -> None:
    # Holes, and the ground around; in the middle of the gasket there is ground too.
    assert ndimage.label(drawn(name, size=300).body < 0.5)[1] == count


@pytest.mark.parametrize(("name", "flutes", "radius"), [("crown_cap", 21, 0.70), ("screw_cap", 48, 0.66)])
def test_caps_have_their_flutes_and_ribs(name: str, flutes: int, radius: float) -> None:
    part = drawn(name, size=400)
    row, column = ndimage.center_of_mass(part.body)
    angles = np.linspace(0, 2 * math.pi, 1440, endpoint=False)
    reach = radius * SCALE / part.texel
    around = ndimage.map_coordinates(part.body, [row + reach * np.sin(angles), column + reach * np.cos(angles)])
    assert np.abs(np.fft.rfft(around))[1:100].argmax() + 1 == flutes


def test_a_capsule_has_two_halves_and_round_ends() -> None:
    part = drawn("capsule", size=400)
    cap = (part.color[0] > 4 * part.color[1]) & (part.body > 0.5)
    assert 0.4 < cap.sum() / (part.body > 0.5).sum() < 0.65
    # A box of 0.94 by 0.5 with half discs of radius 0.25 on both ends; the cap is 0.016 wider on each side.
    area = 0.94 * 0.5 + math.pi * 0.25**2 + 2 * 0.016 * 0.7
    assert part.body.mean() * 4 == pytest.approx(area * SCALE**2, rel=0.03)


def test_bricks_have_studs_above_their_top() -> None:
    part = drawn("building_brick", size=300)
    studs, count = ndimage.label(part.height > 0.34)
    assert count == 8
    areas = ndimage.sum_labels(np.ones(part.shape), studs, range(1, 9)) * part.texel**2
    assert areas == pytest.approx([math.pi * (0.105 * SCALE) ** 2] * 8, rel=0.15)


def test_pencils_and_beads_have_colors_of_their_own() -> None:
    for name, number in (("pencils", 6), ("bead_string", 6)):
        whole = drawn(name)
        tones = []
        for missing in range(number):
            piece = np.abs(drawn(name, missing).height - whole.height) > 0.05
            tones.append(np.median(whole.color[:, piece], axis=1))
        apart = [np.abs(np.log(a / b)).max() for i, a in enumerate(tones) for b in tones[:i]]
        assert np.median(apart) > 0.3


def test_beans_are_many_deep() -> None:
    part = drawn("coffee_beans", size=200)
    # As ellipses scattered at random cover a square, of which the canvas shows the middle.
    density = 190 * math.pi * 0.12 * (0.72 * 0.12) / 2.16**2
    assert (part.height > 0.02).mean() == pytest.approx(1 - math.exp(-density), abs=0.05)
    # Those on top lie higher than one bean is tall.
    assert part.height.max() > 0.12


def test_a_biscuit_is_browner_at_its_edge() -> None:
    part = drawn("biscuit", size=200)
    depth = ndimage.distance_transform_edt(part.body > 0.5) * part.texel
    edge, middle = part.color[:, (depth > 0.01) & (depth < 0.05)], part.color[:, depth > 0.25]
    assert edge.mean() < 0.8 * middle.mean()
