"""Products of pieces: what they are put together from, measured."""

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


# Pads, chips and cans; pins and nuts; studs; beans lie too deep to miss one.
PIECES = {"circuit_board": 10 + 18 + 2, "connector_plug": 9 + 2, "building_brick": 8, "coffee_beans": 0}


@pytest.mark.parametrize("name", [name for name, count in PIECES.items() if count])
def test_each_piece_can_be_missing_and_nothing_else_changes(name: str) -> None:
    whole, places = drawn(name, size=64), []
    assert whole.pieces.count == PIECES[name]
    for number in sorted({0, whole.pieces.count // 2, whole.pieces.count - 1}):
        # Wear is drawn over all and differs where the product is another.
        changed = (np.abs(drawn(name, number, 64).maps - whole.maps) > 0.05).any(0)
        assert changed.mean() < 0.12
        places.append(changed)
    # Every picture lacks another place.
    assert not np.logical_and.reduce(places).any()


@pytest.mark.parametrize("name", PIECES)
def test_products_are_possible(name: str) -> None:
    part = drawn(name)
    check_possible(part)
    assert part.surface == (name == "coffee_beans") == bool((part.body == 1).all())


def test_bricks_have_studs_above_their_top() -> None:
    part = drawn("building_brick", size=300)
    studs, count = ndimage.label(part.height > 0.34)
    assert count == 8
    areas = ndimage.sum_labels(np.ones(part.shape), studs, range(1, 9)) * part.texel**2
    assert areas == pytest.approx([math.pi * (0.105 * SCALE) ** 2] * 8, rel=0.15)


def test_beans_are_many_deep() -> None:
    part = drawn("coffee_beans", size=200)
    # As ellipses scattered at random cover a square, of which the canvas shows the middle.
    density = 190 * math.pi * 0.12 * (0.72 * 0.12) / 2.16**2
    assert (part.height > 0.02).mean() == pytest.approx(1 - math.exp(-density), abs=0.05)
    # Those on top lie higher than one bean is tall.
    assert part.height.max() > 0.12


def test_a_chip_has_its_legs_on_both_sides() -> None:
    part = drawn("circuit_board", size=450)
    # The largest chip comes after ten pads, and its legs go with it.
    gone = part.metal - drawn("circuit_board", 10, 450).metal > 0.5
    legs, count = ndimage.label(gone)
    assert count == 2 * 8
    rows = np.array(ndimage.center_of_mass(gone, legs, range(1, count + 1)))[:, 0]
    # Turned a little, so that each side is a slanted row.
    assert (np.sort(rows)[8] - np.sort(rows)[7]) * part.texel > 0.1


def test_the_pins_of_a_plug_are_of_gold() -> None:
    plug = drawn("connector_plug", size=300)
    gold = (plug.metal > 0.5) & (plug.color[0] > 2 * plug.color[2]) & (plug.height > 0.2)
    assert ndimage.label(gold)[1] == 9
