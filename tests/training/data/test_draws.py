"""Which images are the references."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.models import write_photos

from adfeatures.errors import InputError
from training.data.draws import draw_references, given_references
from training.data.items import NORMAL, Item


def items(count: int, view: str = "") -> list[Item]:
    """In an order that is not that of their names."""
    return [Item(f"{view}{number:03d}.png", NORMAL, "nut", view=view) for number in reversed(range(count))]


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_a_draw_takes_the_next_images_by_name(draw: int) -> None:
    found = [item.image for item in draw_references(items(7), 2, draw)]
    assert found == [f"{number:03d}.png" for number in (2 * draw, 2 * draw + 1)]


def test_every_view_has_its_own() -> None:
    found = draw_references(items(4, "C2") + items(5, "C1"), 2, 1)
    assert [item.image for item in found] == ["C1002.png", "C1003.png", "C2002.png", "C2003.png"]


def test_nothing_begins_anew() -> None:
    with pytest.raises(InputError, match="Draw 2 of 3 references needs 6 normal training images of view C2, nut has 5"):
        draw_references(items(9, "C1") + items(5, "C2"), 3, 1)


@pytest.mark.parametrize("layout", ["mvtec/nut/train", "nut/train", "mvtec/nut", "nut"])
def test_given_references_in_each_layout(tmp_path: Path, layout: str) -> None:
    paths = write_photos(tmp_path / layout / "good", range(3))
    found = given_references(tmp_path, "mvtec", "nut", 2)
    assert [item.image for item in found] == sorted(map(str, paths))[:2]
    assert {(item.product, item.label, item.view) for item in found} == {("nut", NORMAL, "")}
    with pytest.raises(InputError, match="holds 3 images, 4 references were asked for. Lower --shots"):
        given_references(tmp_path, "mvtec", "nut", 4)


def test_the_folder_of_the_data_set_comes_first(tmp_path: Path) -> None:
    for place in ("nut", "mvtec/nut"):
        write_photos(tmp_path / place, range(1))
    (found,) = given_references(tmp_path, "mvtec", "nut", 1)
    assert Path(found.image).parent == tmp_path / "mvtec/nut"


def test_no_folder_of_the_product(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There are no references of nut in"):
        given_references(tmp_path, "mvtec", "nut", 1)
