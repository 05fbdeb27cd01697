"""Electrical products: what they are put together from."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.synthesis import check_possible
from scipy import ndimage

from training.data.synthetic.canvas import Part
from training.data.synthetic.electronics import ELECTRONICS


def drawn(name: str, missing: int | None = None, size: int = 96) -> Part:
    part = Part.blank(size, missing)
    ELECTRONICS[name](part, np.random.default_rng(11))
    return part


# Pads, chips and cans; screws; pins and nuts; lines of text; rings; keys; two eyes, two clips and a screw.
PIECES = {
    "circuit_board": 10 + 18 + 2,
    "circuit_board_blue": 10 + 18 + 2,
    "terminal_block": 6,
    "connector_plug": 9 + 2,
    "button_cell": 3,
    "sim_card": 3,
    "resistor": 4,
    "keyboard": 24,
    "wall_socket": 5,
}


@pytest.mark.parametrize("name", ELECTRONICS)
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


@pytest.mark.parametrize("name", ELECTRONICS)
def test_products_are_possible(name: str) -> None:
    part = drawn(name)
    check_possible(part)
    assert part.surface == (name == "keyboard") == bool((part.body == 1).all())


def test_boards_differ_in_their_varnish() -> None:
    # Next to the left edge of the board there is nothing but varnish.
    green, blue = (drawn(name).maps[1:4, 44:52, 15:17].mean((1, 2)) for name in ("circuit_board", "circuit_board_blue"))
    assert green.argmax() == 1 and blue.argmax() == 2


def test_a_chip_has_its_legs_on_both_sides() -> None:
    part = drawn("circuit_board", size=450)
    # The largest chip comes after ten pads, and its legs go with it.
    gone = part.metal - drawn("circuit_board", 10, 450).metal > 0.5
    legs, count = ndimage.label(gone)
    assert count == 2 * 8
    rows = np.array(ndimage.center_of_mass(gone, legs, range(1, count + 1)))[:, 0]
    # Turned a little, so that each side is a slanted row.
    assert (np.sort(rows)[8] - np.sort(rows)[7]) * part.texel > 0.1


def test_contacts_are_metal_and_housings_are_not() -> None:
    plug = drawn("connector_plug", size=300)
    gold = (plug.metal > 0.5) & (plug.color[0] > 2 * plug.color[2]) & (plug.height > 0.2)
    assert gold.any()
    block = drawn("terminal_block")
    assert 0.03 < (block.metal > 0.5).mean() < 0.2
